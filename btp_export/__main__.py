"""`python -m btp_export` is `btp-export`."""

import sys

from btp_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
