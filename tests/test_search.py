"""A search: what its space means, and that killed, doubled and failing searches lose and repeat nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from app_support import Command
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from process_support import finish, start

from bfpo_exp.errors import UserError
from bfpo_exp.paths import config_dir
from bfpo_exp.sweep.manifest import sweeps
from bfpo_exp.sweep.search import Settings
from bfpo_exp.sweep.space import Space
from bfpo_exp.sweep.state import JobState, job_states
from bfpo_exp.sweep.study import Study

SEARCH = ["-m", "hydra/sweeper=optuna"]
ALPHA_BETA = ["loss.alpha=interval(0,1)", "loss.beta=tag(log,interval(0.05,1))"]


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Space]]:
    """The space of these words of a command line; studies go into a runs root of the test's own."""
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path))
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        master = compose("config", return_hydra_config=True)
        loader = GlobalHydra.instance().hydra.config_loader
        yield lambda *lines: Space(lines, loader, master)


def settings(**changes: Any) -> Settings:
    given = {"objectives": ["eval/helpfulness", "eval/gen"], "sampler": "tpe", "n_trials": 18, "batch": 3}
    return Settings(**given | {"population": 6, "seed": 0, "study": None} | changes)


def trials(home: Path) -> list[FrozenTrial]:
    (journal,) = home.glob("search/*/study.journal")
    backend = JournalFileBackend(str(journal))
    return optuna.load_study(study_name=None, storage=JournalStorage(backend)).trials


# -- the space


def test_hydras_syntax_means_what_it_means_to_hydra(space: Callable[..., Space]) -> None:
    found = space(
        *ALPHA_BETA,
        "loss=choice(bfpo,dpo)",
        "train.steps=range(60,121,20)",
        "train.lr=range(0.1,0.5,0.1)",
        "train.batch=int(interval(4,16))",
        "seed=3",
        "seed=1,2",
    )
    assert {d.key: d.distribution for d in found.dimensions} == {
        "loss.alpha": FloatDistribution(0, 1),
        "loss.beta": FloatDistribution(0.05, 1, log=True),
        "loss": CategoricalDistribution(["bfpo", "dpo"]),
        "train.steps": IntDistribution(60, 120, step=20),
        "train.lr": FloatDistribution(0.1, 0.4, step=0.1),
        "train.batch": IntDistribution(4, 16),
        "seed": CategoricalDistribution(["1", "2"]),
    }
    assert found.fixed == [], "of two values for a key the later wins"


def test_what_the_chosen_loss_does_not_know_is_left_out(space: Callable[..., Space]) -> None:
    found = space(*ALPHA_BETA, "loss=choice(dpo,bfpo)", "seed=3")
    values = {"loss.alpha": 0.5, "loss.beta": 0.1}
    assert found.job({**values, "loss": "bfpo"}) == ["seed=3", "loss.alpha=0.5", "loss.beta=0.1", "loss=bfpo"]
    assert found.job({**values, "loss": "dpo"}) == ["seed=3", "loss.beta=0.1", "loss=dpo"]
    assert {config.loss.name for config in found.checked()} == {"dpo", "bfpo"}


def test_a_grid_has_each_job_once(space: Callable[..., Space]) -> None:
    found = space("loss=dpo,bfpo", "loss.alpha=0,0.5,1", "train.lr=range(0.1,0.5,0.1)")
    jobs = [tuple(found.job(point)) for point in found.points()]
    assert len(jobs) == len(set(jobs)) == 4 + 3 * 4
    assert ("loss=dpo", "train.lr=0.3") in jobs
    with pytest.raises(UserError, match=r"loss.beta=interval\(1,2\) has no end of values"):
        space("loss.beta=interval(1,2)").points()


# -- proposals


def scores(params: dict[str, Any]) -> dict[str, float]:
    """A trade-off with a best beta."""
    loss = (params["loss.beta"] - 0.3) ** 2
    return {
        "eval/helpfulness": 60 - 20 * params["loss.alpha"] - loss,
        "eval/gen": 50 + 30 * params["loss.alpha"] - loss,
    }


