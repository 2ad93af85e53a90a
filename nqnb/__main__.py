"""The entry point for ``python -m nqnb``, which runs the command ``nqnb``.

The processes of ``nqnb worker --processes`` run this file by its path.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Python has added the folder of this file to `sys.path`, but only the folder above contains the package.
        folder = Path(__file__).parent
        own = folder.resolve()  # as Python does
        sys.path[:] = [each for each in sys.path if Path(each) != own] + [str(folder.parent)]

    from nqnb.cli import main

    sys.exit(main())
