"""`python -m dbscope` is the command `dbscope`."""

import sys

from dbscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
