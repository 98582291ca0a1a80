"""The persistent compilation cache of JAX, one call away."""

import os
import pathlib

import jax


def compilation_cache(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Keep compiled programs in `directory`, so that the next process with the same program does not compile it again.

    Sets JAX's own options for this process: every program is kept, however quick its compilation. Several processes may
    share a directory. Files are never deleted; XLA keeps one of some 10 kB to some MB for each program.

    Args:
        directory: Made when needed.

    Returns:
        The absolute path.

    Example:
        >>> import tempfile
        >>> jp.compilation_cache(tempfile.mkdtemp()).is_dir()
        True
    """
    path = pathlib.Path(directory).absolute()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
