"""GPT and hybrid models through Megatron's own loop: each goes on from the other's checkpoint.

By Megatron's translation at load, and by kvshift-convert change-form, in both directions.
"""

from pathlib import Path

import pytest

from kvshift_megatron.convert.change_form import ChangeForm, change_form
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.integration.tiny_gpt import flags
from tests.support.forked_runs import Run, run_plan
from tests.support.saved_tensors import differing, tensors
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_STEPS, _SAVED_AFTER = 4, 2
_MICRO_BATCHES = 2  # per step
_ITERATION = f"iter_{_SAVED_AFTER:07d}"
_GPT = {"num_layers": 2}
_HYBRID = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_DENSE = {"gpt": _GPT, "hybrid": _HYBRID}
_EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}
_DISTRIBUTED = {"use_distributed_optimizer": True}
_RESHARDABLE = {**_DISTRIBUTED, "dist_ckpt_optim_fully_reshardable": True}
# Name -> flags of the GPT model and of the hybrid model.
_KINDS = {
    "plain": _DENSE,
    "bf16": {form: {**given, "bf16": True} for form, given in _DENSE.items()},
    "experts": {
        "gpt": {**_GPT, **_EXPERTS, **_RESHARDABLE},
        "hybrid": {**_HYBRID, "hybrid_layer_pattern": "*E*E", **_EXPERTS, **_RESHARDABLE},
    },
}
_BASELINE = {form: {**given, "no_kv_shift": True} for form, given in _DENSE.items()}
_LENIENT = {"dist_ckpt_strictness": "ignore_all"}
_OLDER = {"ckpt_format": "torch"}  # before torch_dist
_OTHER = {"gpt": "hybrid", "hybrid": "gpt"}
_FROM_CHECKPOINT = {
    **{"num_layers": None, "hidden_size": None, "num_attention_heads": None},
    **{"hybrid_layer_pattern": None, "use_checkpoint_args": True},
}


def command(**given) -> list[str]:
    common = {"train_iters": _STEPS, "lr_decay_iters": _STEPS}
    return flags(**common, hidden_dropout=0.0, attention_dropout=0.0, **given)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def saved(root) -> dict[str, Run]:
    """Train each kind in both forms, without a break."""
    every = {"save_interval": _SAVED_AFTER}
    plan = {
        f"{kind}-{form}": command(**given, save=root / f"{kind}-{form}", **every)
        for kind, forms in _KINDS.items()
        for form, given in forms.items()
    }
    once = {
        "by-buffers": {**_GPT, **_DISTRIBUTED},
        **{f"baseline-{form}": given for form, given in _BASELINE.items()},
        **{f"older-{form}": {**given, **_OLDER} for form, given in _BASELINE.items()},
    }
    for name, given in once.items():
        plan[name] = command(**given, save=root / name, exit_interval=_SAVED_AFTER, **every)
    (root / "first").mkdir()
    return run_plan(root / "first", plan)


@pytest.fixture(scope="module")
def changed(root, saved) -> dict[str, Path]:
    """Convert what each has saved half-way; name -> folder."""
    folders = {}
    for kind in _KINDS:
        for form in _DENSE:
            name = f"{kind}-{form}"
            folders[name] = root / f"changed-{name}"
            change_form(ChangeForm(root / name / _ITERATION, folders[name], _OTHER[form]))
    return folders


def _resumed(root: Path, changed: dict[str, Path]) -> dict[str, list[str]]:
    """Return runs that go on."""
    plan = {}
    for kind, forms in _KINDS.items():
        for form in _DENSE:
            name = f"{kind}-{form}"
            plan[name] = command(**forms[_OTHER[form]], load=changed[name])
        loading = {"load": root / f"{kind}-gpt", "ckpt_step": _SAVED_AFTER}
        plan[f"{kind}-translated"] = command(**forms["hybrid"], **loading)
        # It has no step to make, and saves what it has loaded.
        again = {**forms["hybrid"], **loading, "save": root / f"{kind}-again", "save_interval": 9}
        last = ["--train-iters", str(_SAVED_AFTER), "--override-opt_param-scheduler"]
        plan[f"{kind}-again"] = [*command(**again), *last]
    for form in _DENSE:
        name = f"plain-{form}"
        plan[f"{name}-arguments"] = command(**_FROM_CHECKPOINT, load=changed[name])
    unchanged = {"load": root / "plain-hybrid", "ckpt_step": _SAVED_AFTER}
    plan["pattern wins"] = command(**_GPT, use_checkpoint_args=True, **unchanged)
    return plan


