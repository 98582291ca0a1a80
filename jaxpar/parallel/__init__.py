"""The strategies: one a file, none imports another."""

from .context import CP as CP
from .data import DP as DP
from .expert import EP as EP
from .fsdp import FSDP as FSDP
from .pipeline import PP as PP
from .tensor import TP as TP
from .zero import ZeRO as ZeRO
