"""Run the command ``nqnb``, as ``python -m nqnb``."""

import sys

from nqnb.cli import main

sys.exit(main())
