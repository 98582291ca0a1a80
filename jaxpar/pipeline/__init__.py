"""Pipelines: schedules as data, proven, timed and drawn."""

from ._check import Buffers as Buffers, Ring as Ring
from ._named import NAMED as NAMED
from ._schedule import Schedule as Schedule, schedule as schedule
from ._simulate import Simulation as Simulation, Span as Span
from ._table import Op as Op, Table as Table
