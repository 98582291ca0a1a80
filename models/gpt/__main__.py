"""The demo, `make demo`: a GPT learns Python from the standard library's sources, over 8 simulated devices.

    python -m models.gpt [--steps 200] [--resume] [--data PATH ...] [--mesh meshes/cpu_8.toml] [--directory runs/demo]

It ends with a validation loss, beside the entropies that a table of bytes or of byte pairs could reach at best on the
same text, and with text of its own. The run directory keeps metrics, checkpoints, and a picture of the mesh.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

import jaxpar as jp

from . import demo, generate

PROMPT = "def "


def main() -> int:
    """Train, evaluate, and write something."""
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="how many, or how many more with --resume")
    parser.add_argument("--resume", action="store_true", help="go on where the last run stopped")
    parser.add_argument("--data", nargs="+", type=pathlib.Path, help="text files or directories")
    parser.add_argument("--mesh", default="meshes/cpu_8.toml", help="a TOML file")
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    args = parser.parse_args()

    jp.compilation_cache(".cache/jaxpar/compiled")
    recipe = demo()
    program = recipe.on(jp.mesh(args.mesh))
    print(program)

    files = jp.data.text_files(args.data) if args.data else jp.data.stdlib_sources()
    train, validation = jp.data.tokenise(files, ".cache/jaxpar/tokens").split(0.02)
    batch_size, seq_len = recipe.batch["tokens"].shape
    done = jp.Run(args.directory, writers=()).latest if args.resume else None
    fitted = jp.fit(
        program,
        jp.data.Loader(train, batch_size=batch_size, seq_len=seq_len),
        steps=(done or 0) + args.steps,
        directory=args.directory,
        resume=args.resume,
        eval_data=jp.data.Loader(validation, batch_size=batch_size, seq_len=seq_len, seed=None, epochs=1),
        name="models.gpt:demo",
    )
    picture = fitted.directory / "mesh.svg"
    program.plan.draw().save(picture)
    if fitted.stopped_by:
        print(f"stopped after {fitted.steps} steps; go on with: make demo ARGS=--resume")
        return fitted.exit_code

    model = fitted.state["model"]
    tokens = jnp.array([list(PROMPT.encode())])
    text = bytes(generate(model, tokens, 200, key=jax.random.key(0), temperature=0.8)[0].tolist()).decode(
        errors="replace"
    )
    loss = fitted.metrics["eval/loss"]
    bigram = jp.data.bigram_entropy(validation)
    print(f"""
{text}

validation, nats per byte
  {jp.data.unigram_entropy(validation):.3f}  byte frequencies, at best
  {bigram:.3f}  byte pairs, at best
  {loss:.3f}  this model after {fitted.steps} steps{"" if loss < bigram else ": not there yet"}

{fitted.directory}: metrics.jsonl, checkpoints, {picture.name}""")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (jp.CheckpointError, jp.DataError, jp.MeshError) as error:  # what was typed, or is in the directory
        sys.exit(f"make demo: {error}")
