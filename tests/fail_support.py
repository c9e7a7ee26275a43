"""The command, with a defect in every process but the main one: its third forward pass fails."""

from __future__ import annotations

import dataclasses
from typing import Any

from bfpo_exp.app import main
from bfpo_exp.distributed import group
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.train import preference


def break_the_third_pass() -> None:
    calls: list[Any] = []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("this GPU has fallen off the bus")
        return SHARED.logps(*arguments)

    preference.chosen_path = lambda *_: dataclasses.replace(SHARED, logps=broken)


if __name__ == "__main__":
    if not group().main:
        break_the_third_pass()
    main()
