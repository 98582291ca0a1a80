"""Small real data for the models' demos: text and images that are on every machine already; nothing is downloaded.

Text is the sources of the standard library; images are the handwritten digits (Alpaydin and Kaynak, 1998, UCI) that
scikit-learn ships, 1,797 of 8 x 8 pixels, which is why it is among the developers' dependencies.
"""

from typing import Any

import numpy as np

import jaxpar as jp


def text() -> tuple[jp.data.TokenFile, jp.data.TokenFile]:
    """The bytes of the standard library's sources, to train on and to validate with: different files."""
    split = jp.data.tokenise(jp.data.stdlib_sources(), ".cache/jaxpar/tokens").split(0.02)
    return split.train, split.validation


def digits() -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Images [8, 8, 1] from 0 to 1 with their labels, to train on (1,536) and to validate with (256)."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]  # in `dev` alone

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = (found.images[..., None] / 16).astype(np.float32)
    samples = [{"image": images[index], "label": np.asarray(found.target[index], np.int32)} for index in order]
    return samples[:1536], samples[1536:1792]
