"""`python -m lion_hf.convert`, equivalent to the command `lion-convert`."""

import sys

from .command import main


if __name__ == "__main__":
    sys.exit(main())
