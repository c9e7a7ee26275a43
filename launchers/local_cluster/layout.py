"""What a cluster is and where its files are: everything under one root, named by `Layout`."""

from __future__ import annotations

import json
import os
import pwd
import random
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from local_cluster.errors import ClusterError

# Fake GPUs. SLURM sets CUDA_VISIBLE_DEVICES only for devices that exist, each of them another one.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
MOST_GPUS = len(DEVICES)
MOST_NODES = 16
PORTS = range(15000, 32000)  # below those that the kernel hands out to clients
LONGEST_SOCKET = 107  # bytes in the path of a Unix socket
MADE = ("bin", "ctld", "log", "run", "spool", "cluster.json", "gres.conf", "hosts", "munge.key", "slurm.conf")

# Half of these lines make it quick (no wait before a job is scheduled, a dead node noticed after half
# a minute and not five); the other half do without what needs root, cgroups or a database.
SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.own.pid
SlurmdPidFile={root}/run/slurmd.%n.own.pid
SlurmdLogFile={root}/log/%n.steps.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
KillWait={kill_wait}
MessageTimeout=10
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] \
CPUs=8 RealMemory=8000{gres} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE State=UP
"""
KILL_WAIT = 5  # seconds from a job's SIGTERM to its SIGKILL


@dataclass(frozen=True)
class Layout:
    """A cluster's size, ports and files.

    Attributes:
        root: folder that holds everything of it.
        nodes: number of nodes, which are called n1, n2, ...
        gpus: fake GPUs of each node.
        port: slurmctld's; the nodes have those that follow.
    """

    root: Path
    nodes: int
    gpus: int
    port: int

    @property
    def conf(self) -> Path:
        """slurm.conf."""
        return self.root / "slurm.conf"

    @property
    def bin(self) -> Path:
        """Folder that stands first in a user's PATH: it holds the stand-in for sacct."""
        return self.root / "bin"

    @property
    def hosts(self) -> Path:
        """The nodes' /etc/hosts, so that they find each other by name as on a real cluster."""
        return self.root / "hosts"

    @property
    def socket(self) -> Path:
        """Where clients and daemons reach munged."""
        return self.root / "run" / "munge.socket"

    @property
    def node_names(self) -> list[str]:
        """n1, n2, ..."""
        return [f"n{number + 1}" for number in range(self.nodes)]

    def write(self) -> None:
        """Write every file that the daemons read; those that are there are replaced, the key is kept."""
        if len(os.fsencode(self.socket)) > LONGEST_SOCKET:
            raise ClusterError(f"{self.root} is too long for a socket in it; give a shorter --root")
        self.root.chmod(0o755)  # munged refuses a socket that other users could not reach
        for name in ("bin", "ctld", "log", "run", "spool"):
            (self.root / name).mkdir(mode=0o755, exist_ok=True)
        for node in self.node_names:
            (self.root / "spool" / node).mkdir(mode=0o755, exist_ok=True)
        key = self.root / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        self.conf.write_text(self.slurm_conf())
        (self.root / "gres.conf").write_text(
            "".join(f"Name=gpu File={device}\n" for device in DEVICES[: self.gpus])
        )
        self.hosts.write_text(
            f"{Path('/etc/hosts').read_text().rstrip()}\n127.0.0.1 {' '.join(self.node_names)}\n"
        )
        sacct = self.bin / "sacct"
        script = Path(__file__).with_name("sacct.py")
        sacct.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        sacct.chmod(0o755)
        (self.root / "cluster.json").write_text(
            json.dumps({"nodes": self.nodes, "gpus": self.gpus, "port": self.port})
        )

    def slurm_conf(self) -> str:
        """The text of slurm.conf."""
        return SLURM_CONF.format(
            root=self.root,
            host=socket.gethostname().split(".")[0],  # slurmctld starts under the machine's own name only
            user=user(),
            socket=self.socket,
            nodes=self.nodes,
            gres=f" Gres=gpu:{self.gpus}" if self.gpus else "",
            ports=(self.port, self.port + 1, self.port + self.nodes),
            kill_wait=KILL_WAIT,
        )


def user() -> str:
    """Name of the user that runs this, whose cluster it is going to be."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ClusterError(f"user {os.geteuid()} has no name in /etc/passwd, which SLURM needs") from None


def read(root: Path) -> Layout | None:
    """The cluster that was made in ``root``; None if there is none."""
    try:
        return Layout(root, **json.loads((root / "cluster.json").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"{root / 'cluster.json'} cannot be read ({error})") from None


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on; drawn, so that two starts differ."""
    for _ in range(100):
        first = random.choice(PORTS[:-count])
        if all(is_free(port) for port in range(first, first + count)):
            return first
    raise ClusterError(f"no {count} neighbouring free ports found from {PORTS.start} to {PORTS.stop}")


def is_free(port: int) -> bool:
    """Whether a server may listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
