"""`python -m wellcond` is the console script."""

import sys

from wellcond.cli import main

if __name__ == "__main__":
    sys.exit(main())
