"""Sequence classifiers as judges of text: the one loader of rankers and of reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bfpo_exp.config.data import Format
from bfpo_exp.config.rewards import Head, Heads
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.records import Prompt
from bfpo_exp.data.sources import files_digest
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.rewards.scorer import REWARDS, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BATCH = 16  # sequences a forward pass
MAX_LENGTH = 4096  # tokens, where the model itself allows more


@dataclass(frozen=True)
class Classifier:
    """A classifier with the chat format of its own tokenizer, which reads texts and no one else's ids."""

    model: PreTrainedModel
    chat: ChatFormat

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """All outputs for a response to each of n prompts, float64 (n, outputs); batched by length."""
        result = np.empty((len(prompts), len(output_names(self.model.config))))
        if not prompts:
            return result
        encoded = self.chat.encode_batch(prompts, [[response] for response in responses])
        sequences = [tokens.prompt_ids + tokens.response_ids for (tokens,) in encoded]
        pad = self.model.config.pad_token_id
        batch = 1 if pad is None else BATCH  # the score is read at the last token that is no padding
        by_length = np.argsort([len(s) for s in sequences], kind="stable")
        for start in range(0, len(sequences), batch):
            rows = by_length[start : start + batch]
            ids, mask = padded([sequences[row] for row in rows], pad or 0, self.model.device)
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            result[rows] = logits.double().cpu().numpy()
        return result


def padded(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and the mask of what is no padding; int64 (n, longest)."""
    ids = torch.full((len(sequences), max(map(len, sequences))), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def load_classifier(model: str, key: str, format: Format | None = None) -> Classifier:
    """The classifier in a folder, or of a pinned hub id, in evaluation mode on this process's device.

    ``key`` is the setting that names it, for errors.  ``format`` limits the length of texts; None: by what
    the model knows.  No code of the model's repository is run and no pickled weights are read.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = classifier_config(model, key)
    name, revision = split_revision(model, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(model, key, error) from None
    classifier.config.pad_token_id = tokenizer.pad_token_id
    known = getattr(config, "max_position_embeddings", MAX_LENGTH)
    limit = min(known, tokenizer.model_max_length, MAX_LENGTH)
    own = Format(
        template=None, system=None, max_length=limit, max_prompt_length=limit // 2, close_truncated=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Classifier(classifier.eval().to(device), ChatFormat(tokenizer, format or own))


def classifier_config(model: str, key: str) -> PreTrainedConfig:
    """The classifier's config, without its weights; a `UserError` for what is no sequence classifier.

    A model of another class would be loaded all the same, with an output layer of random weights.
    """
    from transformers import AutoConfig

    name, revision = split_revision(model, key)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(model, key, error) from None
    classes = config.architectures or ["model of no known class"]
    if not classes[0].endswith("ForSequenceClassification"):
        raise UserError(
            f"{key}={model} is a {classes[0]}, and code of a model's own is not run here; give a sequence "
            "classifier of transformers (docs/rewards.md says how to make one of it)"
        )
    return config


def output_names(config: PreTrainedConfig) -> list[str]:
    """The outputs of a classifier, by number."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def output_number(config: PreTrainedConfig, output: int | str, key: str) -> int:
    """The number of an output that is given by number or name; a `UserError` where there is none."""
    names = output_names(config)
    if isinstance(output, str):
        if output not in names:
            raise unknown(key, output, names)
        return names.index(output)
    if output >= len(names):
        raise UserError(
            f"{key}={output} is not allowed: {config.name_or_path} has {len(names)} outputs, counted from 0 "
            f"({', '.join(names)})"
        )
    return output


def classifier_scorer(classifier: Classifier, heads: Heads) -> Scorer:
    """Rewards by the classifier's outputs."""
    config = classifier.model.config
    numbers = {
        name: output_number(config, getattr(heads, name).output, f"reward.heads.{name}.output")
        for name in REWARDS
    }

    def scores(prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, np.ndarray]:
        logits = classifier.logits(prompts, responses)
        return {name: rewarded(logits[:, number], getattr(heads, name)) for name, number in numbers.items()}

    return scores


def rewarded(logits: np.ndarray, head: Head) -> np.ndarray:
    """squash(scale * (logit - centre)), float64 (n,).

    >>> head = Head(output=0, centre=1.0, scale=2.0, squash="sigmoid")
    >>> rewarded(np.array([1.0, 1.5]), head).round(4).tolist()
    [0.5, 0.7311]
    """
    values = head.scale * (logits - head.centre)
    return values if head.squash == "none" else np.exp(-np.logaddexp(0.0, -values))


def split_revision(model: str, key: str) -> tuple[str, str | None]:
    """Folder or hub id, and the commit that a hub id is pinned to: ``name@commit``.

    >>> split_revision("org/name@0123abc", "reward.model")
    ('org/name', '0123abc')
    """
    if Path(model).is_dir():
        return model, None
    name, _, revision = model.partition("@")
    if not revision:
        raise UserError(
            f"{key}={model} is no folder, and as a hub id it is not pinned; write {name}@<commit>"
        )
    return name, revision


def classifier_fingerprint(model: str) -> str:
    """What identifies a classifier: the content of a folder's files, or the pinned hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return files_digest([*sorted(folder.glob("*.json")), *sorted(folder.glob("*.safetensors"))])


def _not_loaded(model: str, key: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{key}={model} cannot be loaded: {reason}")
