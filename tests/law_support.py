"""Trains every loss for a few steps, as the processes of this group together; prints what was logged.

python law_support.py MICROBATCH
"""

from __future__ import annotations

import json
import sys

import torch
from model_support import made_model, made_pairs

from bfpo_exp import distributed
from bfpo_exp.config.check import checked
from bfpo_exp.config.schema import Config
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.losses import LOSSES
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.paths import config_dir
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.loop import train
from bfpo_exp.train.preference import PreferenceObjective


def config_of(loss: str, microbatch: int) -> Config:
    from hydra import compose, initialize_config_dir

    words = [
        f"loss={loss}", "train.trainable=all", "train.batch=8", f"train.microbatch={microbatch}",
        "train.lr=1e-3", "train.warmup=0", "train.schedule=constant",
    ]  # fmt: skip
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return checked(compose("config", words))


def main() -> None:
    torch.set_num_threads(1)
    distributed.join()
    logged = {}
    for loss in sorted(LOSSES):
        config = config_of(loss, int(sys.argv[1]))
        model, pairs = made_model(), made_pairs(40, longest=60)
        logps, first = (
            reference_logps(model, pairs, SHARED),
            reference_logps(made_model(seed=1), pairs, SHARED),
        )
        objective = PreferenceObjective(pairs, logps, config, "cpu", first)
        engine = PlainEngine(model, select_trainable(model, "all"), config.train, 4)
        steps: list[float] = []
        train(engine, objective, 4, 1, lambda taken, values, s=steps: s.append(values["loss"]))
        logged[loss] = steps
    if distributed.group().main:
        print(json.dumps(logged))
    distributed.leave()


if __name__ == "__main__":
    main()
