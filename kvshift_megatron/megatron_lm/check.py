"""Train Megatron-LM's unmodified pretrain_gpt.py with KV shifting and compare the losses.

    kvshift-check --megatron-path CHECKOUT

CHECKOUT is a git checkout of a released Megatron-LM. Its script runs on this machine's CPU with
`--spec`, on two ranks: tensor parallel, then pipeline parallel. The same flags then run through
this project's entry point on the installed megatron-core. Every step's loss must agree, and that of
the baseline model must not. Exit status: 0 if so, 1 if not, 2 if the checkout cannot be used.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from kvshift_megatron.megatron_lm.checkouts import CheckoutError, git, release_of, series
from kvshift_megatron.utils import launchers

STEPS = 20
RANKS = 2
TIMEOUT = 600.0  # seconds for one run; they take under 60 on two idle cores
# Relative, fp32. Megatron logs a loss to 7 digits, so no difference below 1e-6 can be seen.
TOLERANCE = 1e-5
# The baseline model must differ by this much: else the comparison proves nothing about the shift.
BASELINE_DISTANCE = 100 * TOLERANCE

LAYOUTS = {
    "TP 2": ["--tensor-model-parallel-size", str(RANKS)],
    "PP 2": ["--pipeline-model-parallel-size", str(RANKS)],
}
FLAGS = f"""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4
    --group-query-attention --num-query-groups 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-3
    --hidden-dropout 0 --attention-dropout 0
    --mock-data --tokenizer-type NullTokenizer
    --log-interval 1 --eval-iters 0 --eval-interval 1000
""".split()  # fmt: skip


@dataclass(frozen=True)
class Release:
    """What differs between releases on the command line.

    Attributes:
        spec: Value of `--spec`, which before 0.19 takes only a static spec.
        vocab_size: Gives the NullTokenizer 128 tokens. Before 0.18 it adds one of its own.
    """

    spec: str
    vocab_size: int = 128


_STATIC_SPEC = "kvshift_megatron.static_specs local_layer_spec"
_CALLABLE = "kvshift_megatron.layer_specs kv_shift_layer_spec"
RELEASES = {
    "0.17": Release(_STATIC_SPEC, vocab_size=127),
    "0.18": Release(_STATIC_SPEC),
    "0.19": Release(_CALLABLE),
    "0.20": Release(_CALLABLE),  # main, before the release
}

# Has every rank print which Megatron it ran, without a change to the script.
_WITNESS = """
import atexit, os, sys

def say():
    core, training = (sys.modules.get("megatron." + name) for name in ("core", "training"))
    if core and training:
        info = sys.modules["megatron.core.package_info"]
        version = info.__shortversion__ + info.PRE_RELEASE
        print("ran with", version, core.__file__, training.__file__, flush=True)

if "RANK" in os.environ:
    atexit.register(say)
"""
_WITNESSED = re.compile(r"^ran with (\S+) (\S+)/core/__init__.py (\S+)/training/__init__.py$")
_ITERATION = re.compile(r"iteration +(\d+)/ +\d+ \|.*\| lm loss: (\S+) \|")
_ATTENTION = "kvshift_megatron: attention: KV shifting"


class RunError(RuntimeError):
    """A training run failed; the message carries its last lines."""


@dataclass
class Run:
    """What one training run printed.

    Attributes:
        losses: One per step.
        says_attention: Whether it said that a layer shifts.
        megatron: (version, folder) of each rank's megatron.core and megatron.training.
    """

    losses: list[float] = field(default_factory=list)
    says_attention: bool = False
    megatron: list[tuple[str, Path]] = field(default_factory=list)

    def read(self, line: str) -> bool:
        """Take one line of output; return whether it held a step's loss."""
        self.says_attention |= _ATTENTION in line
        if match := _WITNESSED.match(line):
            version, *folders = match.groups()
            self.megatron += [(version, Path(folder)) for folder in folders]
        match = _ITERATION.search(line)
        if match:
            self.losses.append(float(match[2]))
        return match is not None


@dataclass(frozen=True)
class Comparison:
    """One layout: the stock script, this project's entry point, and the baseline model."""

    release: str
    layout: str
    stock: Run
    ours: Run
    baseline: Run

    @property
    def difference(self) -> float:
        return largest_difference(self.stock.losses, self.ours.losses)

    @property
    def baseline_distance(self) -> float:
        return largest_difference(self.stock.losses, self.baseline.losses)

    @property
    def agrees(self) -> bool:
        # Both comparisons are False for NaN, which must not agree.
        return self.difference <= TOLERANCE and self.baseline_distance >= BASELINE_DISTANCE


def largest_difference(actual: list[float], expected: list[float]) -> float:
    """Return the largest difference of any step, relative to `expected`; NaN if any is NaN."""
    differences = [abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True)]
    return float("nan") if any(d != d for d in differences) else max(differences)


def flags(release: Release, layout: str) -> list[str]:
    return [*FLAGS, *LAYOUTS[layout], "--vocab-size", str(release.vocab_size)]


