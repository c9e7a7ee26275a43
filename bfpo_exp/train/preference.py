"""The objective of the preference stage: a pairwise loss on the policy's and reference's log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.config.schema import Config
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.data.pairs import TokenisedPairs, order_signs
from bfpo_exp.distributed import sum_
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import Rows, chosen_path
from bfpo_exp.logprobs.reference import PairLogps
from bfpo_exp.losses import pairwise_loss
from bfpo_exp.train.live_reference import Reference
from bfpo_exp.train.loop import Objective, Sums
from bfpo_exp.train.parts import parts
from bfpo_exp.train.statistics import pair_statistics

MOST_PAIRS = 8  # that an error names


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch of n pairs, in the order that the loss trains on.

    Attributes:
        indices: row numbers of the pairs, int64 (n,).
        step: the optimisation step that it is a part of, from 0.
        rows: their prompts, each with its y_w and its y_l.
        given: what the loss takes beside the policy's log-probs, float32 (n,) each: the reference's
            log-probs ``ref_w``, ``ref_l``, reduced as the loss asks; safety labels ``safe_w``,
            ``safe_l``, NaN where there is none; and the first policy's rewards ``margin_w``,
            ``margin_l`` where the loss needs them.  Of a live reference, there are only the labels and
            the first policy's log-probs ``first_w``, ``first_l``, reduced as its own loss asks.
    """

    indices: np.ndarray
    step: int
    rows: Rows
    given: dict[str, Tensor]


