"""`jp.explain`: what a compiled step costs in memory, traffic and time, on hardware that is here or not.

The module is what one calls: `jp.explain(step, ...)`, and what belongs to it, `jp.explain.export`, is inside.
"""

import sys
import types
from typing import Any

from ._collectives import Row as Row
from ._explain import (
    explain as explain,
    explain_file as explain_file,
    explain_text as explain_text,
    export as export,
)
from ._findings import Finding as Finding
from ._flops import Flops as Flops
from ._memory import Memory as Memory
from ._report import Report as Report
from ._timeline import Timeline as Timeline


class _Explain(types.ModuleType):
    """A module hides what else its package calls by its name, from the moment it is imported: so the two are one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Explain
