"""The batch script itself, with spaces, quotes and `$(...)` in every path; Slurm is a stand-in."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from examples.slurm import status
from kvshift_megatron.utils.flag_lines import to_line, to_words
from tests.support.launch import PROJECT
from tests.support.odd_names import ODD

# Runs what it can in Python itself, and writes down the command line of the rest.
_PYTHON = """#!{python}
import json, os, sys
words = sys.argv[1:]
if words[:2] == ["-m", "kvshift_megatron.recipes"]:
    print("--train-iters 20")
elif words[:2] == ["-m", "torch.distributed.run"]:
    with open(os.environ["SEEN"], "w") as file:
        json.dump(words, file)
    run = words[words.index("--save") + 1]
    os.makedirs(run, exist_ok=True)
    with open(os.path.join(run, "latest_checkpointed_iteration.txt"), "w") as file:
        file.write("20")
else:
    os.execv({python!r}, [{python!r}, *words])
"""
_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_STEP_NUM_NODES=1 SLURM_NODEID=0 exec "$@"
"""


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path):
    """Return (folder with an odd name, environment) in which the batch script can run."""
    odd = tmp_path / ODD
    commands = odd / "bin"
    commands.mkdir(parents=True)
    (odd / "checkout").symlink_to(PROJECT)
    script = odd / "checkout" / "examples" / "slurm" / "pretrain.sbatch"
    job = f"JobId=7 JobName=x Command={script} --and arguments WorkDir={odd} StdIn=/dev/null"
    (odd / "job.txt").write_text(job + "\n")
    show = 'if [ $1 = show ]; then echo node1; else cat "$JOB"; fi'
    program(commands / "scontrol", f"#!/bin/bash\n{show}\n")
    program(commands / "srun", _SRUN)
    program(commands / "squeue", "#!/bin/bash\n")
    program(commands / "scancel", "#!/bin/bash\n")
    program(odd / "python", _PYTHON.format(python=sys.executable))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "KVSHIFT_ROOT"},
        **{"PATH": f"{commands}:{os.environ['PATH']}", "JOB": str(odd / "job.txt")},
        **{"SEEN": str(odd / "seen.json"), "KVSHIFT_PYTHON": str(odd / "python")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CLUSTER_NAME": "test"},
        **{"SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_ON_NODE": "2", "SLURM_GPUS_ON_NODE": ""},
    }
    return odd, script, environment


def test_every_path_arrives_as_it_was_given(cluster):
    odd, script, environment = cluster
    data = odd / "data text_document"
    words = ["run", "13b", "64x80gb", "--ranks-per-node", "1", "--", "--save-interval", "10"]
    words += ["--data-path", "1", str(data), "--tokenizer-model=" + str(data)]
    result = subprocess.run(
        ["bash", str(script), *words],
        cwd=odd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads((odd / "seen.json").read_text())
    run = str(odd / "run")
    assert seen[seen.index("--save") + 1] == seen[seen.index("--load") + 1] == f"{run}/checkpoints"
    assert seen[seen.index("--data-path") + 1 :][:3] == [
        "1",
        str(data),
        f"--tokenizer-model={data}",
    ]
    assert f"--log-dir={run}/attempts/001/logs/node-0" in seen
    (attempt,) = status.read(odd / "run").attempts
    assert (attempt.state, attempt.end) == ("completed", 20)
    assert not list(odd.parent.rglob("pwned")) and not (PROJECT / "pwned").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "1e-3"],
        ["--flag"],
        ["--pipeline-model-parallel-layout", "Et*3|(tt|)*29,m|L"],
        ["--data-path", ODD, "0.5", ""],
        ["--x=" + ODD],
    ],
)
def test_a_line_of_flags_is_read_back(words):
    line = to_line(words)
    assert to_words(line) == words and len(line.splitlines()) == 1
    # What needs no quotes has none: `kvshift-recipe` in $(...) is split by the shell at spaces.
    if ODD not in "".join(words):
        assert line == " ".join(words)


def test_a_line_break_is_refused():
    with pytest.raises(ValueError, match="a line break cannot be written"):
        to_line(["--data-path", "a\nb"])


def test_a_tracker_that_cannot_be_read_counts_as_none(tmp_path):
    folder = tmp_path / status.CHECKPOINTS
    folder.mkdir()
    tracker = folder / "latest_checkpointed_iteration.txt"
    for content in (b"\xff\xfe2\x000\x00", b"junk", b""):
        tracker.write_bytes(content)
        assert status.newest_checkpoint(tmp_path) == 0
    tracker.unlink()
    tracker.mkdir()
    assert status.newest_checkpoint(tmp_path) == 0
