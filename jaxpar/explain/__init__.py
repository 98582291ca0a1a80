"""`jp.explain`: what a compiled step costs in memory, traffic and time, on hardware that is here or not."""

from ._collectives import Row as Row
from ._findings import Finding as Finding
from ._flops import Flops as Flops
from ._memory import Memory as Memory
from ._report import Report as Report
from ._timeline import Timeline as Timeline
