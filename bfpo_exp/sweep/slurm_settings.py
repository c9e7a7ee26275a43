"""What a sweep asks of SLURM, checked before anything is written down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from bfpo_exp.config.check import validated
from bfpo_exp.config.types import Count, Strict
from bfpo_exp.errors import UserError

# What the launcher sets itself, or has a setting for; a second word on it could only contradict it.
OWN = (
    "account", "array", "constraint", "cpus-per-task", "dependency", "gpus-per-node", "job-name", "mem",
    "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition",
    "qos", "requeue", "signal", "time", "wait", "wrap",
)  # fmt: skip
FORMS = {
    "time": (re.compile(r"(\d+-)?\d+(:\d+){0,2}"), "minutes, hours:minutes:seconds, or days-hours"),
    "mem": (re.compile(r"\d+[KMGT]?"), "a number with K, M, G or T"),
}


def _written(value: Any, info: ValidationInfo) -> Any:
    """A time or size in one of SLURM's forms, where a bare number is one."""
    form, allowed = FORMS[str(info.field_name)]
    if value is None or isinstance(value, bool) or not form.fullmatch(str(value)):
        raise ValueError(f"allowed are {allowed}")
    return str(value)


Word = Annotated[str, Field(min_length=1, pattern=r"^[^\s\"']+$")]
Written = Annotated[str, BeforeValidator(_written)]


class SlurmSettings(Strict):
    """The launcher's settings; each is explained in ``conf/hydra/launcher/slurm.yaml``."""

    partition: Word | None
    account: Word | None
    qos: Word | None
    constraint: Word | None
    nodes: Count
    gpus_per_node: Annotated[int, Field(ge=0)]
    tasks_per_node: Count | None
    cpus_per_task: Count | None
    mem: Written | None
    time: Written | None
    array_parallelism: Count | None
    runs_per_job: Count
    options: dict[str, str | int | float | bool] | None
    setup: list[str]
    python: str | None
    seconds_before_limit: Annotated[int, Field(ge=1, le=65535)]
    requeues: Annotated[int, Field(ge=0)]
    wait: bool

    @property
    def tasks(self) -> int:
        """Processes on each node: one a GPU, unless that is set."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """Processes of a run."""
        return self.nodes * self.tasks

    @field_validator("options")
    @classmethod
    def _not_own(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in options or {}:
            if name in OWN:
                raise ValueError(f"the launcher sets {name} itself")
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
                raise ValueError(f"{name!r} is no long option of sbatch (written without its dashes)")
        return options

    @model_validator(mode="after")
    def _packs_are_of_single_processes(self) -> SlurmSettings:
        if self.runs_per_job > 1 and self.processes > 1:
            raise ValueError(
                f"runs_per_job={self.runs_per_job} packs small runs into a job of one process, but a run has "
                f"{self.processes} (nodes={self.nodes}, {self.tasks} on each)"
            )
        return self

    def resources(self) -> list[str]:
        """The options of sbatch that say what a job gets."""
        named = {
            "partition": self.partition, "account": self.account, "qos": self.qos,
            "constraint": self.constraint, "nodes": self.nodes, "ntasks-per-node": self.tasks,
            "gpus-per-node": self.gpus_per_node or None, "cpus-per-task": self.cpus_per_task,
            "mem": self.mem, "time": self.time,
        }  # fmt: skip
        given = {name: value for name, value in named.items() if value is not None} | (self.options or {})
        return [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in given.items()
            if value is not False
        ]


def checked_settings(values: Mapping[str, Any]) -> SlurmSettings:
    """The typed settings; a `UserError` for the first that is out of type or range."""
    try:
        return validated(SlurmSettings, dict(values), prefix="hydra.launcher.")
    except UserError as error:
        # What concerns several settings has no name of its own.
        raise UserError(str(error).replace("hydra.launcher.: ", "hydra.launcher: ")) from None
