"""The stage of ``loss=steerlm``."""

from __future__ import annotations

from bfpo_exp.stages.context import Context, Weights


def policy(context: Context, start: Weights) -> Weights:
    """``start``, fine-tuned on the pairs' responses with their levels in the prompt."""
    raise NotImplementedError