def done(number: int = 0) -> JobState:
    return JobState(number, "", "finished")


def searched(space: Space, chosen: Settings, kill_at: set[int]) -> list[tuple[int, dict[str, Any]]]:
    """(place, values) of the trials of a whole search whose process dies in the batches of these numbers."""
    batches = 0
    while True:
        study = Study(space, chosen)
        with study.at_work():
            while asked := study.ask():
                batches += 1
                if batches in kill_at:
                    break
                for trial in asked:
                    study.tell(trial, done(), scores(trial.params))
            else:
                return sorted((t.user_attrs["place"], t.params) for t in study.finished())


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_killed_search_goes_on_as_if_it_had_not_been(space: Callable[..., Space], sampler: str) -> None:
    found = space(*ALPHA_BETA)
    whole = searched(found, settings(sampler=sampler, study="whole"), set())
    killed = searched(found, settings(sampler=sampler, study="killed"), {1, 4, 5})
    assert [place for place, _ in whole] == list(range(18))
    assert killed == whole
    assert len({tuple(params.values()) for _, params in whole}) > 12
    assert searched(found, settings(sampler=sampler, study="other", seed=1), set()) != whole


def test_proposals_have_four_digits_and_stay_inside(space: Callable[..., Space]) -> None:
    found = space("loss.alpha=interval(0.123456,0.123999)", "train.lr=range(0.1,0.5,0.1)")
    study = Study(found, settings(sampler="random", batch=20))
    with study.at_work():
        for trial in study.ask():
            assert 0.123456 <= trial.params["loss.alpha"] <= 0.123999
            assert trial.params["train.lr"] in (0.1, 0.2, 0.3, 0.4)
    study = Study(space(*ALPHA_BETA), settings(sampler="random", batch=20))
    with study.at_work():
        assert all(len(str(trial.params["loss.alpha"])) <= 7 for trial in study.ask())


def test_tpe_learns(space: Callable[..., Space]) -> None:
    """Near the best beta, 0.3, there is more than chance would put there."""
    params = [values for _, values in searched(space(*ALPHA_BETA), settings(n_trials=40), set())]
    late = [abs(values["loss.beta"] - 0.3) for values in params[20:]]
    early = [abs(values["loss.beta"] - 0.3) for values in params[:10]]
    assert sum(late) / 20 < sum(early) / 10


def test_n_trials_counts_all_and_can_be_raised(space: Callable[..., Space]) -> None:
    found = space(*ALPHA_BETA)
    first = searched(found, settings(n_trials=4), set())
    again = searched(found, settings(n_trials=7), set())
    assert len(first) == 4
    assert again[:4] == first
    assert len(again) == 7


def test_trials_of_a_living_process_are_its_own(space: Callable[..., Space]) -> None:
    first, second = (Study(space(*ALPHA_BETA), settings(n_trials=4)) for _ in range(2))
    with first.at_work():
        assert [trial.user_attrs["place"] for trial in first.ask()] == [0, 1, 2]
        with second.at_work():
            assert [trial.user_attrs["place"] for trial in second.ask()] == [3]
            assert second.ask() == []
        assert [trial.user_attrs["place"] for trial in first.ask()] == [3], "it ended without an outcome"


def test_what_fails_is_not_proposed_again(space: Callable[..., Space]) -> None:
    study = Study(space(*ALPHA_BETA), settings(n_trials=4, batch=4))
    with study.at_work():
        good, failed, no_number, lacking = study.ask()
        study.tell(good, done(), scores(good.params))
        study.tell(failed, JobState(1, "", "failed", reason="no memory"), {})
        study.tell(no_number, done(), {"eval/helpfulness": 1.0, "eval/gen": float("nan")})
        study.tell(lacking, done(), {"eval/helpfulness": 1.0})
        assert study.ask() == []
    reasons = {t.user_attrs.get("reason") for t in study._study.trials}
    assert reasons == {None, "no memory", "eval/gen is nan"}
    assert str(study).endswith("1 of 4 trials done, 3 failed")


