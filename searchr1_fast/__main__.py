"""`python -m searchr1_fast` is the `searchr1` command."""

import sys

from searchr1_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
