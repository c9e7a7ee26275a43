"""The memory that training takes on each GPU, by component: estimates, in bytes.

Weights, gradients and optimiser follow ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054); activations
are counted as in Korthikanti et al. (2022, arXiv 2205.05198) for a block of the Llama family with an
attention that never holds its scores (sdpa, FlashAttention).  Left out: the allocator's fragments, the
buffers of communication, and the libraries themselves, a few gigabytes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bfpo_exp.config.training import Deepspeed, Optimisation
from bfpo_exp.logprobs.head import CHUNK
from bfpo_exp.plan.parameters import Shape

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a weight
STATE = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2}  # bytes of optimiser state of a trained weight
# Float32 copies of the response's logits, their log-softmax and its gradient, beside the logits in the
# model's own type: at the worst moment 12 bytes an entry, in float32 as in bfloat16.
LOGIT = 12
LOGITS = CHUNK["cuda"]  # that the fast path has at once


@dataclass(frozen=True)
class Setting:
    """How weights and optimiser are kept.

    Attributes:
        dtype: of the model, ``float32`` or ``bfloat16``.
        zero: the ZeRO stage; 0 is plain PyTorch, where every process has all.
        processes: GPUs that share out what the stage shares.
        offload: whether the optimiser's state and the weights are in the machine's own memory.
        live_elements: of ZeRO 3, the most weights that are gathered at once.
    """

    dtype: str
    zero: int
    processes: int
    offload: bool = False
    live_elements: int = 0

    @classmethod
    def of(cls, dtype: str, deepspeed: Deepspeed, processes: int) -> Setting:
        """The setting of a run's config."""
        zero = (deepspeed.config or {}).get("zero_optimization", {})
        return cls(
            dtype=dtype,
            zero=zero.get("stage", 0),
            processes=processes,
            offload="offload_param" in zero,
            live_elements=zero.get("stage3_max_live_parameters", 0),
        )


def state_bytes(
    parameters: int, trained: int, adapters: bool, optimizer: str, setting: Setting
) -> dict[str, int]:
    """Weights, gradients, master weights and optimiser state on each GPU.

    ``parameters`` are all weights of the model and ``trained`` those among them that are trained, or, with
    ``adapters``, float32 weights beside them.  Plain PyTorch adds up gradients in float32, on the master
    weights where the model has fewer bits.  DeepSpeed keeps float32 masters in any case, and at an update
    the gradients in the model's type and in float32.
    """
    width, shared = WIDTH[setting.dtype], setting.processes
    extra = 4 * trained if adapters else 0
    if setting.zero == 0:
        halved = setting.dtype != "float32" and not adapters
        return {
            "weights": width * parameters + extra,
            "gradients": 4 * trained,
            "master weights": 4 * trained if halved else 0,
            "optimiser state": STATE[optimizer] * trained,
        }
    gradient = 4 if adapters else width
    states = {
        "weights": (width * parameters + extra) // (shared if setting.zero == 3 else 1),
        "gradients": gradient * trained // (shared if setting.zero >= 2 else 1) + 4 * trained // shared,
        "master weights": 4 * trained // shared,
        "optimiser state": STATE[optimizer] * trained // shared,
    }
    if setting.zero == 3:
        states["gathered weights"] = width * min(parameters, setting.live_elements)
    if setting.offload:
        return {"gradients": states["gradients"], "gathered weights": states["gathered weights"]}
    return states


def block_bytes(shape: Shape, width: int, everything: bool) -> int:
    """What one block keeps of one token for the backward pass, in bytes.

    In the widths h of the residual stream and f of the MLP: the inputs of two norms in float32 (8 h
    bytes); in the model's type queries, keys, values and the attention's output (4 h, keys and values
    repeated for every head), and of the MLP gate, activation, the other factor and their product (4 f).
    Where ``everything`` is trained (or has an adapter), also what a weight's own gradient takes: the
    outputs of the norms before and after their weight (4 h).  The attention mask of a padded batch, one
    number for each two tokens, is left out.
    """
    return 8 * shape.hidden + width * ((8 if everything else 4) * shape.hidden + 4 * shape.inner)


def activation_bytes(shape: Shape, tokens: int, dtype: str, *, everything: bool, checkpointing: bool) -> int:
    """Activations of so many tokens: of every block, or of one and the inputs of all."""
    width = WIDTH[dtype]
    block = block_bytes(shape, width, everything)
    if checkpointing:
        return tokens * (shape.blocks * width * shape.hidden + block)
    return tokens * shape.blocks * block


def logit_bytes(shape: Shape, tokens: int, *, shared: bool) -> int:
    """Logits of so many tokens with all that becomes of them, if every token is a response's.

    With ``shared`` prompts they exist for a chunk of tokens at once.
    """
    logits = shape.vocabulary * tokens
    return LOGIT * (min(logits, LOGITS) if shared else logits)


def training_memory(
    shape: Shape,
    trained: int,
    tokens: int,
    optimisation: Optimisation,
    setting: Setting,
    *,
    adapters: bool = False,
    live_reference: bool = False,
    shared: bool = False,
) -> Mapping[str, int]:
    """Bytes on each GPU by component; ``tokens`` are those of a micro-batch, whose prompts may be shared."""
    memory = state_bytes(shape.parameters, trained, adapters, optimisation.optimizer, setting)
    if live_reference and not adapters:
        memory["reference weights"] = WIDTH[setting.dtype] * trained
    memory["activations"] = activation_bytes(
        shape,
        tokens,
        setting.dtype,
        everything=adapters or trained == shape.parameters,
        checkpointing=optimisation.gradient_checkpointing,
    )
    memory["logits"] = logit_bytes(shape, tokens, shared=shared)
    return {name: size for name, size in memory.items() if size}
