"""Soups: which runs a name means, means of weights by hand, and what a soup cannot be made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from app_support import Command, Done
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from bfpo_exp.config.check import checked
from bfpo_exp.errors import UserError
from bfpo_exp.models import soup as module
from bfpo_exp.models.soup import difference, weighted_mean, write_mean
from bfpo_exp.named_runs import named_run
from bfpo_exp.paths import HOME_VARIABLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMOKE = "experiment=smoke"
Model = Callable[..., "PreTrainedModel"]


# ---------------------------------------------------------------- means


def test_a_mean_by_hand() -> None:
    a, b, c = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0]), torch.tensor([5.0, 8.0])
    assert weighted_mean([a, b], [0.25, 0.75]).tolist() == [2.5, 1.0]
    assert weighted_mean([a, b, c], [0.5, 0.25, 0.25]).tolist() == [2.5, 1.5]
    assert weighted_mean([a, b], [2.0, -1.0]).tolist() == [-1.0, -6.0]
    assert a.tolist() == [1.0, -2.0], "what is averaged is left as it is"


def test_a_mean_is_taken_in_float32_and_rounded_once() -> None:
    """In bfloat16 1 + 3/256 is no number: half of it is added before it is rounded away."""
    a, b = torch.tensor([1.0]).bfloat16(), torch.tensor([1 + 1 / 128]).bfloat16()
    exact = 0.25 * 1 + 0.75 * (1 + 1 / 128)
    mean = weighted_mean([a, b], [0.25, 0.75])
    assert mean.dtype == torch.bfloat16
    assert mean.item() == torch.tensor(exact).bfloat16().item()


def test_whole_numbers_have_no_mean() -> None:
    numbers = torch.tensor([3, 4])
    assert weighted_mean([numbers, numbers.clone()], [0.5, 0.5]).tolist() == [3, 4]
    with pytest.raises(UserError, match="whole numbers"):
        weighted_mean([numbers, numbers + 1], [0.5, 0.5])


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_of_two_models_is_averaged(tied: bool, tiny_model: Model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = [tiny_model(seed=seed, tie_word_embeddings=tied) for seed in (0, 1)]
    folders = [saved(model, tmp_path / str(i)) for i, model in enumerate(models)]
    (out := tmp_path / "soup").mkdir()
    write_mean(folders, [0.25, 0.75], out)
    mean = AutoModelForCausalLM.from_pretrained(out).state_dict()
    ours, theirs = (model.state_dict() for model in models)
    assert mean.keys() == ours.keys()
    for name, tensor in mean.items():
        expected = 0.25 * ours[name].double() + 0.75 * theirs[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert ("lm_head.weight" in tensors_of(out)) is not tied


def test_all_of_one_and_nothing_of_another_is_that_one_byte_for_byte(
    tiny_model: Model, tmp_path: Path
) -> None:
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    with torch.no_grad():
        first.model.norm.weight[:2] = torch.tensor([-0.0, 1e-42])
        second.model.norm.weight[0] = math.inf
    a, b = saved(first, tmp_path / "a"), saved(second, tmp_path / "b")
    torch.set_flush_denormal(True)  # as a run does
    for weights, same in (([1, 0], a), ([0, 1], b)):
        (out := tmp_path / f"soup{same.name}").mkdir()
        write_mean([a, b], weights, out)
        assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


def test_models_may_be_cut_into_files_in_different_ways(tiny_model: Model, tmp_path: Path) -> None:
    whole = saved(tiny_model(seed=0), tmp_path / "whole")
    parts = saved(tiny_model(seed=1), tmp_path / "parts", max_shard_size="10KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert difference(whole, parts) is None
    for number, folders in enumerate([[whole, parts], [parts, whole]]):
        (tmp_path / f"{number}").mkdir()
        write_mean(folders, [0.5, 0.5], tmp_path / f"{number}")
    first, second = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
    assert {p.name for p in (tmp_path / "1").iterdir()} == {p.name for p in parts.iterdir()}
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-6, atol=1e-8)


def test_one_tensor_of_each_model_is_read_at_a_time(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    folders = [saved(tiny_model(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    alive: list[weakref.ref[Tensor]] = []
    most = []
    real = module._loaded

    def watched(file: Path, name: str) -> Tensor:
        tensor = real(file, name)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(module, "_loaded", watched)
    (tmp_path / "soup").mkdir()
    write_mean(folders, [0.5, 0.5], tmp_path / "soup")
    assert len(most) == 2 * len(tensors_of(folders[0]))
    assert max(most) <= 2


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"intermediate_size": 64},
            r"mlp\.down_proj\.weight is F32 \[32, 48\] in one, F32 \[32, 64\] in the",
        ),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is no such tensor in one, F32"),
        ({"dtype": torch.bfloat16}, r"is F32 .* in one, BF16 .* in the other"),
    ],
)
def test_what_differs_between_two_models_is_named(
    fields: dict[str, Any], what: str, tiny_model: Model, tmp_path: Path
) -> None:
    import re

    folders = [saved(tiny_model(**given), tmp_path / str(i)) for i, given in enumerate([{}, fields])]
    assert re.search(what, difference(*folders) or "")
    assert difference(folders[0], folders[0]) is None


# ---------------------------------------------------------------- which run is meant


def made_run(
    home: Path, key: str, label: str = "bfpo", *, seed: int = 0, status: str = "finished", model: bool = True
) -> Path:
    folder = home / "run" / key
    folder.mkdir(parents=True)
    config = {"method": None, "loss": {"name": label}, "seed": seed, "stages": ["evaluate"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    told = {"status": status, **({"reason": "the disk is full"} if status == "failed" else {})}
    if status != "running":
        (folder / "status.json").write_text(json.dumps(told))
    if model:
        (entry := home / "store" / "policy" / f"of-{key}").mkdir(parents=True)
        (folder / "model").symlink_to(entry)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    made_run(tmp_path, "1a2b3c4d5e6f7a8b")
    made_run(tmp_path, "1a2b3c9999999999", "dpo")
    made_run(tmp_path, "ffff3c4d5e6f7a8b", "dpo", seed=2)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("1a2b3c4d5e6f7a8b", "1a2b3c4d5e6f7a8b"),
        ("1a2b3c4", "1a2b3c4d5e6f7a8b"),
        ("f", "ffff3c4d5e6f7a8b"),
        ("bfpo-s0-1a2b3c", "1a2b3c4d5e6f7a8b"),
        ("dpo-s0-1a2b3c", "1a2b3c9999999999"),
        ("dpo-s2-ffff3c", "ffff3c4d5e6f7a8b"),
        ("{home}/run/ffff3c4d5e6f7a8b", "ffff3c4d5e6f7a8b"),
        ("{home}/run/ffff3c4d5e6f7a8b/", "ffff3c4d5e6f7a8b"),
    ],
)
def test_a_run_is_found_by_folder_key_and_name(given: str, key: str, home: Path) -> None:
    run = named_run(given.format(home=home))
    assert run.folder.name == key
    assert run.model() == home / "store" / "policy" / f"of-{key}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "1a2b3c",
            r"run '1a2b3c' may be any of .*1a2b3c4d5e6f7a8b \(bfpo-s0-1a2b3c\).*; give more of its key",
        ),
        ("bfpo-s0-1a2b3d", r"unknown run 'bfpo-s0-1a2b3d'; allowed: .*; nearest: 'bfpo-s0-1a2b3c'"),
        ("bfpo-s1-1a2b3c", r"unknown run 'bfpo-s1-1a2b3c'"),
        ("ipo-s0-1a2b3c", r"unknown run"),
        ("", r"unknown run ''"),
        ("bfpo-s0-", r"unknown run 'bfpo-s0-'"),
    ],
)
def test_a_run_that_is_not_there_ends_in_one_line(given: str, message: str, home: Path) -> None:
    with pytest.raises(UserError, match=message):
        named_run(given)


def test_a_run_without_a_model_to_give_ends_in_one_line(home: Path) -> None:
    made_run(home, "aaaa", status="failed")
    with pytest.raises(UserError, match="run bfpo-s0-aaaa failed: the disk is full; finish it first"):
        named_run("aaaa").model()
    made_run(home, "bbbb", status="running")
    with pytest.raises(UserError, match="run bfpo-s0-bbbb has not finished"):
        named_run("bbbb").model()
    made_run(home, "cccc", model=False)
    with pytest.raises(UserError, match=r"has no model of its own \(its stages: evaluate\)"):
        named_run("cccc").model()
    made_run(home, "dddd")
    (home / "store" / "policy" / "of-dddd").rmdir()
    with pytest.raises(UserError, match="the model of run bfpo-s0-dddd is no longer in the store"):
        named_run("dddd").model()


# ---------------------------------------------------------------- the config


SOUP = "stages=[soup,evaluate]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SOUP], "stages has soup, but soup.runs is empty"),
        ([SOUP, "soup.runs=[a,b]", "soup.weights=[1]"], r"soup: 2 runs, but 1 weights \(\[1\.0\]\)"),
        ([SOUP, "soup.runs=[a,b]", "soup.weights=[0.5,0.6]"], r"soup: weights=.* sum to 1\.1; they have to"),
        ([SOUP, "soup.runs=[a,b]", "soup.weights=[1.5,-0.5]"], r"not all within .*soup\.extrapolate=true"),
        ([SOUP, "soup.runs=[a,b]", "soup.weights=[.nan,1]"], r"soup\.weights\.0=.* is not allowed"),
        ([SOUP, "soup.runs=[12e4,b]", "soup.weights=[0.5,0.5]"], r"soup\.runs\.0=120000\.0 .* in quotes"),
        (["stages=[base,soup]", "soup.runs=[a]", "soup.weights=[1]"], "finished runs alone; leave out base"),
        (["soup.runs=[a]", "soup.weights=[1]"], r"soup\.runs is set, but stages has no soup"),
        ([SOUP, "+soup.run=[a]"], r"unknown key in soup 'run'; allowed: .*runs"),
    ],
)
def test_a_bad_soup_ends_in_one_line(
    overrides: list[str], message: str, compose: Callable[..., DictConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        checked(compose(*overrides))


def test_a_soup_is_a_row_of_its_own(compose: Callable[..., DictConfig]) -> None:
    """Whatever loss the config names, it has no part in it; a key of digits is a name."""
    run = checked(compose(SOUP, "soup.runs=[123456,'12e4']", "soup.weights=[0.5,0.5]"))
    assert run.label == run.method == "soup"
    assert run.soup.runs == ["123456", "12e4"]
    assert checked(compose(SOUP, "soup.runs=[a]", "soup.weights=[1]", "method=sft", SOUP)).label == "sft"
    wide = ["soup.runs=[a,b]", "soup.weights=[1.5,-0.5]", "soup.extrapolate=true"]
    assert checked(compose(SOUP, *wide)).soup.weights == [1.5, -0.5]


# ---------------------------------------------------------------- end to end


def run_folder(done: Done) -> Path:
    assert done.code == 0, done.err
    return Path(done.out.splitlines()[1].strip())


def metrics(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in lines for name, value in line["metrics"].items()}


@pytest.mark.slow
def test_soups_of_two_runs(command: Command, tmp_path: Path) -> None:
    dpo, bfpo = (run_folder(command(SMOKE, f"method={method}")) for method in ("dpo", "bfpo"))
    names = [f"{label}-s0-{folder.name[:6]}" for label, folder in (("dpo", dpo), ("bfpo", bfpo))]
    runs = f"soup.runs=[{','.join(names)}]"

    # All of one run's model has its weights and its scores.
    first = run_folder(command(SMOKE, SOUP, runs, "soup.weights=[1,0]"))
    assert (first / "model/model.safetensors").read_bytes() == (dpo / "model/model.safetensors").read_bytes()
    scores = {name: value for name, value in metrics(dpo).items() if name.startswith("eval/")}
    assert scores
    assert metrics(first) == scores
    rows = [json.loads((folder / "artifacts/generations.json").read_text()) for folder in (first, dpo)]
    assert rows[0] == rows[1]

    # The same models by other names are the same run.
    again = command(SMOKE, SOUP, f"soup.runs=[{dpo},{bfpo.name}]", "soup.weights=[1,0]")
    assert run_folder(again) == first
    assert "reused" in again.out

    done = command("-m", "experiment=[smoke,soup]", runs, "soup.weights=[1,0],[0.5,0.5],[0,1]")
    assert done.code == 0, done.err
    assert "3 runs, of which 1 reused and 0 failed" in done.out
    for label in ("[1.0, 0.0]", "[0.5, 0.5]", "[0.0, 1.0]"):
        assert any(line.startswith(label) for line in done.out.splitlines()), done.out
    assert len(list((tmp_path / "runs/store/soup").glob("[!.]*"))) == 3

    half = next(
        folder for folder in (tmp_path / "runs/run").iterdir()
        if yaml.safe_load((folder / "config.yaml").read_text())["soup"]["weights"] == [0.5, 0.5]
    )  # fmt: skip
    ours, theirs, mean = (load_file(folder / "model/model.safetensors") for folder in (dpo, bfpo, half))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (ours[name] + theirs[name]) / 2, rtol=1e-6, atol=1e-8)
    tags = json.loads((half / "tags.json").read_text())
    policy = (dpo / "model").resolve().name
    assert tags["soup"].startswith(f"0.5 x {names[0]} (policy/{policy}) + 0.5 x {names[1]} (policy/")
    for card in (half / "model" / "README.md", half / "artifacts" / "model_card.md"):
        assert names[0] in card.read_text()
        assert f"policy/{policy}" in card.read_text()

    # A soup may be part of another one.
    nested = command(SMOKE, SOUP, f"soup.runs=[{half.name},{names[0]}]", "soup.weights=[0.5,0.5]")
    mean = load_file(run_folder(nested) / "model/model.safetensors")
    for name, tensor in mean.items():
        expected = 0.75 * ours[name] + 0.25 * theirs[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_what_a_soup_cannot_be_made_of_ends_in_one_line(command: Command) -> None:
    plain = run_folder(command(SMOKE, "method=sft")).name
    deep = run_folder(command(SMOKE, "method=sft", "model.architecture.num_hidden_layers=1")).name
    turned = run_folder(command(SMOKE, "method=sft", "data.format.system=be kind")).name
    lonely = run_folder(command(SMOKE, "stages=[base,evaluate]")).name

    def refused(*words: str) -> str:
        return command(SMOKE, SOUP, "soup.weights=[0.5,0.5]", *words).line

    assert f"run sft-s0-{deep[:6]} has num_hidden_layers=1" in refused(f"soup.runs=[{plain},{deep}]")
    assert "this run's config 1" in refused(
        f"soup.runs=[{plain},{plain}]", "model.architecture.num_hidden_layers=1"
    )
    assert "has system=be kind, this run's data.format None" in refused(f"soup.runs=[{plain},{turned}]")
    other = refused(f"soup.runs=[{plain},{plain}]", "model.tokenizer={kind:bpe,vocab_size:300}")
    assert "has another tokenizer or chat template than this run (model=tiny)" in other
    assert "has model.dtype=float32, this run bfloat16" in refused(
        f"soup.runs=[{plain},{plain}]", "model.dtype=bfloat16"
    )
    assert "unknown run 'sft-s0-zzzzzz'" in refused(f"soup.runs=[{plain},sft-s0-zzzzzz]")
    done = command(SMOKE, SOUP, "soup.weights=[0.5,0.5]", f"soup.runs=[{plain},{lonely}]")
    assert done.code == 0, done.err  # a base model is a model like any other