def _weights(root: Path) -> dict[str, list[str]]:
    """Return runs that start from weights of Hugging Face."""
    plan = {}
    for form, given in _DENSE.items():
        loading = {"load": root / f"hf-as-{form}", "finetune": True}
        strict = {"dist_ckpt_strictness": "raise_unexpected"}
        plan[f"hf-as-{form}"] = command(**given, **loading, **strict)
    return plan


# Name -> flags, and parts of the refusal.
_REFUSED = {
    "gpt loads hybrid": (
        {**_GPT, "load": "plain-hybrid"},
        ["of a hybrid model with the layers *-*-", "a GPT model", "--model-form gpt"],
    ),
    "gpt of other layers finetunes hybrid, leniently": (
        {"num_layers": 4, "load": "plain-hybrid", "finetune": True, **_LENIENT},
        ["of a hybrid model with the layers *-*-", "a GPT model", "--model-form gpt"],
    ),
    "baseline gpt loads hybrid": (
        {**_BASELINE["gpt"], "load": "baseline-hybrid"},
        ["of a hybrid model with the layers *-*-", "a GPT model", "--model-form gpt"],
    ),
    "hybrid of more layers loads gpt with its arguments": (
        {**_FROM_CHECKPOINT, "hybrid_layer_pattern": "*-*-*-", "load": "plain-gpt"},
        ["of a GPT model with 2 layers", "a hybrid model of 3", "'*-*-'"],
    ),
    "baseline hybrid of fewer layers loads gpt": (
        {**_BASELINE["hybrid"], "hybrid_layer_pattern": "*-", "load": "baseline-gpt"},
        ["of a GPT model with 2 layers", "a hybrid model of 1", "'*-*-'"],
    ),
    "hybrid of fewer layers loads hybrid": (
        {**_HYBRID, "hybrid_layer_pattern": "*-", "load": "plain-hybrid"},
        ["holds layers that the model does not have", "decoder.layers.2, decoder.layers.3"],
    ),
    "hybrid loads an optimizer state by buffers": (
        {**_HYBRID, **_DISTRIBUTED, "load": "by-buffers"},
        ["the format dp_reshardable", "--dist-ckpt-optim-fully-reshardable"],
    ),
    "hybrid with taps starts from a vanilla gpt": (
        {**_HYBRID, "kv_shift_init": "identity", "finetune": True, "load": "baseline-gpt"},
        ["optimizer state of the vanilla checkpoint", "add --no-load-optim"],
    ),
    "baseline gpt loads hybrid in the older format": (
        {**_BASELINE["gpt"], **_OLDER, "load": "older-hybrid"},
        ["is of a hybrid model, and this run builds a GPT model", "--ckpt-format torch_dist"],
    ),
    "baseline hybrid loads gpt in the older format": (
        {**_BASELINE["hybrid"], **_OLDER, "load": "older-gpt"},
        ["is of a GPT model, and this run builds a hybrid model", "--ckpt-format torch_dist"],
    ),
}


@pytest.fixture(scope="module")
def runs(root, saved, changed) -> dict[str, Run]:
    megatron_to_hf(ToHF(root / "plain-gpt" / _ITERATION, root / "hf"))
    for form in _DENSE:
        target = root / f"hf-as-{form}"
        hf_to_megatron(ToMegatron(root / "hf", target, divisible_by=128, form=form))
    refused = {
        name: command(**{**given, "load": root / given["load"]})
        for name, (given, _) in _REFUSED.items()
    }
    (root / "second").mkdir()
    return run_plan(root / "second", {**_resumed(root, changed), **_weights(root), **refused})


