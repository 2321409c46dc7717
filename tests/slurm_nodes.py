"""A real Slurm on this machine, for tests: its daemons, from the distribution's packages, with two nodes that are this one."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

CONFIGURATION = Path("/etc/slurm/slurm.conf")  # the default place: jobs look for it there
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
# The nodes claim more than a small machine has (config_overrides), so that what the rules ask for fits.
TEXT = """
ClusterName=convx
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
KillWait=5
ReturnToService=2
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=64000
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=64000
PartitionName=main Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""


def absent() -> str | None:
    """Return why no Slurm can be started here, or None."""
    if os.getuid() != 0:
        return "starting Slurm's daemons takes root"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=_path())]:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    if CONFIGURATION.exists():
        return f"this machine has a Slurm of its own ({CONFIGURATION})"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Slurm:
    """The running daemons."""

    root: Path

    def ask(self, *command: str) -> str:
        """Return what a client program says."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def jobs(self) -> list[dict[str, str]]:
        """Return every job that Slurm remembers, finished ones too, as `scontrol show job` has it."""
        text = self.ask("scontrol", "show", "job", "--oneliner")
        return [
            dict(w.split("=", 1) for w in line.split() if "=" in w) for line in text.splitlines() if "JobId=" in line
        ]

    def job(self, comment: str, state: str | None = None) -> dict[str, str] | None:
        """Return the last job whose comment starts so, in a state if it is given."""
        found = [j for j in self.jobs() if j.get("Comment", "").startswith(comment) and state in (None, j["JobState"])]
        return found[-1] if found else None


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@contextlib.contextmanager
def slurm():
    """Start the daemons, yield :class:`Slurm` when both nodes are idle, stop them, and remove every file they wrote."""
    root = Path(tempfile.mkdtemp(prefix="convx-slurm-", dir="/tmp"))
    root.chmod(0o755)  # munge wants every user to reach its socket
    made = not CONFIGURATION.parent.exists()
    environment = os.environ | {"PATH": _path()}
    try:
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        for name in ("state", "spool.one", "spool.two"):
            (root / name).mkdir()
        CONFIGURATION.parent.mkdir(exist_ok=True)
        CONFIGURATION.write_text(TEXT.format(host=socket.gethostname(), root=root, ports=_ports(3)))
        munge = [
            "--key-file",
            "munge.key",
            "--socket",
            "munge.socket",
            "--pid-file",
            "munged.pid",
            "--log-file",
            "munged.log",
        ]
        munge += ["--seed-file", "munge.seed"]
        words = [word if word.startswith("--") else str(root / word) for word in munge]
        for command in (["munged", *words], ["slurmctld", "-c"], ["slurmd", "-N", "one"], ["slurmd", "-N", "two"]):
            subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
        found = Slurm(root)
        end = time.monotonic() + 60
        while found.ask("sinfo", "--noheader", "--Node", "--format", "%T").split() != ["idle", "idle"]:
            assert time.monotonic() < end, (root / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)
        yield found
    finally:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user", "root"], timeout=20, capture_output=True)
        _stop(root)
        CONFIGURATION.unlink(missing_ok=True)
        if made:
            CONFIGURATION.parent.rmdir()
        shutil.rmtree(root)


def _stop(root: Path) -> None:
    """End the daemons, the nodes first, and wait for them; what a job left running is ended with its node."""
    for name in ("slurmd.one", "slurmd.two", "slurmctld", "munged"):
        file = root / f"{name}.pid"
        if not file.exists():
            continue
        number = int(file.read_text())
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, sign)
            end = time.monotonic() + 10
            while alive(number) and time.monotonic() < end:
                time.sleep(0.05)


def alive(number: int) -> bool:
    """Return whether a process runs; a dead one that nobody has asked about does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
