"""The entry point for ``python -m nqnb``, which runs the command ``nqnb``."""

import sys

from nqnb.cli import main

sys.exit(main())