def test_the_front_is_reported(space: Callable[..., Space]) -> None:
    study = Study(space("seed=5", "loss.alpha=choice(0,0.5,1)"), settings(sampler="grid"))
    assert study.report().splitlines()[1:] == ["none yet"]
    with study.at_work():
        for trial, helpfulness, gen in zip(study.ask(), (60.0, 50.0, 55.0), (40.0, 30.0, 45.0), strict=True):
            study.tell(trial, done(), {"eval/helpfulness": helpfulness, "eval/gen": gen})
    title, *front = study.report().splitlines()
    assert title.endswith("3 of 3 trials done; Pareto front:")
    assert front == [
        "eval/helpfulness 60  eval/gen 40  loss.alpha=0",
        "eval/helpfulness 55  eval/gen 45  loss.alpha=1",
    ]


# -- bad input


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["seed=1"], "the search space is empty"),
        (["loss.beta=interval(1,0.1)"], "loss.beta=interval(1,0.1) holds no numbers"),
        (["loss.beta=interval(0,inf)"], "loss.beta=interval(0,inf) holds no numbers"),
        (["loss.beta=tag(log,interval(0,1))"], "begins at 0; allowed with the tag log: > 0"),
        (["loss.beta=tag(lgo,interval(1,2))"], "unknown tag in loss.beta=tag(lgo,interval(1,2)) 'lgo'"),
        (["train.steps=range(9,1)"], "train.steps=range(9,1) holds no numbers"),
        (["train.steps=range(1,9,0)"], "train.steps=range(1,9,0) holds no numbers"),
        (["loss.beta=interval(-1,1)"], "loss.beta=-1.0 is not allowed"),
        (["loss.bata=interval(0.1,1)"], "'bata'; allowed:"),
        (["loss=bfpo,bfpx"], "unknown loss 'bfpx'"),
        ([*ALPHA_BETA, "hydra.sweeper.objectives=[eval/hlpfulness]"], "nearest: 'eval/helpfulness'"),
        ([*ALPHA_BETA, "hydra.sweeper.objectives=[eval/over_refusal]"], "allowed: -eval/over_refusal"),
        ([*ALPHA_BETA, "hydra.sweeper.objectives=eval/gen"], "allowed: a list of metrics"),
        ([*ALPHA_BETA, "hydra.sweeper.objectives=[]"], "allowed: a list of metrics"),
        ([*ALPHA_BETA, "hydra.sweeper.sampler=tpx"], "unknown hydra.sweeper.sampler 'tpx'"),
        ([*ALPHA_BETA, "hydra.sweeper.sampler=grid"], "loss.alpha=interval(0,1) has no end of values"),
        ([*ALPHA_BETA, "hydra.sweeper.n_trials=0"], "n_trials=0; allowed: a whole number >= 1"),
        ([*ALPHA_BETA, "hydra.sweeper.study=a/b"], "hydra.sweeper.study=a/b; allowed: letters"),
        ([*ALPHA_BETA, "hydra/launcher=basic"], "hydra/launcher=basic tells no scores"),
    ],
)
def test_bad_input_ends_in_one_line(command: Command, tmp_path: Path, given: list[str], line: str) -> None:
    assert line in command(*SEARCH, *given).line
    assert not list((tmp_path / "runs").glob("*/*/*.journal"))


def test_a_study_of_another_space_is_refused(space: Callable[..., Space]) -> None:
    Study(space(*ALPHA_BETA), settings(study="mine"))
    Study(space(*ALPHA_BETA), settings(study="mine", sampler="nsga2", n_trials=99))
    with pytest.raises(UserError, match=r"study mine exists with another space .*hydra.sweeper.study="):
        Study(space(ALPHA_BETA[0]), settings(study="mine"))
    with pytest.raises(UserError, match="exists with another config"):
        Study(space(*ALPHA_BETA, "train.steps=7"), settings(study="mine"))
    with pytest.raises(UserError, match="exists with another objectives"):
        Study(space(*ALPHA_BETA), settings(study="mine", objectives=["eval/gen"]))


