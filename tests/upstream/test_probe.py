"""The probe of the seams: intact on the installed release, and broken by each planted change."""

import tomllib
from argparse import Namespace
from types import FunctionType

import pytest
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.attention import SelfAttention
from megatron.training import checkpointing, training

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.attention.validation import check_at_start
from kvshift_megatron.cpu import megatron_hooks
from kvshift_megatron.upstream import overridden, probe
from kvshift_megatron.upstream.seams import Seam
from tests.support.launch import PROJECT
from tests.upstream import tables

NEXT, OLDER = "0.97.0", "0.19.1"  # outside of the supported range, and inside
CONFIG = Namespace(num_query_groups=2, tensor_model_parallel_size=1)


@pytest.fixture(autouse=True)
def _from_the_start():
    """Have each test probe and warn anew."""
    for cached in (probe.check_release, probe._warn):
        cached.cache_clear()
    yield
    for cached in (probe.check_release, probe._warn):
        cached.cache_clear()


@pytest.fixture
def calls_itself(monkeypatch):
    return lambda release: monkeypatch.setattr(probe, "installed", lambda library: release)


def faults() -> dict[str, str]:
    return {seam.target: fault for _, seam in probe.seams() if (fault := seam.fault())}


def test_every_seam_of_the_installed_release_is_intact():
    assert faults() == {}


def test_every_row_in_megatron_is_a_seam():
    rows = {row.target for _, row in tables.rows() if row.library == "megatron" and row.applies()}
    found = {seam.target for _, seam in probe.seams()}
    assert {row for row in rows if not row.startswith("megatron.bridge.")} <= found
    assert len(found) > 40


def overrides(own: type) -> set[str]:
    """Return Megatron's methods that a class overrides, by their names in its base."""
    (base,) = own.__bases__
    return {
        f"{base.__module__}.{base.__name__}.{name}"
        for name in vars(own)
        for home in base.__mro__
        if home.__module__.startswith("megatron.")
        and isinstance(vars(home).get(name), FunctionType | classmethod | staticmethod)
    }


def test_every_overridden_method_is_a_seam():
    listed = {seam.target for seam in overridden.of_attention()}
    assert overrides(KVShiftSelfAttention) == listed
    layer = {seam.target for seam in overridden.of_cpu_layer()}
    own = [
        megatron_hooks.distributed_optimizer(DistributedOptimizer),
        megatron_hooks.async_caller(PersistentAsyncCaller),
    ]
    assert set().union(*map(overrides, own)) == layer


def test_every_overridden_method_of_the_builders_is_a_seam():
    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelBuilder
    from kvshift_megatron.training.hybrid_builder import KVShiftHybridModelBuilder

    listed = {seam.target for seam in overridden.of_builders()}
    assert overrides(KVShiftGPTModelBuilder) | overrides(KVShiftHybridModelBuilder) == listed


def test_the_range_is_that_of_the_package():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert f"megatron-core{probe.SUPPORTED}" in project["dependencies"]


# Planted in Megatron: functions that it does not have.
def renamed_forward(self, hidden_states, attention_mask, rotary=None, packed_seq_params=None):
    self.core_attention(self.apply_rotary_pos_emb(self.get_query_key_value_tensors()))


def rotating_first(self, hidden_states, attention_mask, rotary_pos_emb, packed_seq_params):
    self.apply_rotary_pos_emb(hidden_states)
    self.core_attention(self.get_query_key_value_tensors(hidden_states))


def another_way_to_keys(self, hidden_states, attention_mask, rotary_pos_emb, packed_seq_params):
    self.core_attention(self.apply_rotary_pos_emb(self.linear_qkv(hidden_states)))


def without_norm(self, hidden_states, key_value_states=None):
    return self.linear_qkv(hidden_states)


def rotating_keys(self, hidden_states, key_value_states=None):
    return self.apply_rotary_pos_emb(self.k_layernorm(self.linear_qkv(hidden_states)))


def one_more(save_dir, leave_ckpt_num=1, do_async=False, keep=None): ...


def other_order(loss_dict, total_loss_dict, iteration, learning_rate): ...


