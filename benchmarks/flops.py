"""How many floating-point operations a preference step needs, and how fast matrix products are here.

Counted are matrix products alone, two operations a multiply-add, of what no implementation can do without:
the prompt once, each response once but for its last token (which predicts nothing), causal attention, the
output layer for response tokens only, and of the backward pass what the trained weights need.  Not counted:
embeddings, norms, activations, softmax, the optimiser, padding, and whatever is computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Trained = Literal["all", "mlp.down_proj"]
Lengths = tuple[int, int, int]  # tokens of a prompt and of its two responses


@dataclass(frozen=True)
class Products:
    """The matrix products of a Llama-like model.

    Attributes:
        attention: weights of the four projections of a block, as (inputs, outputs) each.
        mlp: those of the gate and up projections.
        down: those of the down projection.
        head: the output layer's.
        heads: width of all query heads together.
        blocks: their number.
    """

    attention: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]
    down: tuple[int, int]
    head: tuple[int, int]
    heads: int
    blocks: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Products:
        """Those of a transformers config of Llama, Mistral or Qwen 2."""
        hidden, inner = config.hidden_size, config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        query, key = config.num_attention_heads * head, config.num_key_value_heads * head
        return cls(
            attention=((hidden, query), (hidden, key), (hidden, key), (query, hidden)),
            mlp=((hidden, inner), (hidden, inner)),
            down=(inner, hidden),
            head=(hidden, config.vocab_size),
            heads=query,
            blocks=config.num_hidden_layers,
        )

    def forward(self, pair: Lengths) -> int:
        """Operations of the forward pass of a pair."""
        return self.blocks * (self._block(pair) + self._attention(pair)) + self._head(pair)

    def backward(self, pair: Lengths, trained: Trained) -> int:
        """Operations of the backward pass: for the gradients of weights, and of what lies above them.

        A product y = x W takes as many for the gradient of x, and as many for that of W.  With only
        the down projections trained, W's is left out elsewhere, and nothing goes below the first one.
        """
        if trained == "all":
            return 2 * self.forward(pair)
        down = 2 * _positions(pair) * _size(self.down)
        above = self._block(pair) + 2 * self._attention(pair) + down
        return self._head(pair) + (self.blocks - 1) * above + down

    def _block(self, pair: Lengths) -> int:
        weights = sum(map(_size, (*self.attention, *self.mlp, self.down)))
        return 2 * _positions(pair) * weights

    def _attention(self, pair: Lengths) -> int:
        """Queries times keys, and their softmax times values: each token with those up to itself."""
        prompt, *responses = pair
        seen = prompt * (prompt + 1) // 2 + sum((n - 1) * prompt + n * (n - 1) // 2 for n in responses)
        return 2 * 2 * self.heads * seen

    def _head(self, pair: Lengths) -> int:
        return 2 * sum(pair[1:]) * _size(self.head)


def _positions(pair: Lengths) -> int:
    return sum(pair) - 2


def _size(matrix: tuple[int, int]) -> int:
    return matrix[0] * matrix[1]


def matmul_rates(products: Products, batch: Iterable[Lengths], dtype: str, device: str) -> dict[str, float]:
    """Operations a second of matrix products alone: ``square``, a large one, and ``own``, the model's.

    ``own`` is a forward pass's products of a batch, each at its number of tokens, without attention.
    """
    import torch

    batch = list(batch)
    tokens, responses = sum(map(_positions, batch)), sum(sum(pair[1:]) for pair in batch)
    blocks = [(tokens, *matrix) for matrix in (*products.attention, *products.mlp, products.down)]
    own = [*products.blocks * blocks, (responses, *products.head)]
    side = 2048 if device == "cpu" else 8192
    return {
        name: _rate(shapes, getattr(torch, dtype), device)
        for name, shapes in {"square": [(side, side, side)], "own": own}.items()
    }


def _rate(shapes: list[tuple[int, int, int]], dtype: object, device: str, passes: int = 5) -> float:
    """The median over some passes through the products (rows, inputs, outputs), after one to warm up."""
    import torch

    made = {
        (rows, inner, outer): (
            torch.randn(rows, inner, device=device).to(dtype),  # type: ignore[call-overload]
            torch.randn(outer, inner, device=device).to(dtype),  # type: ignore[call-overload]
        )
        for rows, inner, outer in shapes
    }
    seconds = []
    for _ in range(1 + passes):
        started = time.perf_counter()
        for shape in shapes:
            x, weight = made[shape]
            torch.nn.functional.linear(x, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    operations = sum(2 * rows * inner * outer for rows, inner, outer in shapes)
    return operations / sorted(seconds[1:])[passes // 2]
