"""Keys of content: hashes of what determines it."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stable_hash(value: Any) -> str:
    """Sixteen hex digits that depend on the value alone, not on the order of its keys.

    >>> stable_hash({"a": 1, "b": [2.0]}) == stable_hash({"b": [2.0], "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@functools.lru_cache
def code_version(*parts: str) -> str:
    """A hash of what the named modules or folders of this package compute.

    It is taken over syntax trees without docstrings, so an edited comment retrains nothing.  The
    versions of torch and transformers are part of it: they determine the numbers as well.
    """
    sources: list[Path] = []
    for part in parts:
        path = PACKAGE / part
        sources += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    trees = {
        str(source.relative_to(PACKAGE)): ast.dump(_without_docstrings(ast.parse(source.read_text())))
        for source in sources
    }
    return stable_hash([trees, version("torch"), version("transformers")])
