"""Tables of records on disk: their columns, and the one way to derive one from another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value

from bfpo_exp.hashing import stable_hash
from bfpo_exp.paths import writable_home

MESSAGES = List({"role": Value("string"), "content": Value("string")})

# `records.PairRecord`, column for column.
PAIR_FEATURES = Features(
    {
        "prompt": MESSAGES,
        "response_w": Value("string"),
        "response_l": Value("string"),
        "ordered": Value("bool"),
        "ranker": Value("string"),
        "safe_w": Value("float64"),
        "safe_l": Value("float64"),
        "safer": Value("string"),
        "stream": Value("string"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)

# A pair as read, before cleaning and ranking: what is wrong with it ("" for nothing) and, for the
# column ranker, the scores of its two responses in the order of the source.
STAGED_FEATURES = Features(
    {
        **PAIR_FEATURES,
        "dirt": Value("string"),
        "score_w": Value("float64"),
        "score_l": Value("float64"),
    }
)

# `records.DemoRecord`, column for column.
DEMO_FEATURES = Features(
    {
        "prompt": MESSAGES,
        "response": Value("string"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the ``datasets`` library inside."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def derive(
    table: Dataset,
    function: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    features: Features,
    made_of: Any,
) -> Dataset:
    """A table computed batch by batch from another one, kept on disk under the runs root.

    ``function`` takes the columns of a batch and the batch's row numbers and gives the columns of
    ``features``, of any length.  It is always run, since it may count as it goes; ``made_of``
    (plain JSON values that determine the result) names the file, so that the next run writes over
    it and the folder does not grow.
    """
    if not len(table):  # `map` would return it without any columns
        return Dataset.from_dict({column: [] for column in features}, features=features)
    fingerprint = stable_hash([table._fingerprint, made_of])
    folder = writable_home() / "datasets"
    folder.mkdir(exist_ok=True)
    with quiet():
        return table.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=table.column_names,
            features=features,
            load_from_cache_file=False,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
        )
