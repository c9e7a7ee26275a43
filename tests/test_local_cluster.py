"""The local SLURM: it schedules, binds GPUs, survives what it should and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import cluster, layout, machine
from local_cluster.cluster import Cluster, locked, start
from local_cluster.errors import ClusterError
from local_cluster.layout import Layout
from local_cluster.sacct import entry
from slurm_support import LOCAL_CLUSTER, Slurm, a_cluster, alive, local_cluster, processes

pytestmark = pytest.mark.slurm


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder for a cluster of the test's own."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield folder
    assert local_cluster("stop", root=folder).returncode == 0
    shutil.rmtree(folder, ignore_errors=True)


def test_a_job_runs_on_two_nodes_that_know_each_other_by_name(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, "srun sh -c 'echo $(hostname) $(getent hosts n1 n2 | wc -l)'", "--nodes=2")
    slurm.wait(job)
    assert sorted((tmp_path / f"{job}.out").read_text().splitlines()) == ["n1 2", "n2 2"]


def test_every_task_of_an_array_runs_once(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path, "echo $SLURM_ARRAY_TASK_ID", "--array=0-3")
    slurm.wait(job)
    assert sorted((tmp_path / f"{job}.out").read_text().split()) == ["0", "1", "2", "3"]
    assert slurm.states(job) == {f"{job}_{task}": "COMPLETED" for task in range(4)}


def test_each_task_sees_its_own_gpu(slurm: Slurm, tmp_path: Path) -> None:
    script = "srun sh -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'"
    job = slurm.submit(tmp_path, script, "--nodes=2", "--ntasks-per-node=4", "--gpus-per-task=1")
    slurm.wait(job)
    seen = (tmp_path / f"{job}.out").read_text().splitlines()
    assert sorted(seen) == [f"n{node} {gpu}" for node in (1, 2) for gpu in range(4)]


def test_jobs_at_the_same_time_share_out_a_nodes_gpus(slurm: Slurm, tmp_path: Path) -> None:
    options = ("--nodelist=n1", "--gpus=2", "--ntasks=1")
    jobs = [slurm.submit(tmp_path, "echo $CUDA_VISIBLE_DEVICES; sleep 300", *options) for _ in range(3)]
    assert sorted(slurm.output(tmp_path, job)[0] for job in jobs[:2]) == ["0,1", "2,3"]
    assert slurm.states(jobs[2]) == {jobs[2]: "PENDING"}, "four GPUs are two jobs"
    slurm.run("scancel", *jobs)
    for job in jobs:
        slurm.wait(job, "CANCELLED")


def test_the_stand_in_for_sacct_tells_how_jobs_ended(slurm: Slurm, tmp_path: Path) -> None:
    ends = {"exit 3": ("FAILED", "3:0"), "kill -9 $$": ("FAILED", "0:9"), "true": ("COMPLETED", "0:0")}
    jobs = {slurm.submit(tmp_path, script, "--job-name", "end"): told for script, told in ends.items()}
    for job, (state, _) in jobs.items():
        slurm.wait(job, state)
    asked = [word for job in jobs for word in ("-j", job)]
    told = slurm.run("sacct", "-o", "JobID,State,ExitCode,JobName", "--parsable2", *asked).splitlines()
    assert told[0] == "JobID|State|ExitCode|JobName"
    assert sorted(told[1:]) == sorted(f"{job}|{state}|{code}|end" for job, (state, code) in jobs.items())
    refused = subprocess.run(
        ["sacct", "-o", "JobId,Stat"], env=slurm.environment, capture_output=True, text=True, timeout=20
    )
    assert refused.returncode == 2
    assert "unknown field 'Stat'; allowed: JobID, State," in refused.stderr


def test_waiting_tasks_of_an_array_share_a_line_of_sacct() -> None:
    line = "JobId=7 ArrayJobId=7 ArrayTaskId=2-3,5 JobName=x JobState=PENDING NodeList=(null)"
    job = entry(f"{line} Command=a JobState=X")
    assert (job["JobID"], job["State"], job["NodeList"]) == ("7_[2-3,5]", "PENDING", "")


def test_started_twice_it_says_that_it_runs(slurm: Slurm) -> None:
    before = processes(slurm)
    again = slurm.call("start")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("runs already: 2 nodes, 4 GPUs each")
    assert processes(slurm).keys() >= before.keys()
    refused = slurm.call("start", "--nodes", "3")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--nodes 3, but the cluster in" in refused.stderr


def test_status_and_env(slurm: Slurm) -> None:
    status = slurm.call("status")
    assert status.returncode == 0
    assert re.search(r"^n2 +process \d+, SLURM says \w+", status.stdout, re.MULTILINE)
    env = slurm.call("env").stdout
    told = subprocess.run(
        ["sh", "-c", f"{env}\nsinfo -h -o %D; command -v sacct"], capture_output=True, text=True, timeout=20
    )
    assert told.stdout.split() == ["2", str(slurm.root / "bin" / "sacct")]


def test_its_daemons_listen_on_loopback_only(slurm: Slurm) -> None:
    ports = range(slurm.cluster.layout.port, slurm.cluster.layout.port + 3)
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    bound = [local.split(":") for _, local, _, state, *_ in sockets if state == "0A"]
    found = {int(port, 16): address for address, port in bound if int(port, 16) in ports}
    assert found == dict.fromkeys(ports, "0100007F")


@pytest.mark.slow
def test_a_killed_node_takes_its_processes_along_and_its_job_runs_again(slurm: Slurm, tmp_path: Path) -> None:
    script = "echo $(hostname) ${SLURM_RESTART_COUNT:-0}; setsid sleep 300 & sleep 300"
    job = slurm.submit(tmp_path, script)
    (told,) = slurm.output(tmp_path, job)
    node, other = ("n1", "n2") if told == "n1 0" else ("n2", "n1")
    time.sleep(0.5)  # until both sleep
    before = processes(slurm)
    slurm.kill_node(node)
    try:
        ended = len(before) - len(alive(before))
        assert ended >= 6, "unshare, its shell, slurmd, slurmstepd, the script, and what it started"
        dead = slurm.call("status")
        assert dead.returncode == 3
        assert f"{node}         dead" in dead.stdout
        assert slurm.output(tmp_path, job, lines=2, seconds=90)[-1] == f"{other} 1"
    finally:
        slurm.start_node(node)
        slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")


def test_stop_leaves_nothing(tmp_path: Path) -> None:
    with a_cluster() as slurm:
        deaf = "trap '' TERM; setsid sleep 300 & nohup sleep 300 & echo; while true; do sleep 1; done"
        slurm.output(tmp_path, slurm.submit(tmp_path, deaf))
        found = processes(slurm)
        assert len(alive(found)) >= 10
    assert alive(found) == []
    assert not slurm.root.exists()
    again = slurm.call("stop")
    assert (again.returncode, again.stdout) == (0, f"nothing runs in {slurm.root}\n")


@pytest.mark.slow
def test_after_a_crash_of_everything_it_starts_with_its_queue(tmp_path: Path) -> None:
    with a_cluster() as slurm:
        saved = slurm.root / "ctld" / "job_state"
        job = slurm.submit(tmp_path, "hostname", "--hold", "--job-name=kept-through-a-crash")
        end = time.monotonic() + 60
        while not saved.exists() or b"kept-through-a-crash" not in saved.read_bytes():  # every few seconds
            assert time.monotonic() < end
            time.sleep(0.2)
        found = processes(slurm)
        for daemon in slurm.cluster.daemons:
            os.kill(daemon.pid() or 0, signal.SIGKILL)
        time.sleep(1)
        assert alive(found) == []
        assert slurm.call("status").returncode == 3
        assert slurm.call("start").returncode == 0
        assert slurm.states(job) == {job: "PENDING"}
        slurm.run("scontrol", "release", job)
        slurm.wait(job)


def as_nobody() -> tuple[str, ...]:
    """The beginning of a command line that an ordinary user types; skips where nobody can be one."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    become = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs")
    for python in (sys.executable, "/usr/bin/python3"):
        tried = subprocess.run([*become, python, "-c", "import ctypes"], capture_output=True, timeout=20)
        if not tried.returncode:
            return (*become, python)
    pytest.skip("no Python here that the user nobody can start")


