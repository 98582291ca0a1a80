"""Pipelines: schedules as data, proven, timed, drawn, and run."""

from ._check import Buffers as Buffers, Ring as Ring
from ._execute import (
    Model as Model,
    Run as Run,
    check_backward as check_backward,
    check_layers as check_layers,
    value_and_grad as value_and_grad,
)
from ._named import NAMED as NAMED
from ._schedule import Schedule as Schedule, schedule as schedule
from ._simulate import Simulation as Simulation, Span as Span
from ._table import Op as Op, Table as Table
