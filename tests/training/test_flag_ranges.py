"""Bad values end in one sentence that names the flag; what Megatron trains with is not refused."""

import json

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks
from tests.training.bad_flags import BAD
from tests.training.flags_worker import WITHOUT
from tests.training.other_flags import GOOD, MEGATRONS

pytestmark = pytest.mark.slow

_BY_MEGATRON = {name: (count, flags(**given)) for name, (count, given, _) in MEGATRONS.items()}
# Without this package's checks: what is accepted here, to fail later, and what is a traceback.
_ACCEPTED = ("seed 0", "clip_grad -1", "log_interval 0", "odd channels")
_TRACEBACKS = (
    "lr nan",
    "micro_batch_size 0",
    "tensor_model_parallel_size 0",
    "heads and hidden size",
)


def _endings(folder, cases, *words) -> dict[str, tuple[int, str]]:
    plan, endings = folder / "plan.json", folder / "endings.json"
    plan.write_text(json.dumps(cases))
    module = "tests.training.flags_worker"
    run = ranks(1, module, [str(plan), str(endings), *words], timeout=500, forks=True)
    assert run.returncode == 0, run.stdout[-5000:]
    return json.loads(endings.read_text())


@pytest.fixture(scope="module")
def endings(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Return how each command line ended: exit code and output."""
    given = {name: (count, command) for name, (count, command, _) in BAD.items()}
    folder = tmp_path_factory.mktemp("flags")
    return _endings(folder, {**given, **GOOD, **_BY_MEGATRON, "help": (1, ["--help"])})


def _says(ending: tuple[int, str], *parts: str) -> bool:
    """Return whether a command line ended with one sentence that holds all parts."""
    code, output = ending
    last = output.strip().rpartition("\n")[2]
    is_one = code == 1 and last.startswith("kvshift_megatron: ")
    return is_one and all(part in last for part in parts)


def test_there_are_as_many_as_the_issue_counted():
    assert len(BAD) >= 179


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_sentence_that_names_the_flag(endings, name):
    code, output = endings[name]
    assert _says((code, output), BAD[name][2]), output[-2000:]
    assert "Traceback" not in output and "Megatron refuses" not in output


@pytest.mark.parametrize("name", GOOD)
def test_what_megatron_trains_with_is_accepted(endings, name):
    code, output = endings[name]
    assert code == 0, output[-2000:]


@pytest.mark.parametrize("name", MEGATRONS)
def test_what_only_megatron_knows_is_its_message_after_the_traceback(endings, name):
    code, output = endings[name]
    assert _says((code, output), "Megatron refuses ", *MEGATRONS[name][2]), output[-2000:]
    assert output.count("Traceback (most recent call last)") == 1


def test_help_shows_every_flag(endings):
    code, output = endings["help"]
    assert code == 0, output[-2000:]
    # The second has a percent sign that argparse cannot read, in Megatron 0.19.
    for flag in ("--kv-shift-variant", "--moe-paged-stash-buffer-size-factor-cuda"):
        assert f"  {flag} " in output


def test_without_the_checks_the_judge_notices(tmp_path):
    cases = {name: BAD[name][:2] for name in (*_ACCEPTED, *_TRACEBACKS)}
    cases["two precisions"] = _BY_MEGATRON["two precisions"]
    endings = _endings(tmp_path, cases, WITHOUT)
    assert not any(map(_says, endings.values()))
    assert {name for name, (code, _) in endings.items() if code == 0} == {*_ACCEPTED}
    errors = {name for name, (_, output) in endings.items() if "Traceback" in output}
    assert errors == {*_TRACEBACKS, "two precisions"}
