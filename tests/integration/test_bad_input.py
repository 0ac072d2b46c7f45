"""Bad input stops every rank before the first step, naming the setting and the remedy."""

import json

import pytest

from tests.integration.bad_input import BAD_INPUT
from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks, torchrun

pytestmark = pytest.mark.slow

_RANKS = 2


@pytest.fixture(scope="module")
def endings(tmp_path_factory) -> list[dict]:
    """Return how each command line ended, by rank."""
    output = tmp_path_factory.mktemp("bad-input")
    run = ranks(_RANKS, "tests.integration.bad_input_worker", [str(output)], timeout=300)
    assert run.returncode == 0, run.stdout[-5000:]
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(_RANKS)]


@pytest.mark.parametrize("name", BAD_INPUT)
def test_refused_on_every_rank(endings, name):
    for rank in range(_RANKS):
        message = endings[rank][name]
        # sys.exit with a sentence prints it and exits with code 1.
        assert isinstance(message, str) and message.startswith("kvshift_megatron: "), message
        for part in BAD_INPUT[name][1]:
            assert part in message


def test_a_refused_launch_fails_and_says_why():
    run = torchrun(_RANKS, ["-m", "kvshift_megatron.pretrain", *flags(kv_shift_window=1)], 120)
    assert run.returncode != 0
    assert "kvshift_megatron: window=1 is out of range" in run.stdout
    assert "iteration" not in run.stdout
