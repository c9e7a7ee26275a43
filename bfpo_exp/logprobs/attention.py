"""Attention in one packed row, where every response sees its prompt and itself.

A row is cut into `Segments`.  The queries of a segment see the keys of the prompt that it continues, all
of them, and of itself those up to their own place.  transformers' models call `attend` once a block
inside `shared_attention`; the segments come as an argument of the model's forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

NAME = "shared_prompts"
FLASH_NAME = "shared_prompts_flash"  # by the package flash_attn
Varlen = Callable[..., Tensor]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Segments:
    """How a row of T tokens is cut.

    Attributes:
        spans: (start, end) of each segment; the first begins at 0 and each where the last one ended.
        prompts: (start, end) of the prompt that each segment continues, which lies before it; empty
            for a segment that begins with its prompt.
    """

    spans: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]

    @functools.cached_property
    def longest(self) -> int:
        """The most keys that a query may see."""
        return max(self._keys)

    @property
    def _keys(self) -> list[int]:
        return [b - a + d - c for (a, b), (c, d) in zip(self.spans, self.prompts, strict=True)]

    def varlen(self, device: torch.device) -> VarlenArguments:
        """The same for kernels that take sequences of different lengths, end to end; made once."""
        if device not in self._varlen:
            self._varlen[device] = VarlenArguments.of(self, device)
        return self._varlen[device]

    @functools.cached_property
    def _varlen(self) -> dict[torch.device, VarlenArguments]:
        return {}


@dataclass(frozen=True)
class VarlenArguments:
    """Queries are the row as it is; keys are gathered, the prompt's once more for each later segment.

    Attributes:
        keys: int64 (keys,), the places in the row of the keys of all segments.
        query_ends, key_ends: int32 (segments + 1,), where each segment's queries and keys end, after a 0.
        most_queries, most_keys: of a segment.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> VarlenArguments:
        """The arguments of these segments on a device."""
        places = [
            torch.arange(*span)
            for pair in zip(segments.prompts, segments.spans, strict=True)
            for span in pair
        ]
        ends = [0, *(end for _, end in segments.spans)]
        key_ends = [0, *accumulate(segments._keys)]
        return cls(
            torch.cat(places).to(device, non_blocking=True),
            torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True),
            torch.tensor(key_ends, dtype=torch.int32).to(device, non_blocking=True),
            max(end - start for start, end in segments.spans),
            segments.longest,
        )


@torch.compiler.disable  # segments come in varying number
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segments: Segments,
    scaling: float,
    kernel: Varlen,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: queries (1, heads, T, d), keys and values (1, kv heads, T, d).

    ``kernel`` computes on a GPU.  Returns (1, T, heads, d).  Raises `ValueError` for dropout, and for
    what else changes attention and is not known here.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if ignored.get(name) is not None]
    if dropout or unknown:
        raise ValueError(f"attention over shared prompts has no {', '.join(unknown) or 'dropout'}")
    if query.device.type == "cpu":
        if sliding_window is not None and segments.longest > sliding_window:
            raise ValueError("attention over shared prompts has no sliding window on a CPU")
        return SegmentAttention.apply(query, key, value, segments, scaling), None
    return varlen_attention(kernel, query, key, value, segments, scaling, sliding_window), None


