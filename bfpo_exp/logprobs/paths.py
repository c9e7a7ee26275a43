"""The two ways to the log-probs of responses, and which of them a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Model
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs import padded, shared
from bfpo_exp.logprobs.attention import shared_attention
from bfpo_exp.models.numerics import AMPERE, HALF, Hardware, say, this_hardware
from bfpo_exp.models.policy import architecture, declared_architecture

Tokens = Sequence[int]
Lengths = Sequence[int]
Name = Literal["shared", "padded"]
Rows = padded.PaddedRows | shared.SharedRow
# Families of transformers whose log-probs were seen to be those of the padded path, gradients too.
KNOWN = (
    "gemma", "gemma3_text", "gpt2", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3",
    "opt", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
VARYING_ROPE = ("dynamic", "longrope")  # whose angles depend on what else is in the row


@dataclass(frozen=True)
class LogpsPath:
    """A way to log-probs.

    Attributes:
        rows: prompts, the responses to each, and a device: what one forward pass takes.
        logps: a model and such rows: each response's summed log-prob (float32, nats) and token count
            (int64), prompt after prompt, both of shape (responses,).
        states: a model and such rows: what the head is shown to predict each response token, (R, width).
        positions: of prompts with as many responses each, (prompt, response, ...) in tokens: the places of
            such rows.
        during: what a model is to be inside of while its backward passes compute again.
    """

    name: Name
    rows: Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]], torch.device | str], Any]
    logps: Callable[[Any, Any], tuple[Tensor, Tensor]]
    states: Callable[[Any, Any], Tensor]
    positions: Callable[[Sequence[Lengths]], int]
    during: Callable[[nn.Module], AbstractContextManager[None]]


def _padded_rows(
    prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]], device: torch.device | str
) -> padded.PaddedRows:
    repeated = [prompt for prompt, several in zip(prompts, responses, strict=True) for _ in several]
    return padded.PaddedRows.of(repeated, [response for several in responses for response in several], device)


def _padded_positions(pairs: Sequence[Lengths]) -> int:
    responses = len(pairs[0]) - 1
    return responses * len(pairs) * max(prompt + max(several) for prompt, *several in pairs)


def _shared_positions(pairs: Sequence[Lengths]) -> int:
    return sum(prompt + sum(several) - len(several) for prompt, *several in pairs)


PADDED = LogpsPath(
    "padded",
    _padded_rows,
    padded.response_logps,
    padded.states,
    _padded_positions,
    lambda model: nullcontext(),
)
SHARED = LogpsPath(
    "shared", shared.SharedRow.of, shared.response_logps, shared.states, _shared_positions, shared_attention
)


def passes(
    pairs: Sequence[Lengths], path: LogpsPath, most_pairs: int, most_positions: float
) -> list[tuple[int, int]]:
    """Consecutive pairs (or prompts with as many responses) cut into forward passes: (start, end) of each.

    None has more than ``most_pairs`` of them, nor, if it has several, more than ``most_positions`` places.

    >>> passes([(1, 3, 4), (1, 2, 5), (1, 9, 9), (2, 2, 2)], SHARED, 4, 14)
    [(0, 2), (2, 3), (3, 4)]
    >>> passes([(1, 3, 4), (1, 2, 5), (1, 9, 9), (2, 2, 2)], PADDED, 2, 44)
    [(0, 2), (2, 4)]
    """
    found, start = [], 0
    for end in range(1, len(pairs)):
        if end - start == most_pairs or path.positions(pairs[start : end + 1]) > most_positions:
            found.append((start, end))
            start = end
    return [*found, (start, len(pairs))] if pairs else []


def no_shared_prompts(model: Model, longest: int, hardware: Hardware) -> str | None:
    """Why a model cannot share prompts between responses; None if it can.

    ``longest`` is the most tokens that a prompt has together with a response.
    """
    shape: Any = declared_architecture(model) or architecture(model)
    rope = (getattr(shape, "rope_parameters", None) or {}).get("rope_type")
    if shape.model_type not in KNOWN or model.trust_remote_code:
        return f"models of type {shape.model_type} are not known to it"
    if rope in VARYING_ROPE:
        return f"rotary positions of type {rope} depend on what else is in a row"
    if model.attention == "eager":
        return "model.attention=eager asks for plain attention"
    window = getattr(shape, "sliding_window", None)
    if hardware.capability is None:
        if window is not None and window < longest:
            return f"{longest} tokens exceed the sliding window of {window}, which is for GPUs only"
        return None
    if hardware.capability < AMPERE or not torch.backends.cuda.is_flash_attention_available():
        return "the CUDA device has no FlashAttention"
    if model.dtype not in HALF:
        return f"model.dtype is {model.dtype}, and on a GPU it computes in {' or '.join(HALF)}"
    return None


def chosen_path(model: Model, longest: int) -> LogpsPath:
    """The path of a model on this machine, as ``model.forward`` asks; said once where it says ``auto``.

    Raises `UserError` where it asks for what the model cannot do.
    """
    if model.forward == "padded":
        return PADDED
    obstacle = no_shared_prompts(model, longest, this_hardware())
    if obstacle is None:
        return SHARED
    if model.forward == "shared":
        raise UserError(f"model.forward=shared cannot work here: {obstacle}; use auto or padded")
    say(f"forward: padded (no shared prompts: {obstacle})")
    return PADDED
