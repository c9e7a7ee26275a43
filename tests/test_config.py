"""Configs: every shipped one composes and is valid, keys are explained, a bad value ends in one line."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bfpo_exp.config.check import checked
from bfpo_exp.config.explain import explain
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.paths import config_dir

GROUPS = (
    "model",
    "data",
    "loss",
    "reward",
    "combine",
    "deepspeed",
    "train",
    "eval",
    "tracking",
    "method",
    "experiment",
)
# What a file cannot know and a user has to give with it.
# What a file leaves for its user to say.
GIVEN = {
    "model=hf": ["model.path=some/model"],
    "reward=classifier": ["reward.model=some/model@1a2b"],
    "experiment=soup": ["soup.runs=[one,other]", "soup.weights=[0.5,0.5]"],
}


def shipped(*groups: str) -> list[str]:
    """Every file of these groups, as the override that chooses it."""
    return [
        f"{group}={file.stem}" for group in groups for file in sorted((config_dir() / group).glob("*.yaml"))
    ]


def one_line(error: UserError) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.strip()
    return message


def complaint(compose: Callable[..., DictConfig], *overrides: str) -> str:
    """What the command says of these words."""
    try:
        checked(compose(*overrides))
    except UserError as error:
        return one_line(error)
    except (HydraException, OmegaConfBaseException) as error:
        return one_line(explain(error))
    pytest.fail(f"{overrides} went through")


# ---------------------------------------------------------------- what is shipped


def test_no_group_is_empty() -> None:
    assert {choice.split("=")[0] for choice in shipped(*GROUPS)} == set(GROUPS)


def test_the_default_is_bfpo_on_the_generated_world(config: Callable[..., Config]) -> None:
    default = config()
    assert (default.model.name, default.data.name, default.loss.name) == ("tiny", "world", "bfpo")
    assert default.seed == 0
    assert default.label == "bfpo"


@pytest.mark.parametrize("choice", shipped(*GROUPS))
def test_every_file_composes_and_is_valid(choice: str, config: Callable[..., Config]) -> None:
    run = config(choice, *GIVEN.get(choice, []))
    group, name = choice.split("=")
    if group in ("model", "data", "deepspeed", "eval"):
        assert getattr(run, group).name == name
    if group == "method":
        assert run.method == run.label == name


def sweep_jobs(params: Mapping[Any, Any]) -> Iterator[list[str]]:
    """Jobs in which every value of every parameter of a sweep occurs; the first has the first values."""
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in parsed
    ]
    longest = max(map(len, choices))
    return (list(job) for job in itertools.islice(zip(*map(itertools.cycle, choices), strict=True), longest))


@pytest.mark.parametrize("choice", shipped("experiment"))
def test_every_value_of_an_experiments_sweep_is_valid(
    choice: str, compose: Callable[..., DictConfig], config: Callable[..., Config]
) -> None:
    sweeper = compose(choice, hydra_too=True).hydra.sweeper
    searched = sweeper._target_.endswith(".OptunaSweeper")  # tests/test_search.py tries its corners
    for job in sweep_jobs(sweeper.params) if sweeper.params and not searched else ():  # it may be one run
        config(choice, *GIVEN.get(choice, []), *job)


# ---------------------------------------------------------------- every key is explained

# Keys that no comment explains: what is listed here fails once it is explained, and is then to be removed.
EXPLAINED = [
    "config.yaml",
    "data/world.yaml",
    "eval/world.yaml",
    "model/tiny.yaml",
    "train/default.yaml",
    *(f"{choice.replace('=', '/')}.yaml" for choice in shipped("loss", "reward", "combine")),
]
# The file's own name, Hydra's own settings, and blocks whose keys are those of the block above them.
NEEDS_NO_WORD = {"name", "kind", "rule", "defaults", "hydra", "base", "sft"}


def leaves(
    node: yaml.MappingNode, lines: list[str], path: str = "", told: bool = False
) -> Iterator[tuple[str, bool]]:
    """Every leaf, and whether a comment stands on its line or on that of a block around it."""
    for key, value in node.value:
        if not path and key.value in NEEDS_NO_WORD:
            continue
        name, here = f"{path}{key.value}", told or " #" in lines[key.start_mark.line]
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from leaves(value, lines, f"{name}.", here)
        else:
            yield name, here


def explained(file: str) -> dict[str, bool]:
    """Of every key of a file, whether a comment in it, or in a file that it inherits, explains it."""
    text = (config_dir() / file).read_text()
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    found = dict(leaves(root, text.splitlines()))
    group = file.rpartition("/")[0]
    for parent in yaml.safe_load(text).get("defaults", []) if group else []:
        if isinstance(parent, str) and parent != "_self_":  # not another choice, placed under a key
            inherited = explained(f"{group}/{parent.split('@')[0]}.yaml")
            found |= {name: True for name in found if inherited.get(name)}
    return found


@pytest.mark.parametrize("file", EXPLAINED)
def test_every_key_is_explained(file: str) -> None:
    found = explained(file)
    assert [name for name, told in found.items() if not told] == []


# ---------------------------------------------------------------- the paper's rows


@pytest.mark.parametrize(
    ("method", "loss", "order", "streams", "batches"),
    [
        ("dpo_h", "dpo", "stream", ["helpfulness"], "shuffle"),
        ("dpo_s", "dpo", "stream", ["safety"], "shuffle"),
        ("dpo", "dpo", "stream", ["helpfulness", "safety"], "shuffle"),
        ("ipo", "ipo", "stream", ["helpfulness", "safety"], "shuffle"),
        ("dpo_balanced", "dpo", "stream", ["helpfulness", "safety"], "balanced"),
        ("ipo_balanced", "ipo", "stream", ["helpfulness", "safety"], "balanced"),
        ("bfpo", "bfpo", "helpfulness", ["helpfulness", "safety"], "balanced"),
        ("bfpo_no_shift", "bfpo", "helpfulness", ["helpfulness", "safety"], "balanced"),
        ("bfpo_no_buffer", "bfpo", "helpfulness", ["helpfulness", "safety"], "shuffle"),
    ],
)
def test_methods_are_the_papers_rows(
    method: str, loss: str, order: str, streams: list[str], batches: str, config: Callable[..., Config]
) -> None:
    run = config(f"method={method}")
    assert (run.loss.name, run.loss.order, run.loss.logps) == (loss, order, "sum")
    assert (run.data.streams, run.data.batches) == (streams, batches)
    if loss == "bfpo":
        alpha = 0.0 if method == "bfpo_no_shift" else 0.5
        assert (run.loss.hyperparameters["alpha"], run.loss.hyperparameters["b1"]) == (alpha, 3.0)


def test_the_sft_row_trains_on_no_preference(config: Callable[..., Config]) -> None:
    run = config("method=sft")
    assert "sft" in run.stages
    assert "evaluate" in run.stages
    assert "preference" not in run.stages


def test_the_rows_of_a_comparison_differ_in_what_makes_them_and_in_nothing_else(
    compose: Callable[..., DictConfig], config: Callable[..., Config]
) -> None:
    """They share model, training, evaluation and the sources of the data; but for morl's, which samples."""
    jobs = list(sweep_jobs(compose("experiment=methods", hydra_too=True).hydra.sweeper.params))
    rows = {choice for job in jobs for choice in job if choice.startswith("method=")}
    assert rows >= {f"method={name}" for name in ("sft", "dpo_h", "dpo_s", "dpo", "ipo", "bfpo")}
    runs = [config(row).model_dump() for row in rows - {"method=morl"}]
    for run in runs:
        for own in ("method", "loss", "stages"):
            del run[own]
        del run["data"]["streams"], run["data"]["batches"]
    assert all(run == runs[0] for run in runs)
    online, pairs = config("method=morl"), config("method=dpo")
    assert online.train.batch * online.loss.hyperparameters["samples"] == 2 * pairs.train.batch
    assert online.train.steps == pairs.train.steps


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_baseline_orders_each_stream_by_its_own_label(loss: str, config: Callable[..., Config]) -> None:
    assert config(f"loss={loss}").loss.order == "stream"


