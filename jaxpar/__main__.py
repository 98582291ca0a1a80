"""`python -m jaxpar` is the command `jaxpar`."""

import sys

from .cli import main

sys.exit(main())
