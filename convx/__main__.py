"""``python -m convx`` is ``convx``."""

import sys

from convx.cli import main

sys.exit(main())
