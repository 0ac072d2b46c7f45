"""Parts of a plan that need no model."""

import copy
import sys
from argparse import Namespace

import pytest
import torch

from kvshift_megatron.planning import assumed_kernels, dry_run, gpus, meta_device
from kvshift_megatron.planning.blocks import Blocks
from kvshift_megatron.planning.dry_run_flags import dry_run_flags
from kvshift_megatron.planning.estimate import Assumptions, estimate
from kvshift_megatron.planning.layout import Layout
from kvshift_megatron.planning.memory import (
    LiveStorages,
    SavedTensors,
    follow_resizes,
    unique_bytes,
)
from kvshift_megatron.planning.search import candidates
from kvshift_megatron.planning.wire import wire_bytes
from kvshift_megatron.specs.te_free import core_attention, sdpa


def row(operation, ranks, size, group="TP", messages=1):
    return {"during": "forward", "group": group, "operation": operation, "ranks": ranks,
            "messages": messages, "bytes": size}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "contributed", "wire"),
    [
        ("all-reduce", 400, 600),  # a reduce-scatter and an all-gather
        ("reduce-scatter", 400, 300),
        ("all-gather", 100, 300),
        ("all-to-all", 400, 300),
        ("send", 100, 100),
    ],
)
def test_bytes_on_the_wire_between_four_ranks(operation, contributed, wire):
    assert wire_bytes(row(operation, 4, contributed)) == wire


def test_saved_tensors_are_counted_once_and_released():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(16, 8, requires_grad=True)
    saved = SavedTensors([weight])
    with saved:
        y = (x @ weight).relu()  # x, not the weight, and the result of relu
        z = y * y.view_as(y)  # the same storage twice
    assert saved.now == saved.peak == 2 * 16 * 8 * 4
    z.sum().backward()
    del y, z
    assert saved.now == 0


def test_live_storages_drop_what_is_freed_and_skip_what_is_known():
    known = torch.empty(100)
    storages = LiveStorages("cpu", [known])
    first = torch.empty(10)
    for tensor in (known, known.view(10, 10), first, first[2:]):
        storages.see(tensor)
    assert storages.now == 40
    second = torch.empty(5)
    storages.see(second)
    del first, tensor
    assert (storages.now, storages.peak) == (20, 60)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_that_only_autograd_holds_is_the_same_one(device):
    storages = LiveStorages(device)
    x = torch.ones(8, device=device, requires_grad=True)
    result = x.exp()
    storages.see(result)
    node = result.grad_fn
    del result
    assert storages.now == 32
    storages.see(node._saved_result)
    assert (storages.now, storages.peak) == (32, 32)
    del node
    assert storages.now == 0


def test_live_storages_follow_what_is_resized():
    storages = LiveStorages("cpu")
    tensor = torch.empty(10)
    storages.see(tensor)
    with follow_resizes(storages):
        tensor.untyped_storage().resize_(0)
        assert storages.now == 0
        tensor.untyped_storage().resize_(80)
    assert (storages.now, storages.peak) == (80, 80)
    tensor.untyped_storage().resize_(0)  # resizes are no longer followed
    assert storages.now == 80


def test_unique_bytes_counts_padding_and_shared_storage_once():
    buffer = torch.zeros(64)
    assert unique_bytes([buffer[:10], buffer[20:30]]) == 256


def test_flags_of_a_dry_run():
    kept = dry_run_flags(
        ("--data-path", "a", "b", "--num-layers", "2", "--transformer-impl", "transformer_engine",
         "--save=x", "--tp-comm-overlap", "--bf16")
    )  # fmt: skip
    assert kept[:3] == ["--num-layers", "2", "--bf16"]
    assert "--fake-process-group" in kept


@pytest.mark.parametrize("flag", ["--sft", "--num-experts", "--use-precision-aware-optimizer"])
def test_what_cannot_be_counted_is_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} cannot be planned: .*"):
        dry_run_flags(("--num-layers", "2", flag, "8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hybrid-layer-pattern", "*E*-"), "only the data tells how many tokens each expert"),
        (("--hybrid-layer-pattern=M-*-|G-*-",), "layers G, M keep and compute is up to a GPU's"),
        (("--hybrid-override-pattern", "*-/M-"), "layers M keep"),
        (("--hybrid-layer-pattern", "*-", "--hybrid-layer-pattern", "D-"), "layers D keep"),
    ],
)
def test_layers_that_cannot_be_counted_are_refused(words, message):
    flag = words[0].partition("=")[0]
    with pytest.raises(ValueError, match=f"{flag} .* cannot be planned: .*{message}"):
        dry_run_flags(("--hidden-size", "8", *words))
    kept = dry_run_flags(("--hybrid-layer-pattern", "*-|*-/*-", "--bf16"))
    assert kept[:3] == ["--hybrid-layer-pattern", "*-|*-/*-", "--bf16"]


