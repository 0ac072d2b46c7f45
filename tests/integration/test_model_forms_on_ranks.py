"""Converted checkpoints of two ranks go on in the other form, at another layout."""

import re

import pytest

from kvshift_megatron.convert.change_form import ChangeForm, change_form
from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_STEPS, _SAVED_AFTER = 6, 3
_TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_GPT = {"num_layers": 2}
_HYBRID = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_STAGES = {**_HYBRID, "hybrid_layer_pattern": "*-|*-", "pipeline_model_parallel_size": 2}
_RESHARDABLE = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}


def losses(**given) -> list[float]:
    """Return what a run of two ranks prints: the loss of each line, to 7 digits."""
    common = {"train_iters": _STEPS, "lr_decay_iters": _STEPS, "make_vocab_size_divisible_by": 64}
    command = flags(**common, hidden_dropout=0.0, attention_dropout=0.0, **given)
    done = ranks(2, "kvshift_megatron.pretrain", command, timeout=400, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stdout[-5000:]
    return [float(loss) for loss in re.findall(r" lm loss: (\S+) \|", done.stdout)]


@pytest.mark.parametrize(
    ("before", "after", "form"),
    [
        ({**_GPT, **_TENSOR}, _STAGES, "hybrid"),
        (_STAGES, {**_GPT, **_TENSOR}, "gpt"),
        ({**_GPT, **_RESHARDABLE}, {**_HYBRID, **_TENSOR, **_RESHARDABLE}, "hybrid"),
    ],
    ids=["tensor parallel to pipeline", "pipeline to tensor parallel", "data to tensor parallel"],
)
def test_it_goes_on_as_the_unbroken_run(tmp_path, before, after, form):
    unbroken = losses(**before, save=tmp_path / "saved", save_interval=_SAVED_AFTER)
    assert len(unbroken) == _STEPS
    source = tmp_path / "saved" / f"iter_{_SAVED_AFTER:07d}"
    change_form(ChangeForm(source, tmp_path / "changed", form))
    resumed = losses(**after, load=tmp_path / "changed")
    # Megatron's second line after a resume is the mean of two steps.
    assert resumed[::2] == pytest.approx(unbroken[_SAVED_AFTER::2], rel=FP32_REL)
    assert len(resumed) == _STEPS - _SAVED_AFTER