def losses(run: Run) -> list[float]:
    assert run.code == 0, run.output[-5000:]
    return [float.fromhex(loss) for loss in run.losses]


@pytest.mark.parametrize("form", list(_DENSE))
@pytest.mark.parametrize("kind", list(_KINDS))
def test_a_converted_checkpoint_goes_on_as_the_unbroken_run(saved, runs, kind, form):
    unbroken = losses(saved[f"{kind}-{form}"])
    assert len(unbroken) == _STEPS * _MICRO_BATCHES
    after = losses(runs[f"{kind}-{form}"])
    assert after == pytest.approx(unbroken[_SAVED_AFTER * _MICRO_BATCHES :], rel=FP32_REL)
    assert "successfully loaded checkpoint" in runs[f"{kind}-{form}"].output


@pytest.mark.parametrize("form", list(_DENSE))
def test_the_arguments_in_it_build_the_other_form(saved, runs, form):
    """With --use-checkpoint-args and no flag for the model's size."""
    after = losses(runs[f"plain-{form}-arguments"])
    unbroken = losses(saved[f"plain-{form}"])
    assert after == pytest.approx(unbroken[_SAVED_AFTER * _MICRO_BATCHES :], rel=FP32_REL)


def test_a_pattern_in_it_wins_over_a_number_of_layers(saved, runs):
    unbroken = losses(saved["plain-hybrid"])
    after = losses(runs["pattern wins"])
    assert after == pytest.approx(unbroken[_SAVED_AFTER * _MICRO_BATCHES :], rel=FP32_REL)


@pytest.mark.parametrize("kind", list(_KINDS))
def test_megatron_translates_a_gpt_checkpoint_as_it_is_loaded(saved, runs, kind):
    after = losses(runs[f"{kind}-translated"])
    unbroken = losses(saved[f"{kind}-gpt"])
    assert after == pytest.approx(unbroken[_SAVED_AFTER * _MICRO_BATCHES :], rel=FP32_REL)


@pytest.mark.parametrize("kind", list(_KINDS))
def test_what_it_loads_is_what_the_converter_writes(root, runs, changed, kind):
    """Every tensor to the bit: weights, taps, and what the optimizer keeps of each."""
    assert losses(runs[f"{kind}-again"]) == []
    loaded = tensors(root / f"{kind}-again" / _ITERATION)
    converted = tensors(changed[f"{kind}-gpt"] / _ITERATION)
    assert differing(loaded, converted) == []
    # Errors that the comparison must see: another layer's moments, and none.
    key = "optimizer.state.exp_avg.decoder.layers.{}.self_attention.beta_2"
    swapped = {**loaded, key.format(0): loaded[key.format(2)]}
    assert differing(swapped, converted) == [key.format(0)]
    del swapped[key.format(0)]
    assert differing(swapped, converted) == [key.format(0)]


@pytest.mark.parametrize("form", list(_DENSE))
@pytest.mark.parametrize("kind", list(_KINDS))
def test_it_holds_what_a_run_of_that_form_saves(root, saved, changed, kind, form):
    """The same keys, shapes and dtypes; the numbers of another run need not be the same."""
    ours = tensors(changed[f"{kind}-{form}"] / _ITERATION)
    theirs = tensors(root / f"{kind}-{_OTHER[form]}" / _ITERATION)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor.shape, tensor.dtype) == (theirs[key].shape, theirs[key].dtype), key


def test_weights_of_hugging_face_start_both_forms_alike(runs):
    assert losses(runs["hf-as-hybrid"]) == pytest.approx(losses(runs["hf-as-gpt"]), rel=FP32_REL)
    assert len(losses(runs["hf-as-gpt"])) == _STEPS * _MICRO_BATCHES


@pytest.mark.parametrize("name", list(_REFUSED))
def test_a_checkpoint_that_does_not_fit_ends_with_one_sentence(runs, name):
    run = runs[name]
    assert run.code != 0 and not run.losses, run.output[-3000:]
    last = run.output.strip().splitlines()[-1]
    for part in ["load: the ", *_REFUSED[name][1]]:
        assert part in last, run.output[-3000:]
    assert "successfully loaded checkpoint" not in run.output
