"""`python -m place`."""

import sys

from place.cli import main

sys.exit(main())