class PreferenceObjective(Objective[PairBatch]):
    """Mean loss over a step's pairs.

    ``reference`` holds the reference's log-probs of all pairs, or computes those of a micro-batch as it
    is needed (``train.reference=live``).  ``first`` holds the log-probs of the policy of ``loss.first``
    for a loss that needs its rewards, beta_1 (log pi_1 - log ref).  Raises `UserError` where log-probs
    are not finite.
    """

    def __init__(
        self,
        pairs: TokenisedPairs,
        reference: PairLogps | Reference,
        config: Config,
        device: torch.device | str,
        first: PairLogps | None = None,
    ) -> None:
        self.pairs, self.config, self.device = pairs, config, device
        self.spec = pairwise_loss(config.loss.name)
        assert config.loss.order is not None
        self.first_is_w = order_signs(pairs, config.loss.order) > 0
        trained = self._trained()
        self.rows = int(trained.sum())
        mode = config.data.batches if len(config.trained_streams) > 1 else "shuffle"
        self.batches = BatchOrder(config.seed, pairs.stream, config.train.batch, mode, trained)
        self.path = chosen_path(config.model, config.data.format.max_length)
        self.live = None if isinstance(reference, PairLogps) else reference
        self.columns = {"safe": (pairs.safe_w, pairs.safe_l)}
        if isinstance(reference, PairLogps):
            self.columns["ref"] = _reduced(reference, config.loss.logps)
        if self.spec.needs_margin:
            assert first is not None
            assert config.loss.first is not None
            if isinstance(reference, PairLogps):
                self.columns["margin"] = _rewards(first, reference, config)
            else:
                self.columns["first"] = _reduced(first, config.loss.first.logps)
        for name in self.columns.keys() - {"safe"}:
            bad = ~np.isfinite(np.stack(self.columns[name])).all(0)
            if bad.any():
                raise UserError(f"the log-probs of the {name} model are not finite for {self._named(bad)}")
        self._suspects: list[tuple[PairBatch, Tensor]] = []
        self._means: tuple[int, dict[str, Tensor]] = (-1, {})  # of a step

    def _trained(self) -> np.ndarray:
        """The pairs that enter batches, bool (pairs,): all but those that the loss drops."""
        if not self.spec.drops_zero_labels:
            return np.ones(len(self.pairs), bool)
        every = {name: torch.from_numpy(getattr(self.pairs, name)) for name in ("safe_w", "safe_l")}
        return self.spec.wanted_sign(every, self.config.loss.hyperparameters).numpy() != 0

    @property
    def pairs_per_step(self) -> int:
        """The batch, of all processes."""
        return self.batches.batch

    def tokens(self, step: int) -> int:
        """Tokens of a step's batch: of each pair, its prompt and both responses."""
        return sum(sum(self.pairs.lengths[i]) for i in self.batches[step])

    def microbatches(self, step: int) -> Iterator[PairBatch]:
        """This process's pairs of a step, in as many micro-batches as every other process has."""
        for part in parts(self.batches[step], self.pairs.lengths, self.path, self.config.train):
            yield self.view(part, step)

    def view(self, indices: np.ndarray, step: int = 0) -> PairBatch:
        """These pairs as the loss trains on them: swapped where its order says so."""
        pairs, keep = self.pairs, self.first_is_w[indices]
        given = {}
        for name, (of_w, of_l) in self.columns.items():
            first = np.where(keep, of_w[indices], of_l[indices])
            second = np.where(keep, of_l[indices], of_w[indices])
            given[f"{name}_w"] = torch.from_numpy(first).to(self.device)
            given[f"{name}_l"] = torch.from_numpy(second).to(self.device)
        prompts = [pairs.prompt_ids[i] for i in indices]
        responses = [
            (pairs.w_ids[i], pairs.l_ids[i]) if k else (pairs.l_ids[i], pairs.w_ids[i])
            for i, k in zip(indices, keep, strict=True)
        ]
        rows = self.path.rows(prompts, responses, self.device)
        return PairBatch(indices, step, rows, given)

    def loss(self, model: torch.nn.Module, batch: PairBatch) -> tuple[Tensor, Sums]:
        """The pairs' summed loss over the step's number of pairs."""
        loss = self.config.loss
        given = self._given(batch)  # before the policy's pass, whose activations are kept
        tensors = self._log_probs(model, batch) | given
        self._watch(batch, tensors["policy_w"] + tensors["policy_l"])
        seen = self._seen(tensors)
        losses = self.spec({**seen, **self._step_means(model, batch)}, loss.hyperparameters)
        with torch.no_grad():
            tensors = {name: values.detach() for name, values in tensors.items()}
            at_reference = {**seen, "policy_w": tensors["ref_w"], "policy_l": tensors["ref_l"]}
            sums = pair_statistics(self.spec, loss.hyperparameters, tensors, losses.detach())
            at_reference_losses = self.spec(at_reference, loss.hyperparameters)
            sums.means["loss_at_reference"] = (
                at_reference_losses.sum(),
                at_reference_losses.new_tensor(len(losses)),
            )
        return losses.sum() / self.config.train.batch, sums

    def nonfinite(self) -> str | None:
        """Which pairs' log-probs, since this was last asked, were not finite first; None if none."""
        suspects, self._suspects = self._suspects, []
        for batch, bad in suspects:
            if bad.any():
                return self._told(batch, bad)
        return None

    def _log_probs(self, model: torch.nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        policy_w, policy_l = _of_rows(*self.path.logps(model, batch.rows), self.config.loss.logps)
        return {"policy_w": policy_w, "policy_l": policy_l}

    def _given(self, batch: PairBatch) -> dict[str, Tensor]:
        """What the loss takes beside the policy's log-probs, a live reference's computed now."""
        if self.live is None:
            return batch.given
        given, first = dict(batch.given), self.config.loss.first
        sums, counts = self.live.logps(batch.rows)
        given["ref_w"], given["ref_l"] = _of_rows(sums, counts, self.config.loss.logps)
        if self.spec.needs_margin:
            assert first is not None
            references = _of_rows(sums, counts, first.logps)
            for response, of_reference in zip("wl", references, strict=True):
                ratio = given.pop(f"first_{response}") - of_reference
                given[f"margin_{response}"] = first.hyperparameters["beta"] * ratio
        return given

    def _seen(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """What the loss is shown of the tensors: no reference where it is to be free of one."""
        hidden = dict.fromkeys(("ref_w", "ref_l")) if self.config.loss.reference_free else {}
        return {**tensors, **hidden}

    def _step_means(self, model: torch.nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """Arguments of the loss that are means over all pairs of the step.

        A micro-batch that is the whole step needs no more than its own log-probs, which the loss
        takes the mean of itself; else a pass without gradients goes over the step first.
        """
        if not self.spec.step_means or len(batch.indices) == self.config.train.batch:
            return {}
        if self._means[0] != batch.step:
            totals: dict[str, Tensor] = {}
            with torch.no_grad():
                for part in self.microbatches(batch.step):
                    tensors = self._log_probs(model, part) | self._given(part)
                    for name, values in self.spec.for_step_means(self._seen(tensors)).items():
                        totals[name] = totals.get(name, 0) + values.sum()
            count = self.config.train.batch
            self._means = (batch.step, {name: sum_(total) / count for name, total in totals.items()})
        return self._means[1]

    def _watch(self, batch: PairBatch, logps: Tensor) -> None:
        """Refuse log-probs that are not finite: at once on the CPU, on a GPU when it is next read."""
        bad = ~torch.isfinite(logps.detach())
        if bad.device.type != "cpu":
            self._suspects.append((batch, bad))
        elif bad.any():
            raise UserError(self._told(batch, bad))

    def _told(self, batch: PairBatch, bad: Tensor) -> str:
        mask = np.zeros(len(self.pairs), bool)
        mask[batch.indices[bad.cpu().numpy()]] = True
        return (
            f"the policy's log-probs are not finite at step {batch.step + 1} for {self._named(mask)}: lower "
            f"train.lr ({self.config.train.lr}), or set train.clip ({self.config.train.clip})"
        )

    def _named(self, mask: np.ndarray) -> str:
        rows = np.flatnonzero(mask)
        more = f" and {len(rows) - MOST_PAIRS} more" if len(rows) > MOST_PAIRS else ""
        streams = ", ".join(self.config.trained_streams)
        first = ", ".join(map(str, rows[:MOST_PAIRS]))
        return f"training pairs {first}{more} (rows from 0 of the streams {streams})"


def _of_rows(sums: Tensor, counts: Tensor, reduction: Literal["sum", "mean"]) -> tuple[Tensor, Tensor]:
    """Log-probs of n pairs' responses, (2 n,), as those of y_w and y_l, summed or per token; (n,) each."""
    first, second = (sums / counts if reduction == "mean" else sums).view(-1, 2).unbind(1)
    return first, second


def _reduced(logps: PairLogps, reduction: Literal["sum", "mean"]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of both responses as sums, or as means over their tokens; float32 (pairs,)."""
    if reduction == "sum":
        return logps.w_sum, logps.l_sum
    return (logps.w_sum / logps.w_count).astype(np.float32), (logps.l_sum / logps.l_count).astype(np.float32)


def _rewards(first: PairLogps, reference: PairLogps, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The first policy's implicit rewards of both responses, beta_1 (log pi_1 - log ref)."""
    loss = config.loss.first
    assert loss is not None
    of_first, of_reference = _reduced(first, loss.logps), _reduced(reference, loss.logps)
    beta = np.float32(loss.hyperparameters["beta"])
    return beta * (of_first[0] - of_reference[0]), beta * (of_first[1] - of_reference[1])
