"""The command line: `jaxpar train|plan|verify|explain|export|compare|checkpoint|launch|status|doctor`."""

from ._main import main as main
