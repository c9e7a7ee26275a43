"""Opening a source: rows of a data set on the hub, or of local files, and their fingerprint."""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from bfpo_exp.config.data import Source
from bfpo_exp.data.arrow import quiet
from bfpo_exp.errors import UserError
from bfpo_exp.paths import writable_home

KINDS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
MOVING = ("main", "master")  # branch names: what they point at changes
UNREADABLE = (DatasetsError, ValueError, OSError, EOFError, StopIteration)  # the last: an empty file


@dataclass(frozen=True)
class Rows:
    """The rows of a source: a memory-mapped table, and where each row came from."""

    table: Dataset
    name: str
    fingerprint: str
    files: list[Path] = field(default_factory=list)

    def where(self, row: int) -> str:
        """The source and, for files, the file that a row is in; rows count from 0."""
        if len(self.files) == 1:
            return f"source {self.name!r}, file {self.files[0]}, row {row}"
        for path in self.files:
            length = _load(self.name, [path]).num_rows
            if row < length:
                return f"source {self.name!r}, file {path}, row {row}"
            row -= length
        return f"source {self.name!r}, row {row}"


def open_rows(name: str, source: Source) -> Rows:
    """The rows of a source, read lazily from disk; a `UserError` where they cannot be read."""
    fingerprint = source_fingerprint(name, source)
    if source.files is not None:
        files = _paths(name, source.files)
        return Rows(_load(name, files), name, fingerprint, files)
    try:
        with quiet():
            table = load_dataset(source.hub, revision=source.revision, split=source.split)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"source {name!r}: cannot get {fingerprint} from the hub ({reason}); "
            "check hub, revision and split, or download its files elsewhere and set hub=null files=[...]"
        ) from None
    return Rows(table, name, fingerprint)


def source_fingerprint(name: str, source: Source) -> str:
    """What determines the rows: sha256 over the files' bytes, or hub@revision:split.

    Raises `UserError` for a source that names no rows, both kinds, or rows that may change.
    """
    if source.files is not None and source.hub is not None:
        raise UserError(f"source {name!r} has both hub={source.hub} and files; set one of them to null")
    if source.files is not None:
        return files_digest(_paths(name, source.files))
    if source.hub is None:
        raise UserError(
            f"source {name!r} has neither hub nor files; set hub=<id> revision=<commit>, or files=[...]"
        )
    if not source.revision or source.revision in MOVING:
        raise UserError(
            f"source {name!r}: hub={source.hub} has revision={source.revision or 'null'}, so its rows may "
            "change; pin it: revision=<commit hash>"
        )
    return f"{source.hub}@{source.revision}:{source.split}"


def kind_of(path: Path) -> str | None:
    """The format of a file by its ending, or None for an unknown one.

    >>> kind_of(Path("a.jsonl.gz")), kind_of(Path("v1.2.parquet")), kind_of(Path("a.csv"))
    ('json', 'parquet', None)
    """
    return next((kind for ending, kind in KINDS.items() if path.name.endswith(ending)), None)


def _paths(name: str, patterns: list[str]) -> list[Path]:
    """The files that the patterns name, in their order, those of one pattern sorted."""
    paths: list[Path] = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = sorted(glob.glob(expanded, recursive=True)) if glob.has_magic(expanded) else [expanded]
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise UserError(f"source {name!r}: no such file: {pattern}")
        paths += found
    if not paths:
        raise UserError(
            f"source {name!r}: files is an empty list; name files, or set files=null and hub=<id>"
        )
    kinds = {kind_of(path) for path in paths}
    if None in kinds or len(kinds) > 1:
        odd = next((path for path in paths if kind_of(path) is None), paths[-1])
        raise UserError(
            f"source {name!r}: cannot read {odd}; allowed: {', '.join(KINDS)}, of one kind in a source"
        )
    return paths


def files_digest(files: Sequence[Path]) -> str:
    """sha256 over the bytes of files, in their order; their names are not part of it.

    A file is read again only when its size or time of change is another.
    """
    stamps = ((path.absolute(), path.stat()) for path in files)
    return _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stamps))


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _load(name: str, files: list[Path]) -> Dataset:
    digest = files_digest(files)
    kind = kind_of(files[0])
    try:
        with quiet():
            return load_dataset(
                kind,
                data_files=[str(path) for path in files],
                split="train",  # the library's name for the rows of plain files
                cache_dir=str(writable_home() / "datasets" / digest[:16]),
            )
    except UNREADABLE as error:
        problem = _bad_line(files) if kind == "json" else None
        raise UserError(
            f"source {name!r}: "
            + (problem or f"cannot read {', '.join(map(str, files))}: {error.__cause__ or error}")
        ) from None


def _bad_line(files: list[Path]) -> str | None:
    """The first line that is no JSON object, where the files hold one a line."""
    for path in files:
        opener = gzip.open if path.name.endswith(".gz") else open
        rows = 0
        try:
            with opener(path, "rt", encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    if not line.strip():
                        continue
                    rows += 1
                    try:
                        found = json.loads(line)
                    except ValueError as error:
                        return f"file {path}, line {number}: not JSON ({error})"
                    if not isinstance(found, dict):
                        return f"file {path}, line {number}: expected an object, found {type(found).__name__}"
        except (OSError, EOFError, UnicodeDecodeError) as error:
            return f"file {path} cannot be read: {error}"
        if rows == 0:
            return f"file {path} has no rows"
    return None
