"""A real Slurm cluster on this machine, up in a second: munged, slurmctld and a slurmd for each virtual node.

Every node has its own UTS, PID and mount namespace, so that it has a host name of its own and dies as a whole when its
first process is killed. Everything lies in one folder, listens on the loopback interface only, and dies with the thread
that has started it. Clusters do not meet: each has ports and numbers of jobs of its own.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.helpers import wait_until

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
"""Each with the Debian package that holds it."""
CPUS_PER_NODE, GPUS_PER_NODE = 16, 4
PREEMPTION_GRACE_SECONDS = 10
PORTS, PORTS_PER_CLUSTER = range(32_000, 32_768), 8
"""Above those of jobs (launch/slurm/network.py), below those that the kernel gives to outgoing connections."""
JOBS_PER_CLUSTER = 200
# Run with the name of a host and its hosts file in force; the node's first process reaps and ends with slurmd.
_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; '
_NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
_AS_USER = ("--user", "--map-current-user", "--keep-caps")


def missing_programs() -> str:
    """Return what is wanted for a cluster and not there, with the command that installs it; empty if all is there."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = {name: package for name, package in PROGRAMS.items() if shutil.which(name, path=path) is None}
    if not missing:
        return ""
    packages = " ".join(sorted(set(missing.values())))
    return f"no {', '.join(missing)}: apt-get install --no-install-recommends {packages}"


class SlurmCluster:
    """A cluster of so many nodes, from `start` to `stop`.

    Args:
        root: an empty folder with a short path, since names of unix sockets end at 107 bytes.
    """

    def __init__(self, num_nodes: int, root: Path) -> None:
        self.root = root
        self._claim = claim_ports()
        self._first_port = self._claim.getsockname()[1] + 1
        self.nodes = [f"node{index}" for index in range(1, num_nodes + 1)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "TMPDIR": str(self.root / "tmp"),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        for folder in ("state", "spool", "log", "dev", "tmp"):
            (self.root / folder).mkdir()
        self._write_configuration()
        socket_path = self.root / "munge.sock"
        munged = ["munged", "-F", "--force", f"--socket={socket_path}", f"--key-file={self.root}/munge.key"]
        files = [f"--{name}-file={self.root}/munged.{name}" for name in ("pid", "log", "seed")]
        self._spawn("munged", [*munged, *files])
        wait_until(socket_path.exists, "munged answers")
        self._spawn("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.root / "slurm.conf")])
        wait_until(lambda: is_listening(self._first_port), "slurmctld answers")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every daemon, and with a node all that runs on it."""
        for name in [*self.nodes, "slurmctld", "munged"]:
            process = self._processes.pop(name, None)
            if process is not None:
                process.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
                process.wait(timeout=20)
        self._claim.close()

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        (self.root / "spool" / node).mkdir(exist_ok=True)
        namespaces = [*_NAMESPACES, *(() if os.geteuid() == 0 else _AS_USER)]
        slurmd = ["slurmd", "-D", "-N", node, "-f", str(self.root / "slurm.conf")]
        enter = ["sh", "-ec", f'{_ENTER}"$@" & wait $!', "sh", node, str(self.root / f"hosts.{node}")]
        self._spawn(node, [*namespaces, *enter, *slurmd])

    def kill_node(self, node: str) -> None:
        """Pull the plug of a node."""
        process = self._processes.pop(node)
        process.kill()
        process.wait(timeout=20)

    def pause_controller(self) -> None:
        """Let the controller answer nobody."""
        self._processes["slurmctld"].send_signal(signal.SIGSTOP)

    def resume_controller(self) -> None:
        """Let the controller go on."""
        self._processes["slurmctld"].send_signal(signal.SIGCONT)

    def wait_for_nodes(self, *, seconds: float = 60) -> None:
        """Wait until every node takes jobs."""
        wait_until(lambda: set(self.node_states()) <= {"idle", "mixed", "allocated"}, "all nodes up", seconds=seconds)

    def node_states(self) -> list[str]:
        """Return the state of every node."""
        return self.ask("sinfo", "--noheader", "--Node", "--partition", "main", "--format", "%T").split() or ["unknown"]

    def ask(self, *command: str) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # Ctrl-C is for the tests, which stop the cluster
            )

    def _write_configuration(self) -> None:
        addresses = {node: f"127.0.1.{index}" for index, node in enumerate(self.nodes, start=1)}
        for node in self.nodes:
            # A node's own name is 127.0.0.1: there srun is called back, and otherwise hangs without a word.
            others = "".join(f"{address} {name}\n" for name, address in addresses.items() if name != node)
            (self.root / f"hosts.{node}").write_text(f"127.0.0.1 {node} localhost\n{others}")
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for index in range(GPUS_PER_NODE):  # Slurm wants a device file for each; nobody opens it
            (self.root / "dev" / f"gpu{index}").symlink_to("/dev/null")
        names = ",".join(self.nodes)
        (self.root / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={names} Name=gpu File={self.root}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )
        (self.root / "cgroup.conf").write_text("")
        user = pwd.getpwuid(os.geteuid()).pw_name
        port = self._first_port
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + index} CPUs={CPUS_PER_NODE} "
            f"Sockets=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1 RealMemory=65536 Gres=gpu:{GPUS_PER_NODE} "
            "State=UNKNOWN"
            for index, node in enumerate(self.nodes, start=1)
        ]
        first_job = 1 + (port - PORTS.start) // PORTS_PER_CLUSTER * JOBS_PER_CLUSTER
        facts = {"root": self.root, "port": port, "first_job": first_job, "user": user, "names": names}
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(**facts, grace=PREEMPTION_GRACE_SECONDS) + "\n".join(nodes) + "\n"
        )


# No cgroups; believed CPU counts; reactions in seconds that take minutes elsewhere (the requeue delay is the lifetime
# of a credential).
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
GresTypes=gpu
ReturnToService=2
JobRequeue=1
SlurmdTimeout=5
KillWait=5
MinJobAge=3600
InactiveLimit=0
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
PartitionName=main Nodes={names} Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=preempt Nodes={names} PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=ended Nodes={names} PriorityTier=1 PreemptMode=CANCEL GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={names} PriorityTier=100 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def claim_ports() -> socket.socket:
    """Listen on the first of PORTS_PER_CLUSTER ports that nobody uses; they are ours until it is closed."""
    for first in PORTS[::PORTS_PER_CLUSTER]:
        try:
            claim = socket.create_server(("127.0.0.1", first))
        except OSError:
            continue  # another cluster's
        if not any(is_listening(first + index) for index in range(1, PORTS_PER_CLUSTER)):
            return claim
        claim.close()
    raise OSError(f"no {PORTS_PER_CLUSTER} free ports in a row from {PORTS.start} to {PORTS.stop}")


def is_listening(port: int) -> bool:
    """Whether somebody answers on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
