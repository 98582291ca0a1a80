"""The command line: `jaxpar train|plan|verify|doctor`."""

from ._main import main as main
