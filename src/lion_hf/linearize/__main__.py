"""`python -m lion_hf.linearize`, equivalent to the command `lion-linearize`."""

import sys

from .command import main


if __name__ == "__main__":
    sys.exit(main())