class SegmentAttention(torch.autograd.Function):
    """Exact attention on a CPU, by PyTorch's flash kernel: twice for a segment that has its prompt elsewhere.

    The two parts of such a segment, over the prompt's keys and over its own, are put together by their
    log-sum-exps: with m = logaddexp(m_1, m_2), o = exp(m_1 - m) o_1 + exp(m_2 - m) o_2.  Backward, each
    part is given the whole's o and m, with which the kernel finds the part's share of the gradients
    (Liu et al., Ring Attention, 2023, arXiv 2310.01889, do so over devices).  Nothing is padded, masked or
    repeated, not for keys that several heads share either.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
    ) -> Tensor:
        """(1, heads, T, d) and twice (1, kv heads, T, d) to (1, T, heads, d)."""
        _, heads, length, size = query.shape
        out = query.new_empty(1, length, heads, size)
        log_sums = query.new_empty(1, heads, length, dtype=torch.float32)
        o = out.transpose(1, 2)
        for (start, end), (p, q) in zip(segments.spans, segments.prompts, strict=True):
            own = query[:, :, start:end]
            part, m = _flash(own, key[:, :, start:end], value[:, :, start:end], 0.0, True, scale=scale)
            if q > p:
                of_prompt, n = _flash(own, key[:, :, p:q], value[:, :, p:q], 0.0, False, scale=scale)
                whole = torch.logaddexp(m, n)
                part = part * (m - whole).exp_()[..., None] + of_prompt * (n - whole).exp_()[..., None]
                m = whole
            o[:, :, start:end] = part
            log_sums[:, :, start:end] = m
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values, laid out in memory as the projections made them."""
        query, key, value, out, m = ctx.saved_tensors
        g, o = gradients[0].transpose(1, 2), out.transpose(1, 2)
        d_query, d_key, d_value = (_laid_out_by_token(tensor) for tensor in (query, key, value))
        for (start, end), (p, q) in zip(ctx.segments.spans, ctx.segments.prompts, strict=True):
            own = slice(start, end)
            given = g[:, :, own], query[:, :, own]
            whole = o[:, :, own], m[:, :, own]
            dq, d_key[:, :, own], d_value[:, :, own] = _flash_backward(
                *given, key[:, :, own], value[:, :, own], *whole, 0.0, True, scale=ctx.scale
            )
            if q > p:
                more, dk, dv = _flash_backward(
                    *given, key[:, :, p:q], value[:, :, p:q], *whole, 0.0, False, scale=ctx.scale
                )
                dq = dq + more
                d_key[:, :, p:q] += dk
                d_value[:, :, p:q] += dv
            d_query[:, :, own] = dq
        return d_query, d_key, d_value, None, None


def _laid_out_by_token(like: Tensor) -> Tensor:
    """An empty tensor of shape (1, heads, T, d), whose heads of one token lie side by side."""
    _, heads, length, size = like.shape
    return like.new_empty(1, length, heads, size).transpose(1, 2)


def varlen_attention(
    kernel: Varlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """The same by one call of a kernel for sequences of different lengths, with any window.

    The kernel aligns causality at the sequences' ends, so the queries of a segment that has its prompt
    elsewhere are the last of their keys.  Its window counts the keys to the left of a query.
    """
    arguments = segments.varlen(query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    return kernel(
        q,
        k.index_select(0, arguments.keys),
        v.index_select(0, arguments.keys),
        arguments.query_ends,
        arguments.key_ends,
        arguments.most_queries,
        arguments.most_keys,
        scale=scale,
        window=-1 if sliding_window is None else sliding_window - 1,
    )[None]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, *ends_and_most: Any, scale: float, window: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, *ends_and_most, softmax_scale=scale, causal=True, window_size=(window, 0)
    )


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, *ends_and_most: Any, scale: float, window: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *ends_and_most, scale=scale, window_size=(window, 0), enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    for name, kernel in ((NAME, _torch_varlen), (FLASH_NAME, _flash_attn)):
        AttentionInterface.register(name, functools.partial(attend, kernel=kernel))


@contextmanager
def shared_attention(model: nn.Module) -> Iterator[None]:
    """A model of transformers attends in packed rows of shared prompts, and in nothing else, until the end.

    On a GPU it does so by the package flash_attn if that is the model's attention, else by PyTorch's own
    kernel.
    """
    _register()
    config: Any = getattr(model, "module", model).config  # of the model inside, if an engine is around it
    before = config._attn_implementation
    config._attn_implementation = FLASH_NAME if before in ("flash_attention_2", FLASH_NAME) else NAME
    try:
        yield
    finally:
        config._attn_implementation = before
