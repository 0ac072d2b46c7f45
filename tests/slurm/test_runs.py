"""The shipped script on two nodes: it trains, and it survives failures."""

import json
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import STEPS
from tests.support.saved_tensors import differing, tensors


def final(job) -> Path:
    """Return the folder of a finished run's last checkpoint."""
    assert job.newest() == STEPS, job.said()[-3000:]
    return job.run / f"checkpoints/iter_{STEPS:07d}"


def assert_same_training(job, unbroken):
    """Check that every loss and all that is trained equal an unbroken run's to the bit."""
    last = job.status()[-1]
    assert job.steps(last["number"]) == list(range(last["start"] + 1, STEPS + 1))
    assert sorted(job.losses()) == list(range(1, STEPS + 1))
    assert job.losses() == unbroken.losses()
    stored = tensors(final(job))
    assert len(stored) > 10
    assert differing(stored, tensors(final(unbroken))) == []


@pytest.fixture(scope="module")
def unbroken(jobs):
    """Train without a disturbance."""
    job = jobs.submit("unbroken")
    job.fields = jobs.ended(job)
    return job


def test_trains(unbroken):
    assert unbroken.fields["JobState"] == "COMPLETED", unbroken.said()[-5000:]
    assert unbroken.fields["ExitCode"] == "0:0"
    assert "attention: KV shifting" in unbroken.said()
    losses = unbroken.losses()
    assert sorted(losses) == unbroken.steps(1) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5
    (attempt,) = unbroken.status()
    assert (attempt["start"], attempt["end"], attempt["state"]) == (0, STEPS, "completed")


def test_the_run_directory_says_what_ran(unbroken):
    attempt = unbroken.run / "attempts/001"
    flags = (attempt / "flags.txt").read_text().splitlines()
    for flag in ("--hidden-size 32", "--tensor-model-parallel-size 2", "--mock-data",
                 f"--save {unbroken.run}/checkpoints", f"--train-iters {STEPS}"):  # fmt: skip
        assert flag in flags
    script = Path("examples/slurm/pretrain.sbatch").read_text()
    assert (attempt / "job.sh").read_text() == script
    assert "megatron-core==" in (attempt / "versions.txt").read_text()
    assert "SLURM_JOB_NUM_NODES=2" in (attempt / "environment.txt").read_text()
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in (attempt / "environment.txt").read_text()
    assert len((attempt / "commit.txt").read_text().splitlines()[0]) == 40
    # Four ranks, and the first rank of the first node is rank 0.
    assert len(list(attempt.glob("logs/node-*/*/attempt_0/*/stdout.log"))) == 4
    assert "arguments ----" in unbroken.rank_log(1, 0)
    assert not (unbroken.run / "owner").exists()


def test_a_signal_saves_requeues_and_resumes(jobs, cluster, unbroken):
    job = jobs.submit("signalled")
    jobs.wait_for_step(job, 1, 5)
    # What Slurm sends before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    cluster.start_again(job.number, 60)
    fields = jobs.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), job.said()[-5000:]
    first, second = job.status()
    assert first["state"] == "requeued"
    assert 5 <= first["end"] < STEPS
    assert "still running" not in job.said()
    # No step is lost.
    assert first["end"] == second["start"] == max(job.steps(1))
    assert_same_training(job, unbroken)


def test_a_node_that_goes_down_costs_the_steps_since_the_checkpoint(jobs, cluster, unbroken):
    job = jobs.submit("node-down", megatron=("--save-interval=40",))
    jobs.wait_for(job, "a checkpoint", lambda: job.newest() >= 40)
    jobs.wait_for_step(job, 1, 43)
    cluster.set_node_down("n2")
    cluster.start_again(job.number, 60)
    fields = jobs.ended(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), job.said()[-5000:]
    first, second = job.status()
    assert first["state"] in ("lost", "terminated")
    saved = second["start"]
    assert saved in (40, 80)
    assert saved <= max(job.steps(1)) < saved + 40
    assert_same_training(job, unbroken)


def test_without_a_checkpoint_it_does_not_start_over_forever(jobs, cluster):
    job = jobs.submit("no-progress", tp=1)
    jobs.wait_for(job, "the step", lambda: job.processes())
    cluster.set_node_down("n2")
    cluster.start_again(job.number, 60)
    fields = jobs.ended(job, 30)
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] == "2:0"
    assert "no progress: attempt 1" in job.said()
    assert len(job.status()) == 1
    assert not (job.run / "owner").exists()


