"""What ``sacct`` would tell, from ``scontrol``: the cluster has no accounting, but submitit asks it.

    sacct [-o FIELD,FIELD...] [-P] [-n] [-j JOB[,JOB...]]...

SLURM keeps jobs for an hour after their end; older ones are not found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

TIMEOUT = 10.0  # seconds
ACCOUNTED_AS = {"COMPLETING": "RUNNING", "CONFIGURING": "PENDING"}  # accounting knows neither
FIELDS = {
    "JobName": "JobName",
    "User": "UserId",
    "NodeList": "NodeList",
    "ExitCode": "ExitCode",
    "Submit": "SubmitTime",
    "Start": "StartTime",
    "End": "EndTime",
    "Elapsed": "RunTime",
    "Restarts": "Restarts",
    "Reason": "Reason",
}


def main() -> int:
    """Print a line a job (an array's waiting tasks share one), as sacct does with ``--parsable2``."""
    parser = argparse.ArgumentParser(
        prog="sacct", description="A stand-in for sacct on a cluster without accounting."
    )
    parser.add_argument("-o", "--format", default="JobID,JobName,State,ExitCode")
    parser.add_argument("-j", "--jobs", action="append", default=[])
    parser.add_argument("-P", "--parsable2", action="store_true", help="what it always does")
    parser.add_argument("-X", "--allocations", action="store_true", help="what it always does")
    parser.add_argument("-n", "--noheader", action="store_true")
    arguments = parser.parse_args()
    names = {name.lower(): name for name in ("JobID", "State", *FIELDS)}
    wanted = [word.split("%")[0] for word in arguments.format.split(",")]
    if strange := [word for word in wanted if word.lower() not in names]:
        parser.error(f"unknown field {strange[0]!r}; allowed: {', '.join(names.values())}")
    fields = [names[word.lower()] for word in wanted]
    told = subprocess.run(
        ["scontrol", "--oneliner", "show", "job"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if told.returncode:
        print(f"sacct: {told.stderr.strip()}", file=sys.stderr)
        return 1
    asked = {job for words in arguments.jobs for job in words.split(",")}
    if not arguments.noheader:
        print("|".join(fields))
    for line in told.stdout.splitlines():
        if line.startswith("JobId="):
            job = entry(line)
            if not asked or asked & {job["JobID"], job["JobID"].split("_")[0]}:
                print("|".join(job.get(field, "") for field in fields))
    return 0


def entry(line: str) -> dict[str, str]:
    """sacct's fields of one line of scontrol."""
    # The first of a name counts: what follows may stand in the job's command.
    told = dict(word.split("=", 1) for word in reversed(line.split()) if "=" in word)
    job = {field: told.get(name, "").replace("(null)", "") for field, name in FIELDS.items()}
    job["JobID"] = told["JobId"]
    if "ArrayJobId" in told:
        task = told["ArrayTaskId"]
        job["JobID"] = f"{told['ArrayJobId']}_{task if task.isdecimal() else f'[{task}]'}"
    job["User"] = job["User"].split("(")[0]
    job["State"] = ACCOUNTED_AS.get(told["JobState"], told["JobState"])
    return job


if __name__ == "__main__":
    sys.exit(main())
