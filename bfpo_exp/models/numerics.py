"""Which number type and which attention a model runs with, chosen by what this machine can do."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from bfpo_exp.config.schema import Model
from bfpo_exp.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HALF = ("bfloat16", "float16")  # what FlashAttention computes in
AMPERE = (8, 0)  # the first compute capability that FlashAttention 2 runs on

Attention = Literal["flash_attention_2", "sdpa", "eager"]


@dataclass(frozen=True)
class Hardware:
    """What of this machine decides.

    Attributes:
        capability: of the CUDA device that is used, (major, minor); None without one.
        bf16: whether that device computes in bfloat16 itself; true without one, as CPUs can.
        flash_attn: None if the package flash_attn can be imported, else why not, in a few words.
    """

    capability: tuple[int, int] | None
    bf16: bool
    flash_attn: str | None


@functools.cache
def this_hardware() -> Hardware:
    """The machine that this process runs on; flash_attn is only imported where there is CUDA."""
    if not torch.cuda.is_available():
        return Hardware(None, bf16=True, flash_attn="not looked for")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Hardware(torch.cuda.get_device_capability(), bf16, _no_flash_attn())


def _no_flash_attn() -> str | None:
    """Why flash_attn cannot be imported; None if it can.

    A package built for another torch raises errors of many kinds, and one installed without its
    kernels lacks the function.
    """
    try:
        importlib.import_module("flash_attn").flash_attn_func  # noqa: B018
    except ModuleNotFoundError:
        return "flash_attn is not installed"
    except Exception as error:
        return f"flash_attn cannot be imported ({type(error).__name__})"
    return None


def no_flash_attention(dtype: str, hardware: Hardware) -> str | None:
    """Why FlashAttention 2 cannot be used; None if it can.

    >>> no_flash_attention("bfloat16", Hardware((9, 0), bf16=True, flash_attn=None)) is None
    True
    >>> no_flash_attention("float32", Hardware((9, 0), bf16=True, flash_attn=None))
    'model.dtype is float32, and it computes in bfloat16 or float16'
    """
    if hardware.capability is None:
        return "there is no CUDA device"
    if hardware.capability < AMPERE:
        return f"the CUDA device has compute capability {_dotted(hardware.capability)}, and it needs 8.0"
    if dtype not in HALF:
        return f"model.dtype is {dtype}, and it computes in {' or '.join(HALF)}"
    return hardware.flash_attn


def chosen_attention(model: Model, hardware: Hardware) -> tuple[Attention, str]:
    """The attention of a model, and why in words; a `UserError` for FlashAttention where it cannot work."""
    if model.attention in ("sdpa", "eager"):
        return model.attention, "model.attention asks for it"
    obstacle = no_flash_attention(model.dtype, hardware)
    if obstacle is None:
        return "flash_attention_2", "there is CUDA, flash_attn and a half-precision dtype"
    if model.attention == "flash_attention_2":
        raise UserError(
            f"model.attention=flash_attention_2 cannot work here: {obstacle}; use auto, sdpa or eager"
        )
    return "sdpa", f"no flash_attention_2: {obstacle}"


def resolved_attention(model: Model) -> Attention:
    """The attention that ``model.attention`` means on this machine: what keys of results hold.

    Raises `UserError` as `chosen_attention` does.
    """
    return chosen_attention(model, this_hardware())[0]


def check_numerics(model: Model) -> None:
    """A `UserError` for a dtype or an attention that this machine does not have."""
    hardware = this_hardware()
    if model.dtype == "bfloat16" and not hardware.bf16:
        capability = _dotted(hardware.capability) if hardware.capability else "unknown"
        raise UserError(
            "model.dtype=bfloat16 is not computed by this CUDA device (compute capability "
            f"{capability}; 8.0 or later does); use model.dtype=float32"
        )
    chosen_attention(model, hardware)


def tell_numerics(model: Model) -> None:
    """Say what ``auto`` came to, and that bfloat16 is slow on a CPU: once a process, as weights are made."""
    hardware = this_hardware()
    if model.attention == "auto":
        name, why = chosen_attention(model, hardware)
        say(f"attention: {name} ({why})")
    if model.dtype == "bfloat16" and hardware.capability is None:
        say("model.dtype=bfloat16 on a CPU works but is slow; float32 is the faster one on most")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def say(text: str) -> None:
    """Say it once, however many models are loaded."""
    log.info(text)
