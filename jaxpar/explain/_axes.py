"""The axes of a mesh as HLO text needs them, whether its devices are here or not."""

import dataclasses

import numpy as np
from jax.sharding import AbstractMesh

from .. import _hlo, _mesh
from .._hlo import MeshAxes
from .._types import AnyMesh


def mesh_axes(mesh: AnyMesh) -> MeshAxes:
    """The axes of a mesh as HLO text needs them; of one whose hardware is elsewhere, too."""
    found = _hlo.mesh_axes(mesh)
    factors = _mesh.dcn_factors(mesh) if isinstance(mesh, AbstractMesh) else {}
    if not factors:
        return found
    slices = np.zeros((), int)  # slices are the outer part of each axis that crosses them
    for axis, size in zip(found.names, found.sizes, strict=True):
        factor = factors.get(axis, 1)
        slices = slices[..., None] * factor + np.arange(size) // (size // factor)
    return dataclasses.replace(found, slices=tuple(int(each) for each in slices.ravel()))