def stock_run(checkout: Path, version: str, layout: str) -> Run:
    """Run the checkout's own script with `--spec`."""
    release = RELEASES[series(version)]
    command = ["-m", "kvshift_megatron.cpu", "--nproc-per-node", str(RANKS), "pretrain_gpt.py"]
    command += [*flags(release, layout), "--spec", *release.spec.split()]
    name = f"stock {version}, {layout}"
    run = train(name, command, checkout, [checkout, *launchers.own_path()])
    if set(run.megatron) != {(version, checkout / "megatron")}:
        raise RunError(f"{name}: ran {run.megatron}, not the checkout's Megatron")
    return run


def our_run(layout: str, baseline: bool = False) -> Run:
    """Run this project's entry point on the installed megatron-core."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "kvshift_megatron.pretrain", *flags(Release(spec=""), layout)]
    command += ["--no-kv-shift"] if baseline else []
    name = f"{'baseline model' if baseline else 'this project'}, {layout}"
    with tempfile.TemporaryDirectory() as empty:
        run = train(name, command, Path(empty), launchers.own_path())
    if run.says_attention is baseline:
        raise RunError(
            f"{name}: the log {'says' if baseline else 'does not say'} that layers shift"
        )
    return run


def train(name: str, command: list[str], directory: Path, path: list[Path]) -> Run:
    """Run `python COMMAND` to its end, on the CPU.

    Args:
        name: What progress and errors call the run.
        command: Python's arguments.
        directory: Its working directory.
        path: Its PYTHONPATH.

    Raises:
        RunError: The run failed, took too long, or logged a wrong number of steps.
    """
    run, start = Run(), time.monotonic()
    tail: deque[str] = deque(maxlen=30)

    def on_line(line: str) -> None:
        tail.append(line)
        if run.read(line) and len(run.losses) % 5 == 0:
            seconds = time.monotonic() - start
            print(f"{name}: step {len(run.losses)} of {STEPS} [{seconds:.0f} s]", flush=True)

    with tempfile.TemporaryDirectory() as witness:
        Path(witness, "sitecustomize.py").write_text(_WITNESS)
        code = run_to_end(command, directory, [Path(witness), *path], on_line)
    problem = None
    if code != 0:
        late = f" (stopped after {TIMEOUT:.0f} s)" if time.monotonic() - start > TIMEOUT else ""
        problem = f"ended with exit code {code}{late}"
    elif len(run.losses) != STEPS:
        problem = f"logged {len(run.losses)} losses instead of {STEPS}"
    elif len(run.megatron) != 2 * RANKS:
        problem = f"{len(run.megatron)} of {2 * RANKS} imports of Megatron were reported"
    if problem:
        raise RunError("\n".join([f"{name}: {problem}", *(f"    {line}" for line in tail)]))
    return run


def run_to_end(
    command: list[str], directory: Path, path: list[Path], on_line: Callable[[str], None]
) -> int:
    """Run Python for TIMEOUT at most, pass on each line of its output, return the exit code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",  # leaves the checkout as it is
        "PYTHONUNBUFFERED": "1",
        "KVSHIFT_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None  # PIPE was asked for
    timer = threading.Timer(TIMEOUT, launchers.stop, [[process]])
    timer.start()
    try:
        for line in process.stdout:
            on_line(line.rstrip())
        return process.wait()
    finally:
        timer.cancel()
        launchers.stop([process])
        process.stdout.close()


def compare(checkout: Path, version: str) -> list[Comparison]:
    # The tag and the version inside can differ: core_v0.19.0 calls itself 0.19.1.
    tag = git(checkout, "describe", "--tags", "--always").strip()
    return [
        Comparison(
            f"{tag} ({version})",
            layout,
            stock_run(checkout, version, layout),
            our_run(layout),
            our_run(layout, baseline=True),
        )
        for layout in LAYOUTS
    ]


def table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as a Markdown table, with losses as logged."""
    columns = [
        "Megatron-LM", "layout", f"loss at 1 and {STEPS}, stock", "this project",
        "largest relative difference", "baseline model's", "says attention", "agrees",
    ]  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for c in comparisons:
        ends = [f"{run.losses[0]:.6f}, {run.losses[-1]:.6f}" for run in (c.stock, c.ours)]
        distances = [f"{c.difference:.1e}", f"{c.baseline_distance:.1e}"]
        says = "yes" if c.stock.says_attention else "no"
        rows.append([c.release, c.layout, *ends, *distances, says, "yes" if c.agrees else "NO"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kvshift-check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--megatron-path",
        type=Path,
        required=True,
        metavar="CHECKOUT",
        help="a git checkout of a released Megatron-LM",
    )
    checkout = parser.parse_args(argv).megatron_path.resolve()

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        version = release_of(checkout, RELEASES)
        comparisons = compare(checkout, version)
    except CheckoutError as error:
        print(f"kvshift-check: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"kvshift-check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(table(comparisons))
    print(
        f"Largest difference of any of {STEPS} steps. Runs agree if it is at most {TOLERANCE:g}, "
        f"and the baseline model's at least {BASELINE_DISTANCE:g}. Losses are logged to 7 digits."
    )
    return 0 if all(comparison.agrees for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
