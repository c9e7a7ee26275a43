"""How far a folder has been published to MLflow: a small JSON file that survives kills."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path


def _token() -> str:
    return uuid.uuid4().hex


@dataclass
class Publication:
    """What one MLflow run already holds of the folder that it shows."""

    path: Path
    uri: str
    parent_id: str | None = None
    # A tag of the run from its creation on, before its id is known here: a process that was
    # killed in between finds its run again.
    token: str = field(default_factory=_token)
    run_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that were sent
    artifacts: dict[str, list[int]] = field(default_factory=dict)  # sent: name -> size, mtime in ns
    status: str = "RUNNING"

    @classmethod
    def load(cls, path: Path, uri: str, parent_id: str | None = None) -> Publication:
        """The publication kept at ``path``; a new one where that is missing or to another store."""
        if path.exists():
            kept = cls(path=path, **json.loads(path.read_text()))
            if kept.uri == uri:
                return kept
        return cls(path, uri, parent_id)

    def restart(self) -> None:
        """Forget what was sent: the next run starts empty."""
        self.token, self.run_id, self.offset, self.artifacts = _token(), None, 0, {}

    def save(self) -> None:
        """Write it whole or not at all."""
        state = asdict(self)
        del state["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.draft")
        draft.write_text(json.dumps(state, indent=1))
        os.replace(draft, self.path)
