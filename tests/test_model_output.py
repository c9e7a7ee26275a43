"""A model's folder: what transformers reads from it by itself, and the card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from data_support import bpe_tokenizer, chat_format
from test_data_chat import SETTINGS, made, user

from bfpo_exp.config.schema import Config
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.records import Message
from bfpo_exp.models.output import (
    CARD,
    SNIPPET,
    ModelCard,
    card_text,
    model_card,
    standalone_template,
    write_model_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = ModelCard("a title", "What it is.")
CONVERSATIONS: list[list[Message]] = [
    [user("open the door")],
    [user("open"), Message(role="assistant", content="how?"), user("take the key")],
    [Message(role="system", content="be kind"), user("open the door")],
]


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def model_for(tiny_model: Callable[..., PreTrainedModel], chat: ChatFormat, **fields: Any) -> PreTrainedModel:
    return tiny_model(vocab_size=len(chat.tokenizer), **fields)


# ---------------------------------------------------------------- the template


@pytest.mark.parametrize("system", ["", 'say "yes"\n\\n ünd 😀', None])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_saved_template_writes_what_is_trained_on(name: str, system: str | None, tmp_path: Path) -> None:
    """A tokenizer read from the folder, without this project, gives the ids of training."""
    from transformers import AutoTokenizer

    chat = made(**SETTINGS[name], changes={"system": system})
    chat.tokenizer.chat_template = standalone_template(chat)
    chat.tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for conversation in CONVERSATIONS:
        encoded = read.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        assert encoded["input_ids"] == chat.prompt_ids(conversation)
    again = ChatFormat(read, chat_format(system=system))
    assert standalone_template(again) == chat.tokenizer.chat_template  # nothing is added twice
    for conversation in CONVERSATIONS:
        assert again.prompt_ids(conversation) == chat.prompt_ids(conversation)


def test_blanks_at_the_beginning_of_a_template_are_kept() -> None:
    for beginning in ("\n", "  ", "\n\n  "):
        body = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        chat = made(beginning + body, {"system": None})
        expected = chat.prompt_ids([user("x")])
        alone = made(standalone_template(chat), {"system": None})
        assert alone.render([[user("x")]], True)[0] == "<s>" + chat.render([[user("x")]], True)[0]
        assert alone.prompt_ids([user("x")]) == expected


# ---------------------------------------------------------------- the folder


def test_the_folder_holds_model_tokenizer_and_card(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    chat = made()
    model = model_for(tiny_model, chat)
    before = (model.generation_config, chat.tokenizer.chat_template)
    write_model_folder(model, chat, tmp_path, PLAIN)
    assert (model.generation_config, chat.tokenizer.chat_template) == before
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", CARD, "model.safetensors"}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight)
    generation = GenerationConfig.from_pretrained(tmp_path)
    tokenizer = chat.tokenizer
    assert generation.eos_token_id == chat.end_of_turn_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert generation.bos_token_id == tokenizer.bos_token_id


def test_generation_ends_at_the_end_of_turn_even_where_it_is_not_eos(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    chat = made(**SETTINGS["chatml"])
    assert chat.end_of_turn_id != chat.tokenizer.eos_token_id
    write_model_folder(model_for(tiny_model, chat), chat, tmp_path, PLAIN)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == chat.end_of_turn_id


def test_a_generation_config_that_cannot_be_saved_does_not_matter(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """As some published models have: sampling settings without sampling."""
    chat = made()
    model = model_for(tiny_model, chat)
    assert model.generation_config is not None
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    write_model_folder(model, chat, tmp_path, PLAIN)
    assert "temperature" not in json.loads((tmp_path / "generation_config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_come_as_a_state_dict(
    tied: bool, dtype: torch.dtype, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Of a model whose own weights are elsewhere; tied ones come twice, in memory of their own."""
    from transformers import AutoModelForCausalLM

    chat = made()
    whole = model_for(tiny_model, chat, tie_word_embeddings=tied, dtype=dtype)
    weights = {name: weight.clone() for name, weight in whole.state_dict().items()}
    names = list(weights)
    shell = model_for(tiny_model, chat, tie_word_embeddings=tied, dtype=dtype, seed=1).to("meta")
    write_model_folder(shell, chat, tmp_path, PLAIN, state_dict=weights)
    assert list(weights) == names
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert read.dtype == dtype
    for name, weight in whole.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight)


# ---------------------------------------------------------------- the card


def test_the_cards_snippet_runs(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """As a reader would run it: in the folder, in a process that knows nothing of this project."""
    chat = ChatFormat(bpe_tokenizer(), chat_format())
    write_model_folder(model_for(tiny_model, chat), chat, tmp_path, PLAIN)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / CARD).read_text(), re.DOTALL)
    assert snippet == SNIPPET
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_card_by_hand() -> None:
    card = ModelCard(
        title="tiny bfpo",
        summary="What it is.",
        base_model="owner/name",
        datasets=["a/b", "c/d"],
        tags=["bfpo-exp"],
        config={"loss": {"name": "bfpo", "alpha": 0.5}},
        counts={"pairs": {"pairs": 1200, "tokenised": 1100}},
        scores={"eval/helpfulness": 61.234},
    )
    text = card_text(card)
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "datasets": ["a/b", "c/d"],
        "tags": ["bfpo-exp"],
    }
    assert "# tiny bfpo\n\nWhat it is.\n" in text
    assert "| eval/helpfulness | 61.23 |" in text
    assert "| pairs | 1,200 | 1,100 |" in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(settings) == card.config


def test_a_card_of_nothing_but_a_name_has_no_empty_parts() -> None:
    text = card_text(PLAIN)
    assert set(front_matter(text)) == {"library_name", "pipeline_tag"}
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Use"]


def test_the_card_of_a_stage_tells_of_what_made_its_model_only(config: Callable[..., Config]) -> None:
    """Runs with other losses share the SFT model, so its card must be the same."""
    changes = ["data=paper", "model=hf", "model.path=owner/name"]
    run, other = (
        config(*changes, f"loss={loss}", f"seed={seed}") for loss, seed in (("bfpo", 0), ("dpo", 1))
    )
    for stage in ("base", "sft"):
        assert model_card(run, stage) == model_card(other, stage)  # type: ignore[arg-type]
    assert model_card(run, "preference") != model_card(other, "preference")
    card = model_card(run, "preference", {"pairs": {"pairs": 2}}, {"eval/helpfulness": 50.0})
    assert card.base_model == "owner/name"
    assert set(card.datasets) == {
        "HuggingFaceH4/ultrachat_200k",
        "HuggingFaceH4/ultrafeedback_binarized",
        "PKU-Alignment/PKU-SafeRLHF",
    }
    assert card.config["loss"]["alpha"] == run.loss.hyperparameters["alpha"]
    assert "bfpo" in card.tags
    assert set(model_card(run, "sft").datasets) == {
        "HuggingFaceH4/ultrachat_200k",
        "PKU-Alignment/PKU-SafeRLHF",
    }
    assert front_matter(card_text(card))["base_model"] == "owner/name"


def test_a_folder_on_this_machine_is_no_base_model_of_the_hub(config: Callable[..., Config]) -> None:
    for words in ([], ["model=hf", "model.path=./some/where"]):
        card = model_card(config(*words), "preference")
        assert card.base_model is None
        assert card.datasets == []
        assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card_text(card), re.DOTALL)[0]) == card.config
