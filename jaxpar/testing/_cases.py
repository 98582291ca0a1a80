"""On which meshes, and in which combinations, to run a test. Pure Python: for `pytest.mark.parametrize`.

The values name themselves, so that a failing test reads `test_mlp[data2-fsdp4]`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any


class MeshCase(dict[str, int]):
    """The axes of a mesh and their sizes, outermost first: `jp.mesh(**case)`. Reads `data2-fsdp4` in a test's name."""

    @property
    def __name__(self) -> str:  # where pytest looks for the name of a parameter
        return str(self)

    def __str__(self) -> str:
        return "-".join(f"{axis}{size}" for axis, size in self.items()) or "no axes"

    def __hash__(self) -> int:  # type: ignore[override]  # parameters are put into sets, and never changed
        return hash(tuple(self.items()))


def mesh_shapes(axes: Sequence[str], devices: int = 8) -> list[MeshCase]:
    """Every way to give `axes` sizes whose product is `devices`, sizes of 1 among them.

    Args:
        axes: Names, outermost first.
        devices: Number of devices to use.

    Raises:
        ValueError: There are no axes, two have one name, or there is no device.

    Example:
        >>> [str(shape) for shape in jp.testing.mesh_shapes(("data", "fsdp"), devices=4)]
        ['data1-fsdp4', 'data2-fsdp2', 'data4-fsdp1']
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if not axes or len(set(axes)) < len(axes) or devices < 1:
        raise ValueError(
            f"mesh_shapes(axes={axes!r}, devices={devices}): give at least one axis, each once, and a device."
        )
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    sizes = itertools.product(divisors, repeat=len(axes))
    return [MeshCase(zip(axes, size, strict=True)) for size in sizes if math.prod(size) == devices]


def pairwise(*factors: Sequence[Any], where: Callable[..., bool] | None = None) -> list[tuple[Any, ...]]:
    """Few combinations in which every pair of values of any two factors occurs: a covering array.

    Most faults need one value or two together; 6 x 4 x 10 values are 240 combinations, and 60 cover every pair. The
    same factors give the same list, everywhere.

    Args:
        factors: The values of each parameter, in order.
        where: Which combinations make sense, called as `where(*combination)`. A pair that occurs in none that does is
            left out.

    Raises:
        ValueError: A factor is empty, or `where` allows nothing.

    Example:
        >>> jp.testing.pairwise(["DP", "FSDP"], ["mlp", "gpt"], [1, 4])
        [('DP', 'mlp', 1), ('DP', 'gpt', 4), ('FSDP', 'mlp', 4), ('FSDP', 'gpt', 1)]
    """
    if not factors or not all(len(factor) for factor in factors):
        raise ValueError(f"pairwise: {len(factors)} factors with {[len(f) for f in factors]} values; each needs one.")
    everything = itertools.product(*(range(len(factor)) for factor in factors))
    allowed = [
        indices
        for indices in everything
        if where is None or where(*(factor[index] for factor, index in zip(factors, indices, strict=True)))
    ]
    if not allowed:
        raise ValueError("pairwise: where= allows no combination.")
    chosen = allowed if len(factors) == 1 else _cover(allowed)
    return [tuple(factor[index] for factor, index in zip(factors, indices, strict=True)) for indices in chosen]


def _cover(candidates: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Take, again and again, the combination with the most pairs that no other has yet; the first of equals."""
    pairs = {indices: frozenset(itertools.combinations(enumerate(indices), 2)) for indices in candidates}
    missing = frozenset().union(*pairs.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda indices: len(pairs[indices] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
