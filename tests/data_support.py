"""What the tests of the data have in common: configs, files, tokenizers, the real rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bfpo_exp.config.data import Data, Format, PairSource, SftSource

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"
PKU = REAL / "pku_saferlhf" / "pairs.jsonl.gz"
ULTRAFEEDBACK = REAL / "ultrafeedback" / "train_prefs.jsonl.gz"
HH = REAL / "hh_rlhf" / "harmless_base_test.jsonl.gz"
needs_real_data = pytest.mark.skipif(not PKU.is_file(), reason=f"the real rows are not at {REAL}")

ROWS: dict[str, Any] = {
    "hub": None,
    "revision": None,
    "split": "train",
    "size": None,
    "columns": {},
    "options": {},
}
NO_RANKER: dict[str, Any] = {"kind": "none", "columns": None, "model": None, "output": 0}
FORMAT: dict[str, Any] = {
    "template": None,
    "system": "",
    "max_length": 1024,
    "max_prompt_length": 512,
    "close_truncated": True,
}


@pytest.fixture(autouse=True)
def runs_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that a test writes goes to its own folder."""
    root = tmp_path / "runs"
    monkeypatch.setenv("BFPO_EXP_HOME", str(root))
    return root


def pair_source(reader: str, *files: Path | str, **changes: Any) -> PairSource:
    values = {**ROWS, "reader": reader, "files": [str(f) for f in files] or None}
    return PairSource(**{**values, "stream": "safety", "assume_safe": False, **changes})


def sft_source(reader: str, *files: Path | str, **changes: Any) -> SftSource:
    values = {**ROWS, "reader": reader, "files": [str(f) for f in files] or None}
    return SftSource(**{**values, "take": "conversation", **changes})


def data_of(pairs: dict[str, PairSource] | None = None, **changes: Any) -> Data:
    """A mix of these sources, on the streams that they feed."""
    pairs = pairs or {}
    values: dict[str, Any] = {
        "name": "test",
        "seed": 0,
        "streams": sorted({source.stream for source in pairs.values()}) or ["safety"],
        "batches": "shuffle",
        "heldout": 0.0,
        "pairs": pairs,
        "sft": {},
        "ranker": NO_RANKER,
        "format": FORMAT,
    }
    # Without validation where there are no pairs: demonstrations are loaded from such a mix.
    if not pairs:
        base = Data.model_validate({**values, "pairs": {"unused": pair_source("world", size=1)}})
        return base.model_copy(update={"pairs": {}, **changes})
    return Data.model_validate({**values, **changes})


def chat_format(**changes: Any) -> Format:
    return Format(**{**FORMAT, **changes})


def write_rows(path: Path, rows: list[Any]) -> Path:
    """The rows as JSON lines; text is written as it is."""
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def read_real(path: Path) -> list[dict[str, Any]]:
    """The rows of a real file by the standard library alone."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def pku_row(prompt: str = "p", first: str = "a", second: str = "b", **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": prompt,
        "response_0": first,
        "response_1": second,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": None,
        "safer_response_id": 0,
    }
    return {**row, **changes}


def bpe_tokenizer(
    bos: bool = True, add_bos: bool = False, special: tuple[str, ...] = (), eos: bool = True
) -> Any:
    """A byte-level BPE tokenizer trained on two sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["how do I open the door?", "take the key and open the door."], trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = (
        {"pad_token": "<pad>"}
        | ({"bos_token": "<s>"} if bos else {})
        | ({"eos_token": "</s>"} if eos else {})
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
        **names,
    )
