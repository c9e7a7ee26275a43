"""DeepSpeed's ZeRO under the same loop: optimiser state, gradients and weights shared out.

The settings are DeepSpeed's own JSON (``conf/deepspeed``).  What the training config says already
(batch sizes, clipping, precision) is put in from there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bfpo_exp.config.training import Optimisation
from bfpo_exp.distributed import group, join
from bfpo_exp.errors import UserError
from bfpo_exp.train.engine import scheduled
from bfpo_exp.train.optimisers import make_optimiser

TAG = "deepspeed"
# What the training config decides; a second word on it could only contradict it.
OWN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


def check_settings(settings: Mapping[str, Any]) -> None:
    """A `UserError` for a DeepSpeed setting that the training config decides, or a missing package."""
    for name in OWN:
        if name in settings:
            raise UserError(
                f"deepspeed.config.{name} is decided by the training config (train.batch, train.microbatch, "
                "train.clip, train.optimizer, model.dtype); remove it"
            )
    _import()


def deepspeed_config(
    settings: Mapping[str, Any], optimisation: Optimisation, dtype: torch.dtype
) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: the user's settings with what the training config decides.

    Every process takes batch / processes rows a step, in micro-batches.
    """
    rows = optimisation.batch // group().size
    micro = min(optimisation.microbatch, rows)
    return {
        **settings,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": -(-rows // micro),
        "gradient_clipping": optimisation.clip or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class ZeroEngine:
    """A DeepSpeed engine behind the members that the loop knows.

    ``module`` is the engine itself, whose hooks gather what ZeRO 3 has shared out.
    """

    any_world_size = False

    def __init__(
        self,
        module: nn.Module,
        trained: list[nn.Parameter],
        optimisation: Optimisation,
        steps: int,
        settings: Mapping[str, Any],
    ) -> None:
        deepspeed = _import()
        join(alone_too=True)
        dtype = trained[0].dtype
        self.device = trained[0].device
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=make_optimiser(trained, optimisation),
            lr_scheduler=lambda optimiser: scheduled(optimiser, optimisation, steps),
            config=deepspeed_config(settings, optimisation, dtype),
        )
        self.module: nn.Module = self.engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar; with the last one of a step, update.

        DeepSpeed divides by the number of processes, as for a mean of means; the loss is divided by
        the step's global count already, so that is undone.
        """
        # Packed rows come in another number at each step, so DeepSpeed's own count is not used.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * group().size, scale_wrt_gas=False)
        self.engine.step()

    def step(self) -> Tensor:
        """The norm of the gradients of the update that the last `backward` has made, shape ()."""
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.device)

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint, to which every process adds its part."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Continue from what `save` has written."""
        self.engine.load_checkpoint(str(folder), tag=TAG)

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, whole and on the CPU, in the main process; gathered one by one under ZeRO 3."""
        deepspeed = _import()
        module: nn.Module = self.engine.module
        found = {}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            gather = [tensor] if hasattr(tensor, "ds_id") else []
            with deepspeed.zero.GatheredParameters(gather, enabled=bool(gather)):
                if group().main:
                    found[name] = tensor.detach().cpu().clone()
        return {name: found[name] for name in _saved(module, found)} if group().main else None

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free its buffers."""
        self.engine.destroy()


def _saved(module: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """The names that a model's file holds: not those of buffers that are made anew when it is loaded."""
    transient = {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return [name for name in found if name not in transient]


def _import() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "deepspeed is not installed; pip install 'bfpo-exp[deepspeed]', or use deepspeed=none"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed
