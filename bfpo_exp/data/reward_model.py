"""A local sequence classifier as judge of helpfulness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from bfpo_exp.config.schema import Format
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.errors import UserError

BATCH = 16  # sequences a forward pass
MAX_LENGTH = 4096  # tokens, where the model itself allows more


def split_revision(model: str) -> tuple[str, str | None]:
    """Folder or hub id, and the commit that a hub id is pinned to: ``name@commit``.

    >>> split_revision("org/name@0123abc")
    ('org/name', '0123abc')
    """
    if Path(model).is_dir():
        return model, None
    name, _, revision = model.partition("@")
    if not revision:
        raise UserError(
            f"data.ranker.model={model} is no folder, and as a hub id it is not pinned; write {name}@<commit>"
        )
    return name, revision


def load_reward_model(model: str, output: int) -> Callable[[Dataset], np.ndarray]:
    """A function from pairs to scores (pairs, 2), float64: logit ``output`` for each response.

    The text is the conversation in the chat format of the model's own tokenizer.  No code of the
    model's repository is run and no pickled weights are read.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, revision = split_revision(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.ranker.model={model} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    if output >= classifier.config.num_labels:
        raise UserError(
            f"data.ranker.output={output} is not allowed: {model} has "
            f"{classifier.config.num_labels} outputs, counted from 0"
        )
    limit = min(getattr(classifier.config, "max_position_embeddings", MAX_LENGTH), MAX_LENGTH)
    chat = ChatFormat(
        tokenizer,
        Format(
            template=None, system=None, max_length=limit, max_prompt_length=limit // 2, close_truncated=True
        ),
    )
    pad = tokenizer.pad_token_id
    classifier.config.pad_token_id = pad
    batch = 1 if pad is None else BATCH  # the score is read at the last token that is no padding
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier.to(device).eval()

    def scores(pairs: Dataset) -> np.ndarray:
        responses = list(zip(pairs["response_w"], pairs["response_l"], strict=True))
        encoded = chat.encode_batch(pairs["prompt"], responses)
        sequences = [tokens.prompt_ids + tokens.response_ids for pair in encoded for tokens in pair]
        result = np.empty(len(sequences))
        by_length = np.argsort([len(s) for s in sequences], kind="stable")
        for start in range(0, len(sequences), batch):
            rows = by_length[start : start + batch]
            ids = torch.full((len(rows), max(len(sequences[r]) for r in rows)), pad or 0)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(sequences[row])] = torch.tensor(sequences[row])
                mask[i, : len(sequences[row])] = 1
            with torch.inference_mode():
                logits = classifier(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            result[rows] = logits[:, output].double().cpu().numpy()
        return result.reshape(-1, 2)

    return scores
