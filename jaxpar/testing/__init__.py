"""What a test of a sharded program can assert: the numbers, the placement, the traffic. Public, for your own suites.

`assert_same` (the numbers), `assert_sharding` (the placement), `assert_traffic` and `collectives` (what moves),
`mesh_shapes` and `pairwise` (on which meshes), and a pytest plugin, `jaxpar.testing.plugin`, that does nothing unless
the ini file asks. Nothing is imported before it is used: pytest loads the plugin in every project.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpar._hlo import Collective as Collective

    from ._cases import MeshCase as MeshCase, mesh_shapes as mesh_shapes, pairwise as pairwise
    from ._compare import Comparison as Comparison, Row as Row, compare as compare
    from ._same import assert_same as assert_same
    from ._sharding import assert_sharding as assert_sharding
    from ._traffic import (
        Expect as Expect,
        Traffic as Traffic,
        assert_traffic as assert_traffic,
        collectives as collectives,
    )

_HOME = {
    "Collective": "jaxpar._hlo",
    "Comparison": "._compare",
    "Expect": "._traffic",
    "MeshCase": "._cases",
    "Row": "._compare",
    "Traffic": "._traffic",
    "assert_same": "._same",
    "assert_sharding": "._sharding",
    "assert_traffic": "._traffic",
    "collectives": "._traffic",
    "compare": "._compare",
    "mesh_shapes": "._cases",
    "pairwise": "._cases",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
