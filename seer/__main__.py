"""`python -m seer`, which is how launchers of several processes start it."""

import sys

from seer.cli import main

sys.exit(main())
