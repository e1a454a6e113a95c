"""`python -m jaxpar` is `jaxpar`."""

import sys

from jaxpar.cli import main

sys.exit(main())