def arguments(**changes):
    values = dict(
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        pipeline_model_parallel_size=4,
        global_batch_size=64,
        micro_batch_size=2,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=None,
        pipeline_model_parallel_layout=None,
        num_attention_heads=12,
        group_query_attention=True,
        num_query_groups=2,
        ffn_hidden_size=1024,
        seq_length=256,
        num_layers=12,
        hybrid_layer_pattern=None,
    )
    return Namespace(**values | changes)


def test_layout_counts_ranks_as_megatron_does():
    layout = Layout.of(arguments(), 64)
    assert (layout.dp, layout.micro_batches, layout.world_size) == (4, 8, 64)
    assert layout.rank(1) == 16
    assert layout.rank(3, dp=3, cp=1, tp=1) == 63
    assert layout.probes(0) == {"TP 1": 1, "DP 3": 12, "CP 1": 2}


def test_layout_says_what_does_not_divide():
    with pytest.raises(ValueError, match="60 processes are not divisible by TP 2 x CP 2 x PP 4"):
        Layout.of(arguments(), 60)
    with pytest.raises(ValueError, match="global-batch-size is 60: it must be divisible by micro"):
        Layout.of(arguments(global_batch_size=60), 64)


def test_a_long_step_is_counted_by_two_short_ones():
    layout = Layout.of(arguments(global_batch_size=6400), 64)
    assert layout.counted_steps(0) == (5, 6)
    assert layout.counted_steps(3) == (2, 3)
    assert Layout.of(arguments(global_batch_size=24), 64).counted_steps(0) == (3,)
    interleaved = arguments(global_batch_size=6400, num_virtual_stages_per_pipeline_rank=3)
    assert Layout.of(interleaved, 64).counted_steps(0) == (8, 12)


def test_segments_of_a_pattern_beyond_the_stages_are_interleaved():
    for segments, expected in ((4, False), (8, True)):
        pattern = "|".join(["*-"] * segments)
        layout = Layout.of(arguments(hybrid_layer_pattern=pattern, num_layers=None), 64)
        assert layout.interleaved == expected


def test_a_pattern_has_the_candidates_of_the_gpt_model():
    own = arguments(hybrid_layer_pattern="*-*-|" * 5 + "*-*-", num_layers=None)
    assert list(candidates(own, 64, 8)) == list(candidates(arguments(), 64, 8))
    # One layer less repeats nothing.
    odd = list(candidates(arguments(hybrid_layer_pattern="*-" * 11 + "*"), 64, 8))
    assert odd and {candidate.layout.pp for candidate in odd} == {1}


def test_blocks_of_both_forms():
    gpt, hybrid = Blocks.of(arguments()), Blocks.of(arguments(hybrid_layer_pattern="*-|*-/*-"))
    assert (gpt.count, hybrid) == (12, Blocks(2, "*-", "/*-"))
    assert gpt.flags(6) == {"num-layers": 6}
    assert gpt.flags(6, 3, 2) == {"num-layers": 6, "num-layers-per-virtual-pipeline-stage": 1}
    assert hybrid.flags(6) == {"hybrid-layer-pattern": "*-*-*-*-*-*-/*-"}
    assert hybrid.flags(6, 3) == {"hybrid-layer-pattern": "*-*-|*-*-|*-*-/*-"}
    assert hybrid.flags(4, 2, 2) == {"hybrid-layer-pattern": "*-|*-|*-|*-/*-"}
    full = {"recompute-granularity": "full", "recompute-num-layers": 1}
    assert gpt.recomputed(full) == full
    assert hybrid.recomputed(full) == full | {"recompute-num-layers": 2}
    assert Blocks(1, "*-*").recomputed(full) == full


def test_every_candidate_divides_what_it_must():
    found = list(candidates(arguments(), 64, node=8))
    assert len(set(found)) == len(found) > 100
    for candidate in found:
        layout = candidate.layout
        assert layout.world_size == 64
        assert layout.dp * candidate.micro_batch_size * layout.micro_batches == 64
        assert 12 % layout.tp == 0 and 12 % (layout.pp * candidate.chunks) == 0
        assert layout.tp in (1, 2, 4)


