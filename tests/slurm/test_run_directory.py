"""Which job may use a run directory, and how often, with a stand-in for squeue."""

import json
import os
import socket
import subprocess
import sys

import pytest

from examples.slurm import begin, claim, failure, free_port, settings, status
from examples.slurm.status import Attempt, Status
from kvshift_megatron.recipes import show
from kvshift_megatron.utils.flag_lines import to_line
from tests.support.launch import PROJECT

_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CLUSTER_NAME": "test"}  # fmt: skip
_FLAGS = ["--", "--save-interval", "10", "--mock-data"]


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that sets what squeue answers: its output and its exit status."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answers(output, code=0):
        program = folder / "squeue"
        stream = "" if code == 0 else " >&2"
        program.write_text(f"#!/bin/sh\necho '{output}'{stream}\nexit {code}\n")
        program.chmod(0o755)

    answers("squeue must not be asked", 1)
    return answers


def read(run, *words, **environment):
    return settings.read([str(run), "13b", "64x80gb", *words, *_FLAGS], {**_JOB, **environment})


def test_a_directory_belongs_to_one_job(tmp_path, squeue):
    claim.take(tmp_path, "7", "test")
    claim.take(tmp_path, "7", "test")  # the same job, requeued
    for state in ("RUNNING", "PENDING", "COMPLETING", "SUSPENDED"):
        squeue(state)
        with pytest.raises(ValueError, match=f"in use by job 7 .{state.lower()}.: wait for it"):
            claim.take(tmp_path, "8", "test")
    claim.give_back(tmp_path, "8", "test")  # not its own
    assert (tmp_path / "owner").exists()
    claim.give_back(tmp_path, "7", "test")
    claim.take(tmp_path, "8", "test")
    assert (tmp_path / "owner").read_text() == "8 test\n"
    assert [path.name for path in tmp_path.glob("owner*")] == ["owner"]


@pytest.mark.parametrize(
    ("output", "code"),
    [("", 0), ("FAILED", 0), ("slurm_load_jobs error: Invalid job id specified", 1)],
)
def test_the_directory_of_an_ended_job_is_taken_over(tmp_path, squeue, output, code):
    claim.take(tmp_path, "7", "test")
    squeue(output, code)
    claim.take(tmp_path, "8", "test")
    assert (tmp_path / "owner").read_text() == "8 test\n"
    assert [path.name for path in tmp_path.glob("owner*")] == ["owner"]


def test_a_directory_is_in_use_if_its_jobs_state_is_unknown(tmp_path, squeue):
    claim.take(tmp_path, "7", "test")
    squeue("Unable to contact slurm controller", 1)
    with pytest.raises(ValueError, match="squeue cannot say whether job 7 is over: Unable to"):
        claim.take(tmp_path, "8", "test")
    with pytest.raises(ValueError, match=r"job 7 of cluster test.* remove .*owner if that job is"):
        claim.take(tmp_path, "8", "another")
    assert (tmp_path / "owner").read_text() == "7 test\n"


def test_attempts_are_bounded(tmp_path):
    run = tmp_path / "run"
    for number in (1, 2):
        directory = begin.begin(read(run, "--max-attempts=2"))
        assert directory == run / f"attempts/00{number}"
        checkpoints = run / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(f"{10 * number}")
    with pytest.raises(ValueError, match=r"job 7 has had its 2 attempts .* and is at step 20"):
        begin.begin(read(run, "--max-attempts=2"))
    assert [attempt.state for attempt in status.read(run).attempts] == ["lost", "lost"]
    # Another job has attempts of its own.
    begin.begin(read(run, "--max-attempts=2", SLURM_JOB_ID="8"))


def test_a_second_attempt_from_the_same_step_is_refused(tmp_path):
    run = tmp_path / "run"
    begin.begin(read(run))
    with pytest.raises(ValueError, match=r"no progress: attempt 1 \(lost\) started from step 0"):
        begin.begin(read(run))
    assert not (run / "owner").exists()
    begin.begin(read(run, SLURM_JOB_ID="8"))


def test_a_job_keeps_its_configuration(tmp_path):
    run = tmp_path / "run"
    first = begin.begin(read(run))
    (first / "flags.txt").write_text("--lr 1\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("10\n")
    second = begin.begin(read(run))
    assert (second / "flags.txt").read_text() == "--lr 1\n"
    claim.give_back(run, "7", "test")
    assert not (begin.begin(read(run, SLURM_JOB_ID="8")) / "flags.txt").exists()


def test_each_task_of_an_array_has_its_own_directory_and_seed(tmp_path):
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "10"}
    job = read(tmp_path, **task)
    assert (job.job, job.run) == ("7_3", tmp_path / "seed-3")
    assert job.megatron[-2:] == ["--seed", "3"]
    with pytest.raises(ValueError, match="in an array the task's number is the seed"):
        settings.read(["run", "m", "l", *_FLAGS, "--seed", "1"], {**_JOB, **task})


