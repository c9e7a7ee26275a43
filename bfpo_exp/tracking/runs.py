"""Creating an MLflow run for a folder, or finding the one that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bfpo_exp.tracking.client import experiment_id
from bfpo_exp.tracking.publication import Publication

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND = "bfpo.kind"  # tag: "sweep" for a parent, "run" for a child
LABEL = "bfpo.label"  # tag: the row that a run belongs to, its method or its loss
PARENT = "mlflow.parentRunId"
FAILURE = "failure"  # tag: why a run failed, in one line
REWARDS = "rewards"  # tag: who rewarded the responses of a run that was trained on rewards
EXACT = "judge (exact: an upper bound)"  # its value for the generated world's judge
TAGS_PER_CALL = PARAMS_PER_CALL = 100  # MLflow's limits
_TOKEN = "bfpo.publication"


def open_run(
    client: MlflowClient,
    publication: Publication,
    experiment: str,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """The id of the publication's MLflow run, in status RUNNING, with these params and tags.

    The run that the publication knows is reopened; where it is gone (another store, deleted), or
    there was none, one is created and everything has to be sent anew.
    """
    run = find_run(client, publication, experiment)
    if run is None:
        publication.restart()
        publication.save()
        tagged = {**tags, _TOKEN: publication.token}
        run = client.create_run(experiment_id(client, experiment), tags=tagged, run_name=name)
    run_id = str(run.info.run_id)
    publication.run_id, publication.status = run_id, "RUNNING"
    publication.save()
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if FAILURE in run.data.tags:
        client.delete_tag(run_id, FAILURE)
    log_params(client, run_id, params)
    log_tags(client, run_id, tags)
    return run_id


def find_run(client: MlflowClient, publication: Publication, experiment: str) -> Run | None:
    """The publication's run, if it is in the store and not deleted."""
    from mlflow.exceptions import MlflowException

    if publication.run_id is None:
        if not publication.path.exists():
            return None
        runs = client.search_runs(
            [experiment_id(client, experiment)], f"tags.`{_TOKEN}` = '{publication.token}'", max_results=1
        )
        return runs[0] if runs else None
    try:
        run = client.get_run(publication.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Send params; one that is there with the same value is left, another value is an error."""
    from mlflow.entities import Param

    rows = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(rows), PARAMS_PER_CALL):
        client.log_batch(run_id, params=rows[start : start + PARAMS_PER_CALL], synchronous=True)


def log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Send tags; the last value of each stays."""
    from mlflow.entities import RunTag

    rows = [RunTag(key, value) for key, value in tags.items()]
    for start in range(0, len(rows), TAGS_PER_CALL):
        client.log_batch(run_id, tags=rows[start : start + TAGS_PER_CALL], synchronous=True)
