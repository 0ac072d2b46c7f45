"""The checkpoint that Megatron's own function loads is always one that has been checked."""

from argparse import Namespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.training import checkpointing

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.checks import checkpoint, every_load
from kvshift_megatron.checks.checkpoint import check_checkpoint
from kvshift_megatron.checks.checkpoint_paths import TRACKER, iteration_folder
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from tests.support.single_process import gpt_model, transformer_config

pytestmark = pytest.mark.usefixtures("megatron_rank")

FREE = KVShiftConfig()


def build(kv_shift):
    config = transformer_config()
    if kv_shift is None:
        return gpt_model(config, vanilla_layer_spec(config))
    return gpt_model(config, kv_shift_layer_spec(config, kv_shift=kv_shift))


def save(root, step, kv_shift):
    directory = iteration_folder(root, step)
    directory.mkdir(parents=True)
    model = build(kv_shift)
    content = {"singleton_local_shards": False}
    state = {"model": model.sharded_state_dict(metadata=content), "iteration": step}
    dist_checkpointing.save(state, str(directory), content_metadata=content)
    (root / TRACKER).write_text(str(step))
    return str(root)


@pytest.fixture
def arguments(monkeypatch):
    """Return a function that sets Megatron's arguments."""

    def set_arguments(**values):
        names = ("load", "pretrained_checkpoint", "ckpt_step", "non_persistent_ckpt_type")
        none = dict.fromkeys((*names, "non_persistent_global_ckpt_dir", "no_load_optim"))
        given = {"finetune": True, "exit_on_missing_checkpoint": False, **values}
        args = Namespace(**{**none, **given})
        monkeypatch.setattr(checkpoint, "megatron_args", lambda: args)
        return args

    return set_arguments


def load(root, args):
    """Return what Megatron's own function loads for its first look at a checkpoint."""
    return checkpointing._load_base_checkpoint(root, args, rank0=True)


def test_what_was_checked_is_loaded(tmp_path, arguments):
    args = arguments(load=save(tmp_path / "taps", 2, FREE))
    model = build(FREE)
    check_checkpoint([model], FREE)
    state, name, _, _ = load(args.load, args)
    assert state["iteration"] == 2 and name.endswith("taps/iter_0000002")


def test_another_folder_is_checked_at_the_load(tmp_path, arguments):
    """As for the reference weights of reinforcement learning, which the arguments name later."""
    args = arguments(load=save(tmp_path / "taps", 2, FREE))
    vanilla = save(tmp_path / "vanilla", 2, None)
    model = build(FREE)
    check_checkpoint([model], FREE)
    with pytest.raises(ValueError, match=r"vanilla/iter_0000002 holds no taps"):
        load(vanilla, args)
    save(tmp_path / "taps", 4, None)
    with pytest.raises(ValueError, match=r"taps/iter_0000004 holds no taps"):
        load(args.load, args)
    args.ckpt_step = 2
    load(args.load, args)


def test_the_baseline_too_and_if_there_was_nothing_when_it_was_built(tmp_path, arguments):
    args = arguments(load=str(tmp_path / "taps"))
    model = build(None)
    check_checkpoint([model], None)
    assert load(args.load, args)[0] is None
    save(tmp_path / "taps", 2, FREE)
    with pytest.raises(ValueError, match="drop --no-kv-shift"):
        load(args.load, args)


def test_another_choice_of_megatrons_ends_the_run(tmp_path, arguments, monkeypatch):
    """What no test could foresee: Megatron loads something else than was expected."""
    args = arguments(load=save(tmp_path / "taps", 2, FREE))
    model = build(FREE)
    check_checkpoint([model], FREE)
    monkeypatch.setattr(every_load, "checkpoint_in", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"Megatron loads .*iter_0000002, and .* was checked is none"
    ):
        load(args.load, args)


def test_a_model_that_is_gone_is_no_obstacle(tmp_path, arguments):
    args = arguments(load=save(tmp_path / "taps", 2, FREE))
    model = build(FREE)
    check_checkpoint([model], FREE)
    assert not every_load._watch.is_over()
    del model
    assert every_load._watch.is_over()
    vanilla = save(tmp_path / "vanilla", 2, None)
    assert load(vanilla, args)[0]["iteration"] == 2
    assert torch.distributed.is_initialized()
