"""``python launchers/local_cluster``: see `local_cluster.cli`."""

import sys
from pathlib import Path

if not __package__:  # started by its folder's name: Python then looks for modules in it, not beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from local_cluster.cli import main

sys.exit(main())
