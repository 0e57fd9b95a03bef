"""`python -m odljax` is `odljax`."""

import sys

from odljax.cli import main

if __name__ == "__main__":
    sys.exit(main())