ATTENTION = "megatron.core.transformer.attention.SelfAttention"
PLANTED = {
    "parameter renamed": (SelfAttention, "forward", renamed_forward, "takes (hidden_states"),
    "rotates before": (SelfAttention, "forward", rotating_first, "uses apply_rotary_pos_emb bef"),
    "other way": (SelfAttention, "forward", another_way_to_keys, "no longer uses get_query_key"),
    "no norm": (SelfAttention, "get_query_key_value_tensors", without_norm, "no longer uses k_lay"),
    "rotates": (SelfAttention, "get_query_key_value_tensors", rotating_keys, "uses apply_rotary"),
    "parameter added": (checkpointing, "cleanup_old_non_persistent_checkpoint", one_more, "keep"),
    "parameters swapped": (training, "training_log", other_order, "iteration, learning_rate"),
    "no function": (training, "train_step", 7, "is no function any more"),
}


@pytest.fixture(params=PLANTED)
def planted(request, monkeypatch) -> tuple[str, str]:
    """Plant one change, and return the target and a part of the expected clause."""
    owner, name, change, clause = PLANTED[request.param]
    monkeypatch.setattr(owner, name, change)
    where = ATTENTION if owner is SelfAttention else owner.__name__
    return f"{where}.{name}", clause


def test_a_planted_change_breaks_its_seam_alone(planted):
    target, clause = planted
    assert set(faults()) == {target}
    assert clause in faults()[target]


def test_a_function_that_is_gone_breaks_its_seam(monkeypatch):
    monkeypatch.delattr(training, "train_step")
    assert faults() == {"megatron.training.training.train_step": "is gone"}
    assert Seam("megatron.training.no_such_module.name", "Why it is.").fault() == "is gone"


def test_the_command_names_every_seam(monkeypatch, capsys):
    assert probe.main() == 0
    out = capsys.readouterr().out
    assert f"intact  attention    {ATTENTION}.forward\n" in out
    assert "broken  " not in out and ": 0 broken seams" in out
    monkeypatch.setattr(SelfAttention, "forward", another_way_to_keys)
    assert probe.main() == 1
    out = capsys.readouterr().out
    assert f"broken  attention    {ATTENTION}.forward no longer uses" in out
    assert ": 1 broken seams" in out


def test_another_release_is_warned_of_once_and_runs(calls_itself, capsys):
    calls_itself(NEXT)
    for _ in range(2):
        check_at_start(CONFIG)
        probe.check_release(probe.ENTRY_POINT)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("WARNING") == 1
    assert NEXT in said and "make test-next MEGATRON_PATH=CHECKOUT" in said


def test_another_rank_says_nothing(calls_itself, capsys, monkeypatch):
    calls_itself(NEXT)
    monkeypatch.setenv("RANK", "1")
    probe.check_release(probe.ATTENTION)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("release", [OLDER, "0.19.9rc1", "0.19.2+d98e8a6"])
def test_a_supported_release_is_not_probed(calls_itself, capsys, monkeypatch, release):
    calls_itself(release)
    monkeypatch.delattr(training, "train_step")
    probe.check_release(probe.ENTRY_POINT, probe.ATTENTION)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("release", [NEXT, "0.20.0", "0.20.0rc1+d98e8a6", "0.16.1"])
def test_another_release_with_a_broken_seam_is_refused(calls_itself, monkeypatch, release):
    calls_itself(release)
    monkeypatch.setattr(SelfAttention, "forward", another_way_to_keys)
    with pytest.raises(ValueError, match="no longer uses get_query_key_value_tensors") as refused:
        check_at_start(CONFIG)
    for part in (release, f"{ATTENTION}.forward", f"install megatron-core{probe.SUPPORTED}"):
        assert part in str(refused.value)


def test_what_is_not_used_is_not_probed(calls_itself, monkeypatch):
    calls_itself(NEXT)
    monkeypatch.delattr(training, "train_step")
    probe.check_release(probe.ATTENTION)
    with pytest.raises(ValueError, match="train_step is gone"):
        probe.check_release(probe.ENTRY_POINT)


def test_the_entry_point_refuses_before_it_reads_a_flag(calls_itself, monkeypatch):
    from kvshift_megatron.training.run_config import parse_and_check

    calls_itself(NEXT)
    monkeypatch.delattr(training, "train_step")
    monkeypatch.setattr("sys.argv", ["pretrain", "--no-such-flag"])
    with pytest.raises(ValueError, match="train_step is gone"):
        parse_and_check()
