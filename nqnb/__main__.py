"""`python -m nqnb` is the command `nqnb`."""

import sys

from nqnb.cli import main

sys.exit(main())