def test_a_killed_rank_fails_the_job(jobs):
    job = jobs.submit("killed")
    jobs.wait_for_step(job, 1, 5)
    killed = time.monotonic()
    job.kill_rank(2)
    fields = jobs.ended(job, 60)
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] == "1:0"
    assert "Signal 9 (SIGKILL)" in job.said()
    assert "attempt 1 failed with exit status 1" in job.said()
    assert job.status()[0]["state"] == "failed"
    assert job.processes() == {}, f"{time.monotonic() - killed:.0f} s after"


def test_sigterm_to_all_processes_saves_too(jobs, cluster):
    """Preemption with a grace time, on a cluster that does not send the warning signal."""
    job = jobs.submit("sigterm", "--max-attempts=1", megatron=("--num-workers=0",), tp=1)
    jobs.wait_for_step(job, 1, 5)
    cluster.run("scancel", "--signal=TERM", job.number)
    assert jobs.ended(job)["JobState"] == "FAILED"
    (attempt,) = job.status()
    assert attempt["message"].startswith(f"was interrupted and saved step {attempt['end']} of 100")
    assert 5 <= attempt["end"] == job.newest() < STEPS


@pytest.fixture(scope="module")
def limited(jobs):
    """Train the baseline model until the time limit ends it without a requeue."""
    slurm = ("--time=3", "--signal=B:USR1@160")
    own = ("--vanilla", "--max-attempts=1")
    return jobs.submit("limited", *own, slurm=slurm, steps=100_000, tp=1)


def test_a_second_job_is_refused(jobs, limited):
    jobs.wait_for(limited, "its run directory", lambda: (limited.run / "status.json").exists())
    job = jobs.submit("second", run=limited.run)
    assert jobs.ended(job, 30)["JobState"] == "FAILED"
    assert f"{limited.run} is in use by job {limited.number} (running)" in job.said()
    assert len(limited.status()) == 1


def test_a_bad_configuration_fails_in_the_queue(jobs, unbroken, limited):
    # In a directory that still has the claim of a job that is over.
    run = jobs.folder / "bad"
    run.mkdir()
    (run / "owner").write_text(f"{unbroken.number} test\n")
    job = jobs.submit("bad", "--set=num-query-groups=3", run=run)
    fields = jobs.ended(job)
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] == "2:0"
    assert "error: num_query_groups=3 and tensor_model_parallel_size=2" in job.said()
    (attempt,) = job.status()
    assert attempt["state"] == "failed"
    assert not (run / "owner").exists()


def test_the_time_limit_saves_and_attempts_are_bounded(jobs, limited):
    fields = jobs.ended(limited)
    assert fields["JobState"] == "FAILED", limited.said()[-5000:]
    assert fields["ExitCode"] == "1:0"
    (attempt,) = limited.status()
    assert "--max-attempts 1" in attempt["message"]
    assert "warning signal" in limited.said()
    assert attempt["end"] == limited.newest() == max(limited.steps(1)) > 0
    assert "attention: vanilla" in limited.said()


def test_an_array_trains_three_seeds_of_a_hybrid_model(jobs, cluster):
    slurm = ("--array=1-3", "--nodes=1")
    array = jobs.submit("array", "--hybrid", slurm=slurm, steps=10, tp=1)
    for seed in (1, 2, 3):
        fields = cluster.wait(f"{array.number}_{seed}", {"COMPLETED", "FAILED"}, 150)
        assert fields["JobState"] == "COMPLETED", array.said()[-5000:]
    runs = [array.run / f"seed-{seed}" for seed in (1, 2, 3)]
    trained = [tensors(run / "checkpoints/iter_0000010") for run in runs]
    for run, seed in zip(runs, "123"):
        flags = (run / "attempts/001/flags.txt").read_text().splitlines()
        assert {f"--seed {seed}", "--hybrid-layer-pattern *-*-"} <= set(flags)
        (log,) = run.glob("attempts/001/logs/node-0/*/attempt_0/0/stdout.log")
        assert "attention: KV shifting" in log.read_text(errors="replace")
        assert json.loads((run / "status.json").read_text())["attempts"][0]["state"] == "completed"
    # Different seeds give different weights.
    weights = [key for key in trained[0] if key.endswith("linear_fc1.weight")]
    assert weights
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert set(weights) <= set(differing(trained[one], trained[other]))
