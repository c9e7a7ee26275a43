"""How a process is set up before it computes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager


def before_imports() -> None:
    """Environment that libraries read when they are imported; what the user has set stays."""
    # All cores that this process may use.  Unset, it would be the same, but with a warning after every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def before_compute(threads: int) -> None:
    """Settings of the libraries: threads, no denormal numbers on CPU, no progress bars but our own."""
    import torch

    _once()
    # The order of sums, and so the last bits of every number, depends on the number of threads.
    torch.set_num_threads(threads)


@functools.cache
def _once() -> None:
    import torch

    if not torch.cuda.is_available():  # read where DeepSpeed is imported, if only by transformers
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import datasets
    import transformers

    # A saturated loss has denormal gradients, with which a CPU multiplies 5 to 20 times slower.
    torch.set_flush_denormal(True)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """So many threads for a stage, then as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