# ---------------------------------------------------------------- precedence


def test_the_command_line_wins_over_the_method_and_the_method_over_its_groups(
    config: Callable[..., Config],
) -> None:
    assert config("method=bfpo_no_shift").loss.hyperparameters["alpha"] == 0.0
    assert config("method=bfpo_no_shift", "loss.alpha=0.25").loss.hyperparameters["alpha"] == 0.25
    assert config("method=dpo", "data.batches=balanced").data.batches == "balanced"
    assert config("experiment=alpha_beta", "loss.beta=0.7").loss.hyperparameters["beta"] == 0.7


def test_a_run_is_labelled_by_its_method_else_by_its_loss(config: Callable[..., Config]) -> None:
    assert config("loss=ipo").label == "ipo"
    assert config("method=dpo_h").label == "dpo_h"


# ---------------------------------------------------------------- bad values


@pytest.fixture(scope="module")
def default(compose: Callable[..., DictConfig]) -> DictConfig:
    return compose()


def refused(composed: DictConfig, **values: Any) -> str:
    """What is said of a config with these values, dots of their keys written as ``__``."""
    composed = copy.deepcopy(composed)
    for key, value in values.items():
        OmegaConf.update(composed, key.replace("__", "."), value, force_add=True)
    with pytest.raises(UserError) as raised:
        checked(composed)
    return one_line(raised.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        # wrong type
        ({"train__lr": "fast"}, ["train.lr='fast'", "number"]),
        ({"train__lr": None}, ["train.lr=None", "number"]),
        ({"train__steps": 1.5}, ["train.steps=1.5", "integer"]),
        ({"loss__beta": "small"}, ["loss.beta='small'", "number"]),
        ({"data__pairs__world_safety__size": "all"}, ["world_safety.size='all'", "number of rows"]),
        ({"model__architecture": 3}, ["model.architecture=3", "dictionary"]),
        # out of range
        ({"loss__beta": -1}, ["loss.beta=-1", "greater than 0"]),
        ({"loss__b1": 1}, ["loss.b1=1", "greater than 1"]),
        ({"loss__alpha": math.nan}, ["loss.alpha=nan", "finite"]),
        ({"train__lr": 0}, ["train.lr=0", "greater than 0"]),
        ({"train__warmup": 1.5}, ["train.warmup=1.5", "less than or equal to 1"]),
        ({"train__trainable": []}, ["train", "trainable=[]"]),
        ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
        ({"threads": 0}, ["threads=0", "greater than or equal to 1"]),
        ({"data__heldout": 1.0}, ["data.heldout=1.0", "less than 1"]),
        ({"data__pairs__world_safety__size": 1.5}, ["world_safety.size=1.5", "(0, 1]"]),
        ({"data__pairs__world_safety__size": -3}, ["world_safety.size=-3", "not negative"]),
        # not one of the allowed
        ({"loss__order": "helpfulnes"}, ["loss.order='helpfulnes'", "'helpfulness', 'safety' or 'stream'"]),
        ({"train__schedule": "sine"}, ["train.schedule='sine'", "'linear', 'cosine' or 'constant'"]),
        ({"stages": ["base", "bas"]}, ["stages.1='bas'", "'base'", "'evaluate'"]),
        ({"loss__name": "bfpx"}, ["unknown loss 'bfpx'", "nearest: 'bfpo'"]),
        # unknown keys
        ({"loss__foo": 1}, ["unknown key in loss 'foo'", "allowed: alpha, b1, beta"]),
        ({"loss__alpa": 1}, ["unknown key in loss 'alpa'", "nearest: 'alpha'"]),
        ({"data__pairs__world_safety__sise": 3}, ["data.pairs.world_safety 'sise'", "nearest: 'size'"]),
        ({"train__base__step": 3}, ["train.base 'step'", "nearest: 'steps'"]),
        ({"sead": 1}, ["unknown key in the config 'sead'", "nearest: 'seed'"]),
        # nodes of several kinds
        ({"combine__rule": "linaer"}, ["unknown combine.rule 'linaer'", "nearest: 'linear'"]),
        ({"combine__threshold": 0.1}, ["unknown key in combine 'threshold'", "allowed: rule, weights"]),
        ({"combine__weights__helpful": 1}, ["unknown key in combine.weights 'helpful'", "'helpfulness'"]),
        ({"combine__weights__safety": -1}, ["combine.weights.safety=-1", "greater than or equal to 0"]),
        (
            {"combine__weights": {"helpfulness": 0, "safety": 0}},
            ["combine.weights: all weights are 0"],
        ),
        ({"reward__kind": "judges"}, ["unknown reward.kind 'judges'", "nearest: 'judge'"]),
        ({"reward__kind": "classifier"}, ["reward.model has no value"]),
        ({"reward__heads": 1}, ["unknown key in reward 'heads'", "allowed: kind"]),
        ({"train__reward__heldout": 1.0}, ["train.reward.heldout=1.0", "less than 1"]),
        # missing values
        ({"train__lr": "???"}, ["train.lr has no value", "set train.lr=..."]),
        ({"model__path": "???"}, ["model.path has no value"]),
        # values that contradict each other
        ({"train__steps": None}, ["train", "steps or epochs"]),
        ({"train__epochs": 1}, ["train", "steps or epochs"]),
        ({"model__path": "some/model"}, ["model", "path", "not both"]),
        ({"data__streams": []}, ["data mix is empty"]),
        ({"data__streams": ["safety"]}, ["batches=balanced", "batches=shuffle"]),
        ({"data__pairs__world_safety__size": 0}, ["data mix is empty", "'safety'"]),
        ({"data__format__max_prompt_length": 96}, ["max_prompt_length=96", "max_length=96"]),
        ({"data__ranker__kind": "column"}, ["data.ranker", "columns"]),
        # not to be resolved
        ({"loss__beta": "${nowhere}"}, ["nowhere"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_value_ends_in_one_line(values: dict[str, Any], words: list[str], default: DictConfig) -> None:
    message = refused(default, **values)
    for word in words:
        assert word in message


def test_values_beside_the_bad_ones_are_fine(config: Callable[..., Config]) -> None:
    """The table above would prove nothing if these were refused as well."""
    run = config(
        "loss.beta=1e-2", "loss.b1=1.5", "loss.alpha=-1", "train.warmup=1", "train.steps=null",
        "train.epochs=0.5", "train.schedule=cosine", "data.pairs.world_safety.size=1.0",
        "data.pairs.world_helpfulness.size=1",
    )  # fmt: skip
    assert run.loss.hyperparameters == {"beta": 0.01, "b1": 1.5, "alpha": -1}
    all_rows, one_row = (run.data.pairs[f"world_{stream}"].size for stream in ("safety", "helpfulness"))
    assert isinstance(all_rows, float)
    assert isinstance(one_row, int)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss=bfpx"], ["unknown loss 'bfpx'", "nearest: 'bfpo'"]),
        (["loss.bta=1"], ["unknown key in loss 'bta'", "nearest: 'beta'"]),
        (["sead=1"], ["unknown key 'sead'", "nearest: 'seed'"]),
        (["~loss.beta"], ["loss.beta has no value"]),
        (["~train.lr"], ["train.lr has no value"]),
        (["loss=dpo", "loss.beta=0"], ["loss.beta=0", "greater than 0"]),
        (["loss=dpo", "+loss.alpha=0.5"], ["unknown key in loss 'alpha'", "allowed: beta"]),
        (["model=hf"], ["model.path="]),
        (["combine=linaer"], ["unknown combine 'linaer'", "nearest: 'linear'"]),
        (["combine=llama2", "combine.weights.safety=1"], ["unknown key", "weights"]),
        (["combine=llama2", "combine.threshold=2"], ["combine.threshold=2", "less than or equal to 1"]),
        (["reward=classifier"], ["reward.model has no value; set reward.model=..."]),
        (["reward=classifier", "reward.model=m", "reward.heads.safety.scale=0"], ["heads.safety: scale=0"]),
        (["reward=classifier", "reward.model=m", "reward.heads.safety.output=-1"], ["output=-1", "from 0"]),
        (["reward=classifier", "reward.model=m", "reward.heads.saftey.output=1"], ["'saftey'", "'safety'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_words_of_a_command_line_end_in_one_line(
    overrides: list[str], words: list[str], compose: Callable[..., DictConfig]
) -> None:
    message = complaint(compose, *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=bfpo_noshift", ["unknown method 'bfpo_noshift'", "nearest: 'bfpo_no_shift'"]),
        ("experiment=metods", ["unknown experiment 'metods'", "nearest: 'methods'"]),
    ],
)
def test_a_misspelt_method_or_experiment_is_no_default_run(
    override: str, words: list[str], compose: Callable[..., DictConfig]
) -> None:
    message = complaint(compose, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize("given", ["0.2", True])
def test_hyperparameters_that_pass_are_numbers(given: str | bool, default: DictConfig) -> None:
    composed = copy.deepcopy(default)
    composed.loss.beta = given
    with contextlib.suppress(UserError):  # to refuse them is as good
        assert type(checked(composed).loss.hyperparameters["beta"]) in (int, float)


def test_an_unknown_key_in_a_node_that_may_be_null(default: DictConfig) -> None:
    assert "nearest: 'samples'" in refused(default, model__pretraining__smaples=3)


@pytest.mark.parametrize("given", [3, [3], "last_layer"])
def test_what_is_allowed_where_there_are_two_forms(given: Any, default: DictConfig) -> None:
    message = refused(default, train__trainable=given)
    assert "'all'" in message
    assert "list" in message
