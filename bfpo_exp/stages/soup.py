"""The stage ``soup``: a model that is the weighted mean of those of finished runs (arXiv 2306.04488)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version
from bfpo_exp.models.output import CARD, ModelCard, card_text, standalone_template
from bfpo_exp.models.policy import architecture
from bfpo_exp.models.soup import difference, write_mean
from bfpo_exp.models.tokenizers import load_tokenizer
from bfpo_exp.named_runs import NamedRun, named_run
from bfpo_exp.stages.base import chat_format
from bfpo_exp.stages.context import Context, Weights

# Fields of a model's config that its tokenizer decides, or that say where it comes from.
INCIDENTAL = {
    "_attn_implementation", "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id",
    "pad_token_id", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Ingredient:
    """A finished run, the folder of its model, and its weight in the soup."""

    run: NamedRun
    model: Path
    weight: float

    @property
    def key(self) -> str:
        """The key of the model's content: its place in the store."""
        return f"{self.model.parent.name}/{self.model.name}"


def ingredients(config: Config) -> list[Ingredient]:
    """What the run's soup is made of; a `UserError` for a run that is not there or not finished."""
    pairs = zip(config.soup.runs, config.soup.weights, strict=True)
    runs = [(named_run(given), weight) for given, weight in pairs]
    return [Ingredient(run, run.model(), weight) for run, weight in runs]


def soup_made_of(config: Config) -> dict[str, Any]:
    """What determines a soup: the content of the models, whatever their runs are called; and weights."""
    parts = ingredients(config)
    return {"models": [part.key for part in parts], "weights": [part.weight for part in parts]}


def soup_text(config: Config) -> str:
    """What a soup is made of, in words: weights, runs, models."""
    return " + ".join(f"{p.weight:g} x {p.run.name} ({p.key})" for p in ingredients(config))


def soup_card(config: Config, scores: Mapping[str, float] | None = None) -> ModelCard:
    """The card of the run's soup."""
    return ModelCard(
        title=f"{config.model.name} {config.label}",
        summary=f"The weighted mean of the weights of models: {soup_text(config)}.",
        tags=["bfpo-exp", "soup", "merge"],
        config={
            "soup": [{"weight": p.weight, "model": p.key, "run": p.run.config} for p in ingredients(config)]
        },
        scores=scores or {},
    )


def soup_model(context: Context) -> Weights:
    """The weighted mean of the ingredients."""
    config = context.config
    made_of = soup_made_of(config) | {"code": code_version("models/soup")}

    def make(folder: Path) -> None:
        parts = ingredients(config)
        write_mean([part.model for part in parts], [part.weight for part in parts], folder)
        (folder / CARD).write_text(card_text(soup_card(config)), encoding="utf-8")

    path = context.store.get("soup", made_of, make)
    return Weights(str(path), path.name, own=True)


def check_soup(context: Context) -> None:
    """A `UserError` for models that have no mean, or that the run's config does not fit."""
    config = context.config
    parts = ingredients(config)
    first, format = parts[0], config.data.format.model_dump(mode="json")
    _same_fields(_shape(first), architecture(config.model).to_dict(), first.run.name, "this run's config")
    chat = chat_format(context)
    template = _written(chat.tokenizer, standalone_template(chat))
    for part in parts:
        _same_fields(_shape(part), _shape(first), part.run.name, first.run.name)
        if (dtype := part.run.config["model"]["dtype"]) != config.model.dtype:
            raise UserError(f"run {part.run.name} has model.dtype={dtype}, this run {config.model.dtype}")
        _same_fields(part.run.config["data"]["format"], format, part.run.name, "this run's data.format")
        tokenizer = load_tokenizer(part.model)
        if _written(tokenizer, tokenizer.chat_template) != template:
            raise UserError(
                f"run {part.run.name} has another tokenizer or chat template than this run (model="
                f"{config.model.name}); a soup is made and asked with the tokenizer of its models"
            )
        if what := difference(first.model, part.model):
            raise UserError(f"the models of {first.run.name} and {part.run.name} have no mean: {what}")


def _written(tokenizer: Any, template: str) -> list[str]:
    """What determines the ids of a conversation: the tokenizer, and the template of a model's folder."""
    special = sorted(f"{name}={token}" for name, token in tokenizer.special_tokens_map.items())
    return [tokenizer.backend_tokenizer.to_str(), template, *special]


def _shape(part: Ingredient) -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(part.model).to_dict()


def _same_fields(own: Mapping[str, Any], other: Mapping[str, Any], name: str, other_name: str) -> None:
    for field in sorted({*own, *other} - INCIDENTAL):
        if own.get(field) != other.get(field):
            raise UserError(
                f"run {name} has {field}={own.get(field)}, {other_name} {other.get(field)}; a mean needs "
                "one architecture and one chat format"
            )
