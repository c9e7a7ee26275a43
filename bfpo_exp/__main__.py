"""``python -m bfpo_exp`` is ``bfpo-exp``."""

from bfpo_exp.app import main

main()
