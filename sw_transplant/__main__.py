"""``python -m sw_transplant``: the command line without the installed script."""

import sys

from sw_transplant.cli import main

if __name__ == "__main__":
    sys.exit(main())
