"""The command line: `jaxpar train|plan|verify|explain|export|compare|doctor`."""

from ._main import main as main