def test_a_gpu_of_the_table_takes_the_users_figures():
    gpu = gpus.find("h100-80gb", ["nvlink=1e9", "node=4"])
    assert (gpu.nvlink, gpu.node, gpu.flops) == (1e9, 4, 989.4e12)
    assert "changed by the user" in gpu.source
    for name, changes, words in (
        ("h1000", [], "--gpu h1000: not one of a100-80gb"),
        ("h200", ["speed=3"], "--gpu-set speed=3: expected FIELD=NUMBER"),
        ("h200", ["flops=many"], "--gpu-set flops=many"),
        ("h200", ["flops=-1"], "--gpu-set flops=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            gpus.find(name, changes)


def planned(**layout) -> dict:
    stage = {
        "chunks": 1, "peak_bytes": 50e9, "main_parameter_bytes": 0, "moment_bytes": 0,
        "other_optimizer_bytes": 0,
        "work": {"forward": {"matmul": 6e14}, "backward": {"matmul": 12e14}},
        "traffic": [row("all-gather", 8, 3e9, messages=0)],
    }  # fmt: skip
    sizes = {"tp": 8, "cp": 1, "pp": 1, "dp": 1, "micro_batches": 2, "world_size": 8} | layout
    figures = {
        "global_batch_size": 2, "seq_length": 10, "megatron_flops_per_step": 8 * 18e14,
        "overlap_grad_reduce": False, "overlap_param_gather": False,
    }  # fmt: skip
    return {"layout": sizes, "figures": figures, "stages": [stage], "twin_stages": None}


GPU = gpus.GPU(80e9, 1e15, 1e12, 1e11, 1e10)
PERFECT = Assumptions(1.0, 1.0, 1.0, 0.0, 5e9)


def test_estimate_by_hand():
    times = estimate(planned(), GPU, PERFECT)
    # 18e14 FLOPs at 1e15, and 7 x 3e9 bytes at 1e11, in two micro-batches.
    assert times["step"] == pytest.approx(1.8 + 0.21)
    assert times["mfu"] == pytest.approx(1.8 / 2.01)
    assert times["free_bytes"] == 25e9 and times["fits"]
    slower = estimate(planned(), GPU, Assumptions(0.5, 1.0, 1.0, 0.0, 31e9))
    assert slower["step"] == pytest.approx(3.6 + 0.21) and not slower["fits"]


def test_the_estimate_knows_links_bubble_and_overlap():
    two_nodes = planned(world_size=16)
    two_nodes["stages"][0]["traffic"] = [row("all-gather", 16, 1e9, messages=0)]
    assert estimate(two_nodes, GPU, PERFECT)["messages"] == pytest.approx(15e9 / 8e10 / 2)
    piped = planned(pp=4)
    assert estimate(piped, GPU, PERFECT)["bubble"] == pytest.approx(3 * (1.8 + 0.21) / 2)
    data = planned()
    data["stages"][0]["traffic"] = [row("reduce-scatter", 8, 1e11, group="DP", messages=0)]
    assert estimate(data, GPU, PERFECT)["data"] == pytest.approx(0.875)
    hidden = copy.deepcopy(data)
    hidden["figures"]["overlap_grad_reduce"] = True
    assert estimate(hidden, GPU, PERFECT)["data"] == pytest.approx(0.875 - 0.6)


def test_a_gpu_s_kernels_keep_what_they_are_said_to():
    tokens, heads, size = 64, 4, 16

    def meta(*shape):
        return torch.randn(*shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    x, weight = meta(tokens, 32), meta(32)
    saved = SavedTensors([weight])
    with saved:
        y = assumed_kernels.FusedRMSNorm.apply(x, weight)
    assert saved.now == tokens * (32 * 2 + 4)
    y.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape

    query, key, value = meta(1, heads, tokens, size), *(meta(1, 2, tokens, size) for _ in "kv")
    saved = SavedTensors([])
    with saved:
        kept = assumed_kernels.flash_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert kept.shape == query.shape
    assert saved.now == tokens * ((2 * heads + 2 + 2) * size * 2 + heads * 4)


def test_a_gpu_s_kernels_are_the_ones_that_modules_call(monkeypatch):
    for owner, name in (
        (torch.nn.functional, "rms_norm"),
        (sdpa, "scaled_dot_product_attention"),
        (core_attention, "blockwise_attention"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restored after the test
    monkeypatch.setenv("KVSHIFT_IMPLEMENTATION", "eager")
    assumed_kernels.use("gpu")
    norm = torch.nn.RMSNorm(32, device="meta", dtype=torch.bfloat16)
    x = torch.empty(64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    saved = SavedTensors(norm.parameters())
    with saved:
        y = norm(x)
    assert y.shape == x.shape and saved.now == 64 * (32 * 2 + 4)


def test_the_loop_of_a_dry_run_compiles_nothing_and_agrees_by_itself(monkeypatch):
    from megatron.training import training

    # Stands for Megatron's: what it reads back from the other ranks is zero on the meta device.
    name = "logical_and_across_model_parallel_group"
    monkeypatch.setattr(training, name, lambda flag, group: False)
    args = Namespace()
    with meta_device.loop_without_values(args):
        training.set_jit_fusion_options(tp_size=1)  # Megatron's own would read its arguments
        assert training.logical_and_across_model_parallel_group(True, None) is True
    assert args.do_train and training.logical_and_across_model_parallel_group(True, None) is False


def test_an_older_megatron_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvshift_megatron.training.forward_step", None)
    monkeypatch.setattr(dry_run.cpu, "enable", lambda force: None)
    with pytest.raises(ValueError, match=r"^a plan needs megatron-core 0\.19: import of"):
        dry_run.prepare()
