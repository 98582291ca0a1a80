"""Strategies as remedies, written for the mesh and the plan that a step has: what can be typed as it stands."""

from collections.abc import Mapping

from ._evidence import Evidence


def axis_to_split(seen: Evidence, kind: str) -> str:
    """The largest axis over which everything of `kind` is whole and which FSDP or ZeRO could take; `""` if none.

    These split the batch too: so it is an axis that splits the batch, where it is known which do.
    """
    alike = [seen.axes_of(number) for number, each in seen.arguments.items() if each.kind == kind]
    if not alike or any(axes is None for axes in alike):
        return ""
    split = {axis for axes in alike for axis in axes or ()}
    whole = [axis for axis in seen.batch_axes or seen.sizes if axis not in split]
    return max(whole, key=lambda axis: seen.sizes[axis], default="")


def zero(axis: str) -> str:
    """Optimiser state split over `axis`."""
    return f'jp.ZeRO(1, axis="{axis}")'


def fsdp(seen: Evidence, axis: str) -> str:
    """Parameters split over `axis`, in place of whatever now has replicas there; or over one of the usual name."""
    if axis == "fsdp":
        return "jp.FSDP()"
    replaced = [f"jp.{each}" for each in getattr(seen.plan, "strategies", ()) if _keeps_replicas(each, axis)]
    instead = f" in place of {' and '.join(replaced)}" if replaced else ""
    sizes = {"fsdp" if name == axis else name: size for name, size in seen.sizes.items()}
    usual = f", or jp.FSDP() on {mesh(sizes)}" if len(sizes) == len(seen.sizes) else ""
    return f'jp.FSDP(axis="{axis}"){instead}{usual}'


def mesh(sizes: Mapping[str, int]) -> str:
    """A mesh with axes of these sizes."""
    return f"jp.mesh({', '.join(f'{name}={size}' for name, size in sizes.items())})"


def _keeps_replicas(strategy: str, axis: str) -> bool:
    """Whether a strategy, as a plan writes it, has copies of parameters along `axis`."""
    return strategy.startswith(("DP(", "ZeRO(")) and (
        f"axis='{axis}'" in strategy or ("axis=" not in strategy and axis == "data")
    )