def test_the_command_line():
    job = read("run", "--set", "lr=1", "--vanilla", "--ranks-per-node=4")
    assert job.show == ["13b", "64x80gb", "--nproc", "8", "--set", "lr=1", "--set", "no-kv-shift"]
    assert begin.own_flags(job)[-2:] == [["--save-interval", "10"], ["--mock-data"]]


def test_both_forms_of_a_model(capsys):
    """The words that the script shows to kvshift_megatron.recipes, and those of torchrun."""
    job = read("run", "--hybrid", "--set", "pipeline-model-parallel-size=2")
    assert job.show == ["13b", "64x80gb", "--nproc", "16", "--hybrid", "--set",
                        "pipeline-model-parallel-size=2"]  # fmt: skip
    assert show.main(job.show) == 0
    half = "*-" * 20
    assert f"--hybrid-layer-pattern {half}|{half}" in capsys.readouterr().out.splitlines()


def test_a_pattern_reaches_the_ranks_as_it_was_written(tmp_path, capsys, monkeypatch):
    """No shell takes its stars and bars for anything else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-b-").touch()  # what *-*- would match
    pattern = ["--hybrid-layer-pattern", "*-*-|*-*-/*-"]
    job = settings.read(["run", "m", "l", *_FLAGS, *pattern], _JOB)
    lines = [to_line(words) for words in begin.own_flags(job)]
    (tmp_path / "flags.txt").write_text("".join(f"{line}\n" for line in lines))
    script = 'mapfile -d "" -t flags < <("$@"); printf "%s\\0" "${flags[@]}"'
    command = [sys.executable, "-m", "examples.slurm.flags", tmp_path / "flags.txt"]
    words = subprocess.run(
        ["bash", "-c", script, "bash", *command], capture_output=True, check=True, cwd=PROJECT
    ).stdout.split(b"\0")
    assert [word.decode() for word in words[-3:-1]] == pattern


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["run", "m"], {}, "the following arguments are required: layout .usage: sbatch"),
        (["run", "m", "l", "--nodes=2", *_FLAGS], {}, "unrecognized arguments: --nodes=2"),
        (["run", "m", "l"], {}, "--save-interval is missing after --"),
        (["run", "m", "l", *_FLAGS, "--ckpt-step", "5"], {}, "--ckpt-step: every start of the job"),
        (["run", "m", "l", "--set", "finetune", *_FLAGS], {}, "--finetune: every start"),
        (["run", "m", "l", *_FLAGS, "--save=x"], {}, "--save: the script sets this flag"),
        (["run", "m", "l", *_FLAGS, "--data-path", "a\nb"], {}, "'a.nb': a path or a flag"),
        (["r:1", "m", "l", *_FLAGS], {"KVSHIFT_CONTAINER_IMAGE": "x"}, "separated by commas and"),
        (["run", "m", "l", *_FLAGS], {"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs"),
        (["run", "m", "l", "--max-attempts=0", *_FLAGS], {}, "--max-attempts must be at least 1"),
    ],
)
def test_mistakes_are_named(words, environment, message):
    with pytest.raises(ValueError, match=message):
        settings.read(words, {**_JOB, **environment})


def test_a_status_is_read_back_and_another_file_is_refused(tmp_path, capsys):
    status.write(tmp_path, Status([Attempt("7", 1, 0, 10, "requeued", "why")]))
    assert status.read(tmp_path).attempts == [Attempt("7", 1, 0, 10, "requeued", "why")]
    assert status.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("attempt 1, job 7: from step 0 to 10, requeued: why\n")
    (tmp_path / "status.json").write_text(json.dumps({"attempts": [{"pid": 1}]}))
    with pytest.raises(ValueError, match=r"status.json does not hold the status of a run"):
        status.read(tmp_path)


def test_the_last_messages_of_failed_ranks(tmp_path):
    def log(node, rank, text):
        path = tmp_path / f"logs/node-{node}/none_x/attempt_0/{rank}/stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(text)

    trace = "Traceback (most recent call last):\n  ...\n"
    log(0, 0, f"[rank0]: {trace}[rank0]: ValueError: load: the checkpoint is cut off\nwarning: x\n")
    log(0, 1, f"[rank1]: {trace}[rank1]: ValueError: load: the checkpoint is cut off\n")
    log(1, 0, f"{trace}torch.distributed.DistBackendError: reset by peer\n")
    log(1, 1, "UserWarning: nothing\n")
    assert failure.summary(tmp_path, 2) == [
        "ranks 0-1: ValueError: load: the checkpoint is cut off",
        "ranks 2: torch.distributed.DistBackendError: reset by peer",
    ]


def test_the_port_is_free_and_not_ephemeral():
    port = free_port.free_port()
    low = int(free_port._EPHEMERAL.read_text().split()[0])
    assert 15000 <= port < low
    with socket.socket() as taken:
        taken.bind(("", port))
