"""Run a real Slurm on one host: munged, slurmctld and two slurmd, isolated from everything else.

All of it, jobs included, lives in namespaces of its own. The network namespace has only a loopback
interface, so that no packet can leave and no port can be taken. When the first process of the PID
namespace dies, all others die with it. It dies with the process that started the cluster, however
that ends.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "setpriv")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
_GPUS = 8  # per node; device files that only have to exist
_START_SECONDS = 60

_SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=n[1-2] NodeHostname=n[1-2] NodeAddr=127.0.0.1 Port=[16818-16819] CPUs=8 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# No cgroup is touched: the mount point does not exist.
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/nonexistent\n"
_GRES_CONF = "AutoDetect=off\nNodeName=n[1-2] Name=gpu File={base}/dev/nvidia[0-{last}]\n"
# Each slurmd has a host name of its own, which scripts ask for. The names resolve to loopback
# addresses. The second address is needed because a host that has only 127.0.0.1 counts as having no
# IPv4, and no name would resolve.
_INIT = """\
set -e
ip link set lo up
ip address add 127.0.0.2/8 dev lo
mount --bind {base}/hosts /etc/hosts
munged -F --force --key-file={base}/munge/key --socket={base}/munge/socket \
  --pid-file={base}/munge/pid --log-file={base}/munge/log \
  --seed-file={base}/munge/seed --num-threads=2 &
while [ ! -S {base}/munge/socket ]; do sleep 0.02; done
slurmctld -D -f {base}/slurm.conf &
for node in {nodes}; do
  unshare --uts sh -c "hostname $node; exec slurmd -D -N $node -f {base}/slurm.conf" &
done
wait
"""


def missing() -> list[str]:
    """Return what this machine lacks to run a cluster, in words; empty if nothing."""
    lacking = [name for name in (*PROGRAMS, "ip") if shutil.which(name, path=_PATH) is None]
    if os.geteuid():
        lacking.append("root")
    return lacking


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running cluster, as a context manager. Commands run inside its namespaces.

    Args:
        base: An empty folder for keys, state and logs.

    Raises:
        RuntimeError: It did not come up; the message holds the ends of the daemons' logs.
    """

    def __init__(self, base: Path):
        self.base = base
        for name in ("munge", "state", "log", "dev", *(f"spool/{node}" for node in NODES)):
            (base / name).mkdir(parents=True)
        key = base / "munge/key"
        key.touch(mode=0o400)
        with os.fdopen(os.open(key, os.O_WRONLY), "wb") as file:
            file.write(os.urandom(1024))
        for gpu in range(_GPUS):
            os.mknod(base / f"dev/nvidia{gpu}", 0o20666, os.makedev(1, 3))  # as /dev/null
        values = {"base": base, "gpus": _GPUS, "last": _GPUS - 1, "nodes": " ".join(NODES)}
        (base / "slurm.conf").write_text(_SLURM_CONF.format(**values))
        (base / "cgroup.conf").write_text(_CGROUP_CONF)
        (base / "gres.conf").write_text(_GRES_CONF.format(**values))
        names = ("localhost", socket.gethostname(), *NODES)
        (base / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        (base / "init.sh").write_text(_INIT.format(**values))
        self._process: subprocess.Popen | None = None
        self._init = 0

    def __enter__(self) -> "Cluster":
        with open(self.base / "log/init.out", "wb") as output:
            # setpriv has unshare, and with it the init, killed when this process ends.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork",
                 "--kill-child=SIGKILL", "--mount-proc", "bash", str(self.base / "init.sh")],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "PATH": _PATH}, cwd="/",
            )  # fmt: skip
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and of its jobs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command inside and return its standard output.

        Raises:
            RuntimeError: It failed; the message holds both of its outputs.
        """
        result = self.try_run(*command, cwd=cwd, **environment)
        if result.returncode:
            raise RuntimeError(f"{command}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def try_run(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a command inside, whatever its exit status."""
        inside = ["nsenter", f"--target={self._init}", "--mount", "--net", "--pid", "--"]
        # In the mount namespace the working directory would be its root.
        start = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or "/"), *command]
        environment = {"SLURM_CONF": str(self.base / "slurm.conf"), **environment}
        return subprocess.run(
            [*inside, *start],
            env={**os.environ, "PATH": _PATH, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; `12_3` names a task of an array."""
        fields = re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", job))
        return dict(fields)

    def set_node_down(self, node: str) -> None:
        """Set a node down, which ends the jobs on it, and wait until it is back."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        deadline = time.monotonic() + 30
        while "down" in self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{node} stays down")
            # Refused if its slurmd has already registered it again.
            self.try_run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            time.sleep(0.2)

    def start_again(self, job: str, seconds: float = 30) -> None:
        """Let a requeued job start at once, instead of after Slurm's two minutes."""
        self.wait(job, {"PENDING"}, seconds)
        # Within the second in which its first credential was revoked, a new one is invalid too.
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, job: str, states: set[str], seconds: float) -> dict[str, str]:
        """Wait until the job is in one of the states, and return its fields.

        Raises:
            TimeoutError: After `seconds`, or if the job is over in another state.
        """
        deadline = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] not in states:
            if fields["JobState"] in OVER or time.monotonic() > deadline:
                output = Path(fields["StdOut"])
                said = output.read_text(errors="replace")[-5000:] if output.exists() else ""
                raise TimeoutError(f"job {job} is {fields['JobState']}, not {states}\n{said}")
            time.sleep(0.2)
        return fields

    def _wait_until_up(self) -> None:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            self._init = int((children.read_text().split() or ["0"])[0])
            if self._init and (self.base / "munge/socket").exists():
                idle = self.try_run("sinfo", "-h", "-t", "idle", "-o", "%D")
                if idle.stdout.strip() == str(len(NODES)):
                    return
            time.sleep(0.1)
        logs = sorted((self.base / "log").iterdir())
        tails = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)
        raise RuntimeError(f"the cluster did not come up in {_START_SECONDS} s\n{tails}")
