"""Submit the shipped script as a user would, and watch the job."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from kvshift_megatron.training.metrics import read_metrics
from tests.slurm.cluster import OVER, Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/slurm/pretrain.sbatch"
MODEL = "tests/slurm/configs/tiny.toml"
LAYOUT = "tests/slurm/configs/four.toml"
STEPS = 100
_LAUNCH_SECONDS = 150  # two nodes' imports on a busy machine


@dataclass
class Job:
    """A submitted job.

    Attributes:
        number: Its id.
        run: Its run directory.
        output: The file that Slurm writes its output to.
        ranks_per_node: Ranks on each of the two nodes.
    """

    number: str
    run: Path
    output: Path
    ranks_per_node: int = 2

    def said(self) -> str:
        """Return what the job printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def status(self) -> list[dict]:
        """Return the attempts in status.json, oldest first."""
        return json.loads((self.run / "status.json").read_text())["attempts"]

    def rank_log(self, attempt: int, rank: int, stream: str = "stdout") -> str:
        """Return what a rank printed."""
        node, local = divmod(rank, self.ranks_per_node)
        pattern = f"attempts/{attempt:03d}/logs/node-{node}/*/attempt_0/{local}/{stream}.log"
        return "".join(path.read_text(errors="replace") for path in self.run.glob(pattern))

    def steps(self, attempt: int) -> list[int]:
        """Return the iterations for which the last rank printed a loss."""
        printed = self.rank_log(attempt, 2 * self.ranks_per_node - 1)
        lines = [line for line in printed.splitlines() if " lm loss: " in line]
        return [int(line.partition("] iteration")[2].partition("/")[0]) for line in lines]

    def losses(self) -> dict[int, float]:
        """Return iteration -> loss, exact, from the metrics of the last attempt that logged it."""
        entries = read_metrics(self.run / "metrics.jsonl")
        return {step: entry["lm loss"] for step, entry in entries.items() if "lm loss" in entry}

    def newest(self) -> int:
        """Return the iteration of the newest checkpoint; 0 if there is none."""
        tracker = self.run / "checkpoints/latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def processes(self) -> dict[int, dict[str, str]]:
        """Return pid -> environment of every process that srun started for the run."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "environ").read_text(errors="replace").split("\0")
            except OSError:
                continue  # ended meanwhile
            environment = dict(word.partition("=")[::2] for word in words)
            if environment.get("ATTEMPT", "").startswith(f"{self.run}/"):
                found[int(entry.name)] = environment
        return found

    def kill_rank(self, rank: int) -> None:
        """Send SIGKILL to the process of a rank, but not to its children."""
        processes = self.processes()
        ranks = [pid for pid, env in processes.items() if env.get("RANK") == str(rank)]
        children = {pid for pid in ranks if _parent(pid) in ranks}
        (process,) = set(ranks) - children
        os.kill(process, signal.SIGKILL)


class Jobs:
    """Submits jobs to a cluster.

    Args:
        cluster: A running cluster.
        folder: Holds the run directories and outputs.
    """

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster = cluster
        self.folder = folder

    def submit(
        self,
        name: str,
        *own: str,
        slurm: tuple[str, ...] = (),
        megatron: tuple[str, ...] = (),
        run: Path | None = None,
        steps: int = STEPS,
        tp: int = 2,
    ) -> Job:
        """Submit the script on two nodes.

        Args:
            name: Name of the output and, unless `run` is given, of the run directory.
            own: The script's own options.
            slurm: Further options of sbatch, which override these.
            megatron: Further flags after `--`.
            run: The run directory.
            steps: Value of train-iters.
            tp: Tensor-parallel size, which is also the number of GPUs and ranks per node.
        """
        run = run or self.folder / name
        output = self.folder / f"{name}.out"
        flags = ["--mock-data", "--num-workers=1", "--save-interval=1000", *megatron]
        layout = ["--set=tensor-model-parallel-size=1", "--set=sequence-parallel=false"]
        layout = layout if tp == 1 else []
        number = self.cluster.run(
            "sbatch", "--parsable", "--nodes=2", f"--gpus-per-node={tp}", "--time=30",
            f"--output={output}", *slurm,
            SCRIPT, str(run), MODEL, LAYOUT, f"--set=train-iters={steps}", *layout, *own,
            "--", *flags,
            # Compiling would take longer than these few steps.
            cwd=ROOT, TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1",
        )  # fmt: skip
        return Job(number.strip(), run, output, tp)

    def ended(self, job: Job, seconds: float = _LAUNCH_SECONDS) -> dict[str, str]:
        """Wait until the job is over, and return Slurm's fields of it."""
        return self.cluster.wait(job.number, OVER, seconds)

    def wait_for(self, job: Job, what: str, condition, seconds: float = _LAUNCH_SECONDS) -> None:
        """Wait until `condition()`; fail with the job's output if the job or the time ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            state = self.cluster.job(job.number)["JobState"]
            if state in OVER or time.monotonic() > deadline:
                raise AssertionError(f"waiting for {what}: {state}\n{job.said()[-5000:]}")
            time.sleep(0.1)

    def wait_for_step(self, job: Job, attempt: int, step: int) -> None:
        """Wait until an attempt has printed the loss of a step at or after `step`."""
        reached = lambda: max(job.steps(attempt), default=0) >= step  # noqa: E731
        self.wait_for(job, f"step {step} of attempt {attempt}", reached)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
