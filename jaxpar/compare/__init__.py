"""`jp.compare`: which mesh, and why not the others.

The module is what one calls; what a comparison is made of is inside.
"""

import sys
import types
from typing import Any

from ._candidates import Candidate as Candidate, Rejected as Rejected
from ._compare import compare as compare
from ._comparison import Comparison as Comparison


class _Compare(types.ModuleType):
    """A module hides what else its package calls by its name, from the moment it is imported: so the two are one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Compare