def test_a_metric_that_no_run_has_is_told_with_the_first(space: Callable[..., Space]) -> None:
    study = Study(space(*ALPHA_BETA), settings(objectives=["train/kll"]))
    with study.at_work(), pytest.raises(UserError, match=r"'train/kll'.*nearest: 'train/kl'"):
        study.tell(study.ask()[0], done(), {"train/kl": 1.0, "train/loss": 2.0})


# -- the command


def test_a_dry_run_shows_the_corners_and_leaves_no_study(command: Command, tmp_path: Path) -> None:
    done = command("--dry-run", "-m", "experiment=search")
    assert done.code == 0, done.err
    for beta, b1, alpha in (
        ("0.1", "1.5", "-0.5"),
        ("0.1", "1.5", "1"),
        ("2", "1.5", "-0.5"),
        ("0.1", "10", "-0.5"),
    ):
        assert f"bfpo (beta {beta}, b1 {b1}, alpha {alpha})" in done.out
    assert not (tmp_path / "runs" / "search").exists()


BANDIT = [
    *SEARCH,
    "experiment=bandit",
    "bandit.methods=[bfpo]",
    "bandit.taus=[1]",
    "bandit.repeats=1",
    "bandit.steps=200",
    "hydra.launcher.n_jobs=1",
    "hydra.sweeper.objectives=[-bandit/bfpo/tau_1/tv_to_optimum,bandit/bfpo/tau_1/p1]",
    "loss.alpha=interval(0.4,0.6)",
    "loss.b1=tag(log,interval(2,8))",
]


def complete(home: Path) -> dict[int, tuple[float, ...]]:
    found = [t for t in trials(home) if t.state == TrialState.COMPLETE]
    assert len({t.user_attrs["place"] for t in found}) == len(found), "no place is done twice"
    return {t.user_attrs["place"]: (*t.params.values(), *t.values) for t in found}


@pytest.mark.slow
def test_a_killed_command_goes_on_with_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path))
    words = [*BANDIT, "hydra.sweeper.n_trials=4", "hydra.sweeper.batch=2"]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list(tmp_path.glob("search/*/study.journal")):
            states = [trial.state for trial in trials(tmp_path)]
            if states.count(TrialState.COMPLETE) == 2 and TrialState.RUNNING in states:
                break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = complete(tmp_path)
    assert sorted(before) == [0, 1], "killed in the second batch"

    out = finish(start(tmp_path, *words))
    assert "4 of 4 trials done; Pareto front:" in out
    after = complete(tmp_path)
    assert sorted(after) == [0, 1, 2, 3]
    assert {place: after[place] for place in before} == before
    latest = job_states(sweeps()[0])
    assert [state.state for state in latest[:2]] == ["reused", "reused"]
    assert len(latest) == 4, "the sweep that ends the search shows all of it"
    assert len(list(tmp_path.glob("run/*"))) == 4, "what was killed was proposed again, not something else"


@pytest.mark.slow
def test_two_commands_share_a_study(tmp_path: Path) -> None:
    words = [*BANDIT, "hydra.sweeper.n_trials=4", "hydra.sweeper.batch=1"]
    # A store that both are to make at once is another test's subject.
    finish(start(tmp_path, *words[:-2], "hydra.sweeper.n_trials=1"))
    for process in [start(tmp_path, *words) for _ in range(2)]:
        finish(process)
    assert sorted(complete(tmp_path)) == [0, 1, 2, 3]
    assert len(trials(tmp_path)) == 4


@pytest.mark.slow
def test_a_run_that_fails_fails_its_trial_alone(tmp_path: Path) -> None:
    words = ["experiment=smoke", "train.lr=1e-3,1e38", "train.clip=null", "hydra.sweeper.sampler=grid"]
    out = finish(start(tmp_path, *SEARCH, *words), code=1)
    assert "1 of 2 trials done, 1 failed; Pareto front:" in out
    good, bad = trials(tmp_path)
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert len(good.values) == 2
    assert "not finite" in bad.user_attrs["reason"]
    (plot,) = tmp_path.glob("sweep/*/comparison/pareto.png")
    assert plot.stat().st_size > 1000
