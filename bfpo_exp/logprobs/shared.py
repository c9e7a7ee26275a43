"""The fast path: every prompt once, nothing padded, logits of response tokens alone.

One packed row holds several prompts, each with its responses (a pair has two):

    tokens     | prompt 1 . . . | y_w 1 . . | y_l 1 . | prompt 2 . . | y_w 2 . . . | y_l 2 . . |
    positions    0 1 ... p-1      p ...       p ...     0 1 ... q-1    q ...         q ...
    segments   |------------------------- |--------- |----------------------------|-----------|
    sees         what is before it in       prompt 1   as for the first pair
                 its segment                and itself
    predicts                    *  * * *      * * *               *  * * * *         * * * *

A segment is a prompt with its first response, or another response to the same prompt.  The last token
of a prompt (*) predicts the first one of each of its responses; a response's last token predicts
nothing and is left out of the row.  The language-model head sees the places marked * and no others.

The log-probs are those of `padded`, to rounding; the computation is smaller by the padding, by the
prompt of every response but the first, and by the logits of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bfpo_exp.logprobs.attention import Segments, shared_attention
from bfpo_exp.logprobs.head import head_left_out, head_replaced, token_logps

Tokens = Sequence[int]


@dataclass(frozen=True)
class SharedRow:
    """One packed row of T tokens with R response tokens in all, of n responses.

    Attributes:
        input_ids: int64 of shape (1, T).
        position_ids: int64 of shape (1, T); each token's place after its own prompt.
        segments: who sees whom.
        predicting: int64 (R,), the places in the row whose logits predict response tokens.
        targets: int64 (R,), these tokens, response after response.
        response_mask: bool (n, longest response), true for each token of a response; R in all.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    predicting: Tensor
    targets: Tensor
    response_mask: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Tokens],
        responses: Sequence[Sequence[Tokens]],
        device: torch.device | str = "cpu",
    ) -> SharedRow:
        """Prompts of at least one token, each with its responses of at least one."""
        ids: list[int] = []
        positions: list[int] = []
        predicting: list[int] = []
        targets: list[int] = []
        spans, of_prompts = [], []
        for prompt, several in zip(prompts, responses, strict=True):
            start, end = len(ids), len(ids) + len(prompt)
            ids += prompt
            positions += range(len(prompt))
            for number, response in enumerate(several):
                if not len(response):
                    raise ValueError("a response without tokens has no log-prob")
                own = len(ids)
                ids += response[:-1]
                positions += range(len(prompt), len(prompt) + len(response) - 1)
                predicting += [end - 1, *range(own, len(ids))]
                targets += response
                if number == 0:
                    spans.append((start, len(ids)))
                    of_prompts.append((start, start))
                elif own < len(ids):
                    spans.append((own, len(ids)))
                    of_prompts.append((start, end))
        lengths = torch.tensor([len(response) for several in responses for response in several])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        row = torch.tensor([ids, positions])
        heads = torch.tensor([predicting, targets])
        row, heads, mask = (tensor.to(device, non_blocking=True) for tensor in (row, heads, mask))
        return cls(row[:1], row[1:], Segments(tuple(spans), tuple(of_prompts)), heads[0], heads[1], mask)


def response_logps(model: nn.Module, row: SharedRow) -> tuple[Tensor, Tensor]:
    """Summed log-prob (float32, nats) and token count (int64) of each response, both of shape (n,).

    The model is of one of the families `paths.KNOWN`, or peft's around one.  A backward pass that computes
    again (gradient checkpointing) needs the model inside `attention.shared_attention`.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def logps(hidden: Tensor) -> Tensor:
        weight = head.weight
        assert isinstance(weight, Tensor)
        return token_logps(hidden[0], weight, row.targets)[None, :, None]

    with shared_attention(model), head_replaced(model, logps):
        found = _of_predicting(model, row).view(-1)
    mask = row.response_mask
    sums = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found).sum(-1)
    return sums, mask.sum(-1)


def states(model: nn.Module, row: SharedRow) -> Tensor:
    """What the head is shown to predict each response token, (R, width), in the order of ``targets``.

    Of gradient checkpointing the same holds as for `response_logps`.
    """
    with shared_attention(model), head_left_out(model):
        return _of_predicting(model, row)[0]


def _of_predicting(model: nn.Module, row: SharedRow) -> Tensor:
    """What the model's head, or what stands for it, gives at the predicting places, (1, R, ...)."""
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        logits_to_keep=row.predicting,
        segments=row.segments,
        use_cache=False,
    ).logits
