"""The store: each entry is made once and is whole; and what its keys depend on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo_exp import hashing
from bfpo_exp.hashing import code_version, stable_hash
from bfpo_exp.store import Store

MADE_OF: dict[str, Any] = {"model": "m", "steps": 3, "optimisation": {"lr": 0.1, "betas": [0.9, 0.99]}}


def entries(store: Store, kind: str = "kind") -> list[str]:
    """What lies under a kind, less the locks."""
    return sorted(path.name for path in (store.root / kind).iterdir() if not path.name.endswith(".lock"))


# ---------------------------------------------------------------- entries


def test_an_entry_is_made_once_and_reused(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        assert list(folder.iterdir()) == []
        (folder / "content").write_text("whole")

    store = Store(tmp_path)
    entry = store.get("kind", MADE_OF, make)
    assert entry == store.path("kind", MADE_OF) == store.get("kind", MADE_OF, make)
    assert Store(tmp_path).get("kind", dict(reversed(MADE_OF.items())), make) == entry
    assert (entry / "content").read_text() == "whole"
    assert json.loads((entry / "made_of.json").read_text()) == MADE_OF
    assert len(made) == 1
    assert made[0] != entry  # it was not where readers look before it was whole
    assert entries(store) == [entry.name]


def test_another_content_or_kind_is_another_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made: list[Path] = []
    paths = {
        store.get("kind", MADE_OF, made.append),
        store.get("kind", {**MADE_OF, "steps": 4}, made.append),
        store.get("other", MADE_OF, made.append),
    }
    assert len(paths) == len(made) == 3


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    store = Store(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("of it")
        raise error

    with pytest.raises(type(error)):
        store.get("kind", MADE_OF, fail)
    assert entries(store) == []
    assert store.get("kind", MADE_OF, lambda folder: None).is_dir()


# ---------------------------------------------------------------- processes

# Makes an entry slowly and notes that it does; its arguments are the store's root and the seconds.
MAKER = """
import os, pathlib, sys, time
from bfpo_exp.store import Store
root, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def make(folder):
    (folder / "half").write_text("of it")
    with open(root / "made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    (folder / "content").write_text("whole")
entry = Store(root).get("kind", {"shared": True}, make)
assert (entry / "content").read_text() == "whole"
"""


def maker(root: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MAKER, str(root), str(seconds)])


def wait_for(file: Path, within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


def test_of_two_processes_one_makes_the_entry(tmp_path: Path) -> None:
    first = maker(tmp_path, 1.0)
    wait_for(tmp_path / "made")
    second = maker(tmp_path, 1.0)
    assert [process.wait(60) for process in (first, second)] == [0, 0]
    assert (tmp_path / "made").read_text() == f"{first.pid}\n"


def test_what_a_killed_process_left_is_cleaned(tmp_path: Path) -> None:
    process = maker(tmp_path, 600)
    wait_for(tmp_path / "made")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    store, made_of = Store(tmp_path), {"shared": True}
    left = f".{store.path('kind', made_of).name}.making"
    assert entries(store) == [left]

    entry = store.get("kind", made_of, lambda folder: (folder / "content").touch())
    assert sorted(path.name for path in entry.iterdir()) == ["content", "made_of.json"]
    assert entries(store) == [entry.name]


# ---------------------------------------------------------------- keys

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), values, min_size=1, max_size=5))
def test_keys_do_not_depend_on_the_order_of_names(value: dict[str, Any]) -> None:
    assert stable_hash(reordered(value)) == stable_hash(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": "1"}),
        ({"a": None}, {}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": {"b": 1}, "c": 1}, {"a": {"b": 1, "c": 1}}),
    ],
)
def test_different_contents_have_different_keys(one: Any, other: Any) -> None:
    assert stable_hash(one) != stable_hash(other)


def test_a_key_is_never_made_of_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        stable_hash({"lr": float("nan")})


SOURCE = '''"""A module."""

RATE = 0.5


def scaled(x):
    """Twice the rate."""
    return 2 * RATE * x  # the rate's share
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of a module and a folder in place of this one; versions are taken anew each time."""
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "module.py").write_text(SOURCE)
    (tmp_path / "folder" / "inner" / "deep.py").write_text("X = 1\n")
    (tmp_path / "unrelated.py").write_text("Y = 1\n")
    monkeypatch.setattr(hashing, "PACKAGE", tmp_path)
    yield tmp_path
    code_version.cache_clear()


def fresh_version() -> str:
    code_version.cache_clear()
    return code_version("module", "folder")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("# the rate's share", "# a better comment"),
        lambda text: text.replace("Twice the rate.", "Two rates.\n\n    And more.\n    "),
        lambda text: text.replace('"""A module."""\n', ""),
        lambda text: text.replace("\n\n\n", "\n\n\n# ----\n\n"),
        lambda text: text.replace("return 2 * RATE * x", "return (2 * RATE\n            * x)"),
    ],
)
def test_comments_docstrings_and_layout_are_not_code(package: Path, edit: Any) -> None:
    before = fresh_version()
    assert edit(SOURCE) != SOURCE
    (package / "module.py").write_text(edit(SOURCE))
    assert fresh_version() == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("0.5", "0.25"),
        lambda text: text.replace("2 * RATE", "3 * RATE"),
        lambda text: text.replace("scaled", "shrunk"),
        lambda text: text + "\nRATE = 1.0\n",
    ],
)
def test_code_is(package: Path, edit: Any) -> None:
    before = fresh_version()
    (package / "module.py").write_text(edit(SOURCE))
    assert fresh_version() != before


def test_a_folder_counts_with_every_file_below_and_nothing_beside(package: Path) -> None:
    before = fresh_version()
    (package / "unrelated.py").write_text("Y = 2\n")
    assert fresh_version() == before
    (package / "folder" / "inner" / "deep.py").write_text("X = 2\n")
    changed = fresh_version()
    assert changed != before
    (package / "folder" / "new.py").write_text("")
    assert fresh_version() not in (before, changed)


def test_a_body_of_nothing_but_a_docstring(package: Path) -> None:
    (package / "module.py").write_text('class Problem(Exception):\n    """What went wrong."""\n')
    before = fresh_version()
    (package / "module.py").write_text("class Problem(Exception):\n    pass\n")
    assert fresh_version() == before


def test_the_versions_of_the_libraries_are_part_of_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fresh_version()
    monkeypatch.setattr(hashing, "version", lambda library: "0.0.1")
    assert fresh_version() != before


def test_the_package_itself_has_a_version_that_a_copy_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_version.cache_clear()
    here = code_version("losses", "train", "logprobs/padded")
    copy = shutil.copytree(hashing.PACKAGE, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(hashing, "PACKAGE", copy)
    code_version.cache_clear()
    assert code_version("losses", "train", "logprobs/padded") == here
    engine = copy / "train" / "engine.py"
    engine.write_text(engine.read_text().replace("math.inf", "1e9"))
    code_version.cache_clear()
    assert code_version("losses", "train", "logprobs/padded") != here
    code_version.cache_clear()