def test_an_ordinary_user_has_a_cluster_of_his_own() -> None:
    become = as_nobody()
    if why := machine.unavailable():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        home = Path(folder)
        shutil.copytree(LOCAL_CLUSTER, home / "local_cluster", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.chown(home, "nobody", "nogroup")
        home.chmod(0o755)
        root = home / "c"
        command = (*become, "-B", str(home / "local_cluster"))
        started = local_cluster("start", root=root, before=command)
        assert started.returncode == 0, started.stderr
        try:
            slurm = Slurm(root, lambda *words: local_cluster(*words, root=root, before=command))
            script = "srun sh -c 'echo $(hostname) $(whoami) $CUDA_VISIBLE_DEVICES'"
            options = ("--parsable", "--wait", "--nodes=2", "--gpus-per-node=1", f"--output={home}/out")
            slurm.run(*become[:-1], "sbatch", *options, "--wrap", script, cwd=home)
            assert sorted((home / "out").read_text().splitlines()) == ["n1 nobody 0", "n2 nobody 0"]
            refused = local_cluster("stop", root=root)
            assert refused.stderr == f"local_cluster: {root} belongs to another user; give another --root\n"
            found = processes(slurm)
            slurm.kill_node("n2")
            assert len(alive(found)) <= len(found) - 3
        finally:
            assert local_cluster("stop", root=root, before=command).stdout == "stopped\n"
        assert alive(found) == []


def test_pid_files_that_lie_kill_nobody(tmp_path: Path) -> None:
    made = Cluster(Layout(tmp_path, nodes=1, gpus=0, port=15000))
    made.layout.write()
    with subprocess.Popen(["sleep", "300"]) as sleeper:
        for text in (str(sleeper.pid), "1", "-1", "0", "words", ""):
            for daemon in made.daemons:
                daemon.pid_file.write_text(text)
                assert daemon.pid() is None
            made.kill()
            assert not list((tmp_path / "run").glob("*.pid"))
        assert sleeper.poll() is None
        sleeper.kill()


def test_a_daemon_that_ends_is_told_with_its_last_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := machine.unavailable():
        pytest.skip(why)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(cluster, "free_ports", lambda count: taken.getsockname()[1])
        with pytest.raises(ClusterError, match=r"^slurmctld ended: .*already in use.*/log/slurmctld\.log"):
            start(root)
    left = layout.read(root)
    assert left is not None
    assert not any(daemon.pid() for daemon in Cluster(left).daemons)


def test_without_slurm_it_names_the_packages(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(machine, "program", lambda name: f"/nowhere/{name}")
    with pytest.raises(ClusterError) as told:
        start(root)
    packages = "munge slurmctld slurmd slurm-client"
    assert str(told.value) == f"SLURM is not installed: apt-get install --no-install-recommends {packages}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["start", "--nodes", "0"], "'0' is not a whole number from 1 to 16"),
        (["start", "--gpus", "two"], "'two' is not a whole number from 0 to 6"),
        (["env"], "no cluster in"),
        (["kill-node", "n1"], "no cluster in"),
    ],
)
def test_bad_input_is_told_in_a_line(arguments: list[str], told: str, root: Path) -> None:
    done = local_cluster(*arguments, root=root)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_unknown_node_is_refused(slurm: Slurm) -> None:
    done = slurm.call("kill-node", "n3")
    assert (done.returncode, done.stderr) == (2, "local_cluster: unknown node 'n3'; allowed: n1, n2\n")


def test_a_folder_with_other_things_is_left_alone(root: Path) -> None:
    if why := machine.unavailable():
        pytest.skip(why)
    (root / "thesis.tex").write_text("years of work")
    with pytest.raises(ClusterError, match=r"holds other things \(thesis\.tex\)"):
        start(root)
    assert [path.name for path in root.iterdir()] == ["thesis.tex"]


def test_a_root_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(ClusterError, match="give a shorter --root"):
        Layout(deep, nodes=1, gpus=0, port=15000).write()


def test_one_command_at_a_time(root: Path) -> None:
    with locked(root):
        waiting = subprocess.Popen(
            [sys.executable, str(LOCAL_CLUSTER), "stop", "--root", str(root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
    assert waiting.communicate(timeout=20)[0] == f"nothing runs in {root}\n"
