"""``python -m bfpo_exp.theory FILE.png``: draw the figure of docs/theory.md."""

from __future__ import annotations

import sys
from pathlib import Path

from bfpo_exp.compare.figures import figure, save
from bfpo_exp.theory.plot import draw_gap

if __name__ == "__main__":
    with figure(9.4, 6.8) as drawn:
        draw_gap(drawn)
        save(drawn, Path(sys.argv[1]))
