"""`python -m kerasnorm` is the command line."""

import sys

from kerasnorm_cli import main


if __name__ == "__main__":
    sys.exit(main())
