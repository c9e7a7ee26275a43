"""``python -m bfpo_exp.sweep`` is ``bfpo-sweep``."""

import sys

from bfpo_exp.sweep.cli import main

sys.exit(main())
