"""One training to measure, and the work that it is: the same on both sides."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra import compose, initialize_config_dir

from benchmarks.flops import Products, Trained
from bfpo_exp.config.check import checked
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.paths import config_dir
from bfpo_exp.stages.context import Context
from bfpo_exp.stages.preference import tokenised_stream
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile

if TYPE_CHECKING:
    from bfpo_exp.config.schema import Config

Side = Literal["ours", "trl"]
Reference = Literal["cached", "live"]
BETA, RATE, SEED = 0.1, 1e-5, 0
CONFIGS = Path(__file__).parent / "conf"


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        reference: its log-probs computed ahead (``cached``), or in each step (``live``).
        model, rows: the model's folder, and the file of the rows, `steps` batches of them.
        batch, microbatch: pairs a step, and a forward pass.
        warmup: steps before the first repetition.
        steps, repetitions: steps of a repetition, which is a pass over all rows; and their number.
        threads: of the CPU.
    """

    side: Side
    reference: Reference
    trained: Trained
    model: str
    dtype: str
    rows: str
    batch: int
    microbatch: int
    warmup: int
    steps: int
    repetitions: int
    threads: int

    @property
    def total(self) -> int:
        """All steps."""
        return self.warmup + self.steps * self.repetitions

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def config(self) -> Config:
        """The config of our side; whatever the case does not say is the command's default."""
        words = [
            f"hydra.searchpath=[file://{CONFIGS}]",
            "data=benchmark",
            f"data.pairs.rows.files=[{self.rows}]",
            "model=hf",
            f"model.path={self.model}",
            f"model.dtype={self.dtype}",
            "loss=dpo",
            f"loss.beta={BETA}",
            f"seed={SEED}",
            f"threads={self.threads}",
            f"train.trainable={'all' if self.trained == 'all' else f'[{self.trained}]'}",
            f"train.reference={self.reference}",
            f"train.steps={self.total}",
            f"train.batch={self.batch}",
            f"train.microbatch={self.microbatch}",
            f"train.lr={RATE}",
            "train.schedule=constant",
            "train.warmup=0",
            "train.checkpoint_every=null",
            "train.log_every=1",
        ]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return checked(compose("config", words))


@dataclass(frozen=True)
class Work:
    """What a case trains on, as our side sees it.

    Attributes:
        context: of our stages, in a runs root of the case's own.
        pairs: the rows' token ids.
        batches: the rows of each step, those of the shortest pairs first.
    """

    context: Context
    pairs: TokenisedPairs
    batches: list[list[int]]

    @classmethod
    def of(cls, case: Case, root: Path) -> Work:
        """The work of a case; what our side writes goes to ``root``."""
        from datasets import Dataset, load_from_disk

        context = Context(case.config(), Store(root / "store"), MetricsFile(root / "metrics.jsonl"))
        tokens = load_from_disk(str(tokenised_stream(context, "helpfulness") / "tokens"))
        assert isinstance(tokens, Dataset)
        pairs = TokenisedPairs.of([tokens])
        order = BatchOrder(SEED, pairs.stream, case.batch, "shuffle")

        def longest(row: int) -> int:
            prompt, *responses = pairs.lengths[row]
            return prompt + max(responses)

        batches = [sorted(order[step].tolist(), key=longest) for step in range(case.total)]
        return cls(context, pairs, batches)

    def of_a_step(self, case: Case) -> dict[str, float]:
        """Useful tokens (prompts once) and operations of a step, means over a pass over the rows."""
        from transformers import AutoConfig

        every = self.pairs.lengths
        products = Products.of(AutoConfig.from_pretrained(case.model))
        operations = sum(products.forward(pair) + products.backward(pair, case.trained) for pair in every)
        return {"tokens": sum(map(sum, every)) / case.steps, "operations": operations / case.steps}
