"""The command line: `jaxpar train|plan|verify|explain|export|doctor`."""

from ._main import main as main
