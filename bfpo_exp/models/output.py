"""What a stage leaves: a folder that transformers reads by itself, with a card that says what it is.

The folder's chat template writes what the model was trained on, its BOS and default system turn
included, so that ``tokenizer.apply_chat_template`` gives the very ids of `ChatFormat.prompt_ids`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from bfpo_exp.config.schema import Config
from bfpo_exp.data.card import Counts, table
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.records import Message
from bfpo_exp.models.policy import is_local
from bfpo_exp.rewards.use import unread

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Stage = Literal["base", "sft", "reward", "preference"]
CARD = "README.md"
SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

messages = [{"role": "user", "content": "How do I keep basil fresh?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt, max_new_tokens=100)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
REWARD_SNIPPET = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # the folder of this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")

messages = [
    {"role": "user", "content": "How do I keep basil fresh?"},
    {"role": "assistant", "content": "Put its stems in a glass of water."},
]
text = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
for name, logit in zip(model.config.id2label.values(), model(**text).logits[0].tolist()):
    print(name, logit)  # rewards.json says how a logit becomes a reward in [0, 1]
"""
USES = {"text-generation": SNIPPET, "text-classification": REWARD_SNIPPET}  # by the hub's name of the task


@dataclass(frozen=True)
class ModelCard:
    """What is told of a model.

    Attributes:
        title, summary: the card's heading, and what the model is in a sentence.
        base_model: the hub id of the weights that training began with; None for others.
        datasets: hub ids of the data sets trained on.
        tags: of the hub.
        config: the settings that made the model, as plain values.
        counts: what became of the data's rows, by what they are ("demonstrations").
        scores: in percent, by the metric's name.
        task: what the model does, as the hub names it: a key of `USES`.
    """

    title: str
    summary: str
    base_model: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    task: str = "text-generation"


def model_card(
    config: Config, stage: Stage, counts: Counts | None = None, scores: Mapping[str, float] | None = None
) -> ModelCard:
    """The card of the model that a stage of a run makes.

    It tells of the settings up to that stage only, since runs that differ in later ones share it.
    """
    values = config.model_dump(mode="json", exclude=unread(config) if stage == "preference" else None)
    told: dict[str, Any] = {"model": values["model"]}
    done = ["base"] if stage == "base" else ["base", "sft"]
    told["train"] = {name: values["train"][name] for name in done}
    sources: dict[str, Any] = {}
    if stage != "base":
        told["data"] = {"format": values["data"]["format"], "sft": values["data"]["sft"]}
        sources |= config.data.sft
    if stage == "reward":
        told |= {"data": values["data"], "train": told["train"] | {"reward": values["train"]["reward"]}}
        sources |= {n: s for n, s in config.data.pairs.items() if s.stream in config.data.streams}
    if stage == "preference":
        kept = ("data", "train", "loss", "reward", "combine", "seed")
        told |= {name: values[name] for name in kept if name in values}
        sources |= {n: s for n, s in config.data.pairs.items() if s.stream in config.trained_streams}
    origin = config.model.path or f"random weights ({(config.model.architecture or {}).get('model_type')})"
    what = {
        "base": "A base model",
        "sft": "A model fine-tuned on demonstrations",
        "reward": "A reward model with the outputs helpfulness and safety, made of a model fine-tuned on "
        "demonstrations",
        "preference": f"A model fine-tuned on demonstrations, then on preference pairs with the loss "
        f"{config.loss.name}",
    }[stage]
    on_hub = config.model.path is not None and not is_local(config.model.path)
    return ModelCard(
        title=f"{config.model.name} {config.label if stage == 'preference' else stage}",
        summary=f"{what}; training began with {origin}.",
        base_model=config.model.path if on_hub else None,
        datasets=sorted({source.hub for source in sources.values() if source.hub and source.size != 0}),
        tags=["bfpo-exp", stage, *([config.loss.name] if stage == "preference" else [])],
        config=told,
        counts=counts or {},
        scores=scores or {},
        task="text-classification" if stage == "reward" else "text-generation",
    )


def card_text(card: ModelCard) -> str:
    """The card in Markdown, after front matter in YAML as the hub reads it."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": card.task}
    front |= {"base_model": card.base_model} if card.base_model else {}
    front |= {"datasets": list(card.datasets)} if card.datasets else {}
    front |= {"tags": list(card.tags)} if card.tags else {}
    parts = ["---", _yaml(front), "---", "", f"# {card.title}", "", card.summary, ""]
    parts += ["## Use", "", "```python", USES[card.task].rstrip(), "```", ""]
    if card.scores:
        parts += ["## Scores", "", "In percent.", "", "| metric | score |", "|---|---:|"]
        parts += [f"| {name} | {value:.2f} |" for name, value in card.scores.items()]
        parts += [""]
    if card.counts:
        parts += ["## Data", "", table(card.counts, "of"), ""]
    if card.config:
        parts += ["## Settings", "", "```yaml", _yaml(card.config), "```", ""]
    return "\n".join(parts)


def write_model_folder(
    model: PreTrainedModel,
    chat: ChatFormat,
    folder: Path,
    card: ModelCard,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Weights as safetensors, config, generation config, tokenizer with its chat template, card.

    ``state_dict`` holds the weights, whole and on the CPU, where the model's own are shared out
    over processes; it is left as it is.  Generation ends at the chat format's end of turn.  Model
    and tokenizer are left as they were.
    """
    from transformers import GenerationConfig

    tokenizer = chat.tokenizer
    template = tokenizer.chat_template
    generation = model.generation_config if model.can_generate() else None
    # A config of our own: one that came with pretrained weights may hold what transformers refuses to save.
    if generation is not None:
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=chat.end_of_turn_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    tokenizer.chat_template = standalone_template(chat)
    try:
        model.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template
        if generation is not None:
            model.generation_config = generation
    (folder / CARD).write_text(card_text(card), encoding="utf-8")


def standalone_template(chat: ChatFormat) -> str:
    """The chat template, made to write by itself the BOS and the system turn that the format adds."""
    user = Message(role="user", content="x")
    with_system = chat.with_system([user])

    def written(messages: list[Message]) -> str:
        return chat.render([messages], generation_prompt=True)[0]

    before = ""
    if written(with_system) != written([user]):
        text = json.dumps(with_system[0]["content"], ensure_ascii=False)
        before += (
            "{% if not messages or messages[0]['role'] != 'system' %}"
            "{% set messages = [{'role': 'system', 'content': " + text + "}] + messages %}{% endif %}"
        )
    if chat.bos_id is not None and not written(with_system).startswith(chat.tokenizer.bos_token):
        before += "{% if bos_token %}{{ bos_token }}{% endif %}"
    # After a block the line break is not written, and the template begins at the start of a line.
    return f"{before}\n{chat.template}" if before else chat.template


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip()
