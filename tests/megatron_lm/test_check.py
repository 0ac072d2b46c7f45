"""kvshift-check: what it refuses, reads, compares and prints. No test trains."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvshift_megatron.megatron_lm import check as tool
from kvshift_megatron.utils import launchers
from tests.support.launch import PROJECT

FALLING = [5.0 - 0.1 * step for step in range(tool.STEPS)]


def scaled(factor):
    return [loss * factor for loss in FALLING]


def run_of(losses, says_attention=True):
    return tool.Run(list(losses), says_attention)


def comparison(stock=FALLING, baseline=None, layout="TP 2"):
    baseline = scaled(1.01) if baseline is None else baseline
    return tool.Comparison("0.18.2", layout, run_of(stock), run_of(FALLING), run_of(baseline))


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the committed files that the tool looks at in a checkout."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (tmp_path / "pretrain_gpt.py").write_text("print('trained')\n")
    write_version(tmp_path, 18, 2)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def write_version(path, minor, patch, pre_release=""):
    (path / "megatron/core/package_info.py").write_text(
        f'MAJOR = 0\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = "{pre_release}"\n'
    )


def git(path, *command):
    subprocess.run(["git", "-C", path, *command], check=True, capture_output=True)


def commit(path):
    git(path, "add", ".")
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    git(path, *who, "commit", "--quiet", "--message", "test")


def refusal(path, capsys):
    assert tool.main(["--megatron-path", str(path)]) == 2
    return capsys.readouterr().err


def test_a_clean_release_is_accepted(checkout):
    assert tool.release_of(checkout, tool.RELEASES) == "0.18.2"
    (checkout / "untracked.log").touch()
    assert tool.release_of(checkout, tool.RELEASES) == "0.18.2"


@pytest.mark.parametrize("missing", ["pretrain_gpt.py", "megatron/core/package_info.py"])
def test_another_folder_is_refused(checkout, missing, capsys):
    (checkout / missing).unlink()
    commit(checkout)
    error = refusal(checkout, capsys)
    assert f"holds no {missing}" in error and "--megatron-path" in error


def test_a_missing_folder_is_refused(tmp_path, capsys):
    assert "holds no pretrain_gpt.py" in refusal(tmp_path / "nowhere", capsys)


def test_a_folder_without_git_is_refused(checkout, capsys, monkeypatch):
    # The test's folder may lie inside another repository.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    (checkout / ".git").rename(checkout / "not-git")
    assert "is no git checkout" in refusal(checkout, capsys)


def test_a_modified_checkout_is_refused_by_file(checkout, capsys):
    (checkout / "pretrain_gpt.py").write_text("print('changed')\n")
    assert "is modified (pretrain_gpt.py)" in refusal(checkout, capsys)
    git(checkout, "add", ".")
    assert "is modified (pretrain_gpt.py)" in refusal(checkout, capsys)


def test_an_unknown_release_is_refused_by_name(checkout, capsys):
    write_version(checkout, 16, 0, "rc1")
    commit(checkout)
    error = refusal(checkout, capsys)
    assert "release 0.16.0rc1" in error and "0.17, 0.18, 0.19, 0.20" in error


def test_a_file_without_a_version_is_refused(checkout, capsys):
    (checkout / "megatron/core/package_info.py").write_text("MAJOR = 0\n")
    commit(checkout)
    assert "names no version" in refusal(checkout, capsys)


@pytest.mark.parametrize(
    ("version", "spec", "vocab_size"),
    [
        ("0.17.1", "static_specs local_layer_spec", "127"),
        ("0.18.2", "static_specs local_layer_spec", "128"),
        ("0.19.0", "layer_specs kv_shift_layer_spec", "128"),
        ("0.20.0", "layer_specs kv_shift_layer_spec", "128"),
    ],
)
def test_each_release_gets_the_spec_and_vocabulary_that_it_takes(
    monkeypatch, tmp_path, version, spec, vocab_size
):
    commands = []

    def train(name, command, directory, path):
        commands.append(command)
        assert directory == path[0] == tmp_path
        return tool.Run(FALLING, True, [(version, tmp_path / "megatron")] * 4)

    monkeypatch.setattr(tool, "train", train)
    tool.stock_run(tmp_path, version, "PP 2")
    (command,) = commands
    assert command[-3:] == ["--spec", *f"kvshift_megatron.{spec}".split()]
    assert command[command.index("--vocab-size") + 1] == vocab_size
    assert command[command.index("--pipeline-model-parallel-size") + 1] == "2"


@pytest.mark.parametrize(
    "megatron", [("0.19.2", "elsewhere/megatron"), ("0.19.2", "megatron"), ("0.18.2", "elsewhere")]
)
def test_a_run_of_another_megatron_is_an_error(monkeypatch, tmp_path, megatron):
    mine, other = ("0.18.2", tmp_path / "megatron"), (megatron[0], tmp_path / megatron[1])
    run = tool.Run(FALLING, True, [mine, mine, mine, other])
    monkeypatch.setattr(tool, "train", lambda *_: run)
    with pytest.raises(tool.RunError, match="not the checkout's Megatron"):
        tool.stock_run(tmp_path, "0.18.2", "TP 2")


@pytest.mark.parametrize("baseline", [False, True])
def test_a_reference_run_must_say_what_it_trained(monkeypatch, baseline):
    monkeypatch.setattr(tool, "train", lambda *_: run_of(FALLING, says_attention=baseline))
    said = "baseline model, .* says" if baseline else "this project, .* does not say"
    with pytest.raises(tool.RunError, match=f"{said} that layers shift"):
        tool.our_run("TP 2", baseline)
    monkeypatch.setattr(tool, "train", lambda *_: run_of(FALLING, says_attention=not baseline))
    assert tool.our_run("TP 2", baseline).losses == FALLING


def test_log_lines_are_read():
    run = tool.Run()
    assert run.read(
        " [2026-01-01 00:00:00] iteration        7/      20 | consumed samples:           28 | "
        "learning rate: 1.000000E-03 | global batch size:     4 | lm loss: 4.566646E+00 | "
        "loss scale: 1.0 |"
    )
    assert not run.read(" validation loss at iteration 20 | lm loss value: 4.5E+00 | ")
    assert not run.says_attention
    assert not run.read("kvshift_megatron: attention: KV shifting (free) in layers 1-2; 16 taps")
    assert not run.read(
        "ran with 0.17.1 /c/megatron/core/__init__.py /c/megatron/training/__init__.py"
    )
    folder = Path("/c/megatron")
    assert run == tool.Run([4.566646], True, [("0.17.1", folder), ("0.17.1", folder)])


def test_the_largest_difference_of_any_step_counts():
    stock = list(FALLING)
    stock[3] *= 1 + 3e-5
    assert comparison(stock).difference == pytest.approx(3e-5)
    assert comparison(stock).baseline_distance == pytest.approx(0.01, rel=0.01)
    stock[5] = float("nan")
    assert not comparison(stock).agrees


@pytest.mark.parametrize(
    ("stock", "baseline", "agrees"),
    [
        (FALLING, None, True),
        (scaled(1 + 0.9e-5), None, True),
        (scaled(1 + 1.1e-5), None, False),
        (FALLING, scaled(1 + 1e-4), False),  # the baseline model is too close
    ],
)
def test_exit_status_and_table(checkout, monkeypatch, capsys, stock, baseline, agrees):
    def compare(path, version):
        assert (path, version) == (checkout, "0.18.2")
        return [comparison(), comparison(stock, baseline, layout="PP 2")]

    monkeypatch.setattr(tool, "compare", compare)
    assert tool.main(["--megatron-path", str(checkout)]) == (0 if agrees else 1)
    header, rule, first, second, note = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| 0.18.2 | TP 2 | 5.000000, 3.100000 | 5.000000, 3.100000 | 0.0e+00 |")
    assert first.endswith("| yes | yes |")
    assert second.endswith(f"| yes | {'yes' if agrees else 'NO'} |")
    assert "7 digits" in note


def test_both_layouts_are_compared_with_the_shift_and_without(monkeypatch, checkout):
    git(checkout, "tag", "core_v0.18.2")
    monkeypatch.setattr(tool, "stock_run", lambda path, version, layout: run_of(FALLING))
    monkeypatch.setattr(
        tool, "our_run", lambda layout, baseline=False: run_of(scaled(2) if baseline else FALLING)
    )
    compared = tool.compare(checkout, "0.18.2")
    assert {c.release for c in compared} == {"core_v0.18.2 (0.18.2)"}
    assert [c.layout for c in compared] == ["TP 2", "PP 2"]
    assert all(c.agrees and c.baseline_distance == pytest.approx(0.5) for c in compared)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('why'); raise SystemExit(3)", r"exit code 3\n    why"),
        ("print('no step')", f"logged 0 losses instead of {tool.STEPS}"),
        (
            f"for i in range({tool.STEPS}): print(f'iteration {{i}}/ 20 | x | lm loss: 1.0 |')",
            "0 of 4 imports of Megatron",
        ),
    ],
)
def test_a_failed_run_is_an_error_with_its_last_lines(tmp_path, script, message):
    with pytest.raises(tool.RunError, match=message):
        tool.train("stock", ["-c", script], tmp_path, [tmp_path])


# Starts a rank in a session of its own, which outlives the launcher.
_LAUNCHER = """
import signal, subprocess, sys
rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
print(child.pid, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds ranks in Linux's /proc")
def test_a_run_that_takes_too_long_is_ended_with_its_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TIMEOUT", 3.0)
    monkeypatch.setattr(launchers, "PATIENCE", 0.5)
    with pytest.raises(tool.RunError, match=r"stopped after 3 s\)\n    \d+") as caught:
        tool.train("stock", ["-c", _LAUNCHER], tmp_path, [tmp_path])
    rank = int(str(caught.value).split()[-1])
    deadline = time.monotonic() + 10
    while is_running(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(rank)


def test_a_launcher_that_has_ended_is_left_alone():
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    launchers.stop([process])
    assert process.returncode == 0


def test_a_child_imports_from_the_checkout():
    (folder,) = launchers.own_path()
    assert (folder / "pyproject.toml").is_file() and folder == PROJECT
