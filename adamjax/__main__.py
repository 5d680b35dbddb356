"""`python -m adamjax`."""

import sys

from adamjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
