"""Configs and names in the form that MLflow takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_PARAM = 6000  # characters of a value; MLflow cuts silently beyond
_NOTE = " ... (cut; the whole value is in config.yaml)"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as MLflow params: dotted names, values as they are written in YAML.

    >>> flatten({"loss": {"name": "bfpo", "alpha": 0.5}, "method": None, "stages": ["sft"]})
    {'loss.name': 'bfpo', 'loss.alpha': '0.5', 'method': 'null', 'stages': '["sft"]'}
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[mlflow_name(name)] = (
                text if len(text) <= MAX_PARAM else text[: MAX_PARAM - len(_NOTE)] + _NOTE
            )
    return flat


def mlflow_name(name: str) -> str:
    """A name of a param or metric with what MLflow refuses replaced.

    >>> mlflow_name("eval/task/hhh (v2)")
    'eval/task/hhh _v2_'
    """
    return re.sub(r"[^\w\-./ ]", "_", name)
