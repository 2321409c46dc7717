"""`python -m convx` is `convx`; started by torchrun, its words are those of the process that called for it."""

import sys

from convx.cli import main
from convx.distributed import words

if __name__ == "__main__":
    sys.exit(main(words()))
