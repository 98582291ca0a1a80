"""Optimised HLO text, read as data: `read(text)`; the files' heads say how."""

from ._bytes import cycles as cycles, is_free as is_free, traffic as traffic
from ._flops import Work as Work, flops_of as flops_of, work_of as work_of
from ._groups import MeshAxes as MeshAxes, mesh_axes as mesh_axes
from ._layout import HBM as HBM, HOST as HOST, VMEM as VMEM, Stored as Stored, Tree as Tree, tree_of as tree_of
from ._module import KINDS as KINDS, Collective as Collective, Loop as Loop, Module as Module, read as read
from ._text import Op as Op, Program as Program
