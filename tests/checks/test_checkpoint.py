"""Checkpoints that do not fit the model or are damaged: refused before a weight is loaded."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.checks import checkpoint
from kvshift_megatron.checks.checkpoint import (
    check_checkpoint,
    compare_taps,
    stored_taps,
)
from kvshift_megatron.checks.stored_files import read_checkpoint
from kvshift_megatron.checks.to_load import checkpoint_to_load
from kvshift_megatron.gpt_specs import convert_specs
from tests.checks.models import FREE, IDENTITY, asked_for, build
from tests.support.gpt_with_mtp import gpt_with_mtp
from tests.support.single_process import transformer_config

FREE_TAPS = {"alpha_1", "alpha_2", "beta_1", "beta_2"}


def checkpoints(root, tracker="20"):
    root.mkdir()
    (root / "latest_checkpointed_iteration.txt").write_text(f"{tracker}\n")
    return str(root)


def arguments(**values):
    defaults = {"load": None, "pretrained_checkpoint": None, "ckpt_step": None}
    return Namespace(**{"finetune": False, "no_load_optim": None, **defaults, **values})


# --- which taps it holds ---


def save_distributed(directory, names):
    state = {name: torch.zeros(2) for name in names}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    return directory


VANILLA_NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "optimizer.state.exp_avg.decoder.layers.self_attention.linear_qkv.weight",
]


@pytest.mark.parametrize(
    ("keys", "taps"),
    [
        ([], set()),
        (["decoder.layers.self_attention.alpha_1"], {"alpha_1"}),
        (["decoder.layers.3.self_attention.beta_logit"], {"beta_logit"}),
        (
            ["mtp.layers.0.mtp_model_layer.self_attention.alpha_2", "a.self_attention.beta_10"],
            {"alpha_2", "beta_10"},
        ),
        # The optimizer's copies and other modules' names do not count.
        (["optimizer.state.exp_avg.decoder.layers.self_attention.alpha_1"], set()),
        (["decoder.layers.mlp.alpha_1", "decoder.self_attention.alpha_1.weight"], set()),
    ],
)
def test_taps_of_a_distributed_checkpoint(tmp_path, keys, taps):
    directory = save_distributed(tmp_path / "iter_0000002", VANILLA_NAMES + keys)
    assert stored_taps(directory) == taps


def test_another_format_is_left_to_the_load(tmp_path):
    legacy = tmp_path / "iter_0000002" / "mp_rank_00"
    legacy.mkdir(parents=True)
    torch.save({"model": {}}, legacy / "model_optim_rng.pt")
    assert stored_taps(legacy.parent) is None


# --- whether they are the taps that were asked for ---


def test_equal_taps_are_loaded():
    directory = Path("run/iter_0000002")
    assert compare_taps(directory, set(), None, arguments(load="run")) is False
    for kv_shift in (FREE, IDENTITY):
        assert compare_taps(directory, FREE_TAPS, kv_shift, arguments(load="run")) is False
    keys_only = KVShiftConfig(window=3, shift_values=False)
    stored = {"alpha_1", "alpha_2", "alpha_3"}
    assert compare_taps(directory, stored, keys_only, arguments(load="run")) is False


@pytest.mark.parametrize(
    ("stored", "kv_shift", "given", "parts"),
    [
        (
            FREE_TAPS,
            None,
            {},
            ["load: ", "with KV shifting", "alpha_1, alpha_2, beta_1", "drop --no-kv-shift"],
        ),
        (
            FREE_TAPS,
            KVShiftConfig(window=3),
            {},
            ["load: ", "holds the taps alpha_1, alpha_2, beta_1, beta_2", "alpha_3", "--kv-shift-"],
        ),
        (FREE_TAPS, KVShiftConfig(variant="gate"), {}, ["gate, window 2", "alpha_logit"]),
        (FREE_TAPS, KVShiftConfig(shift_keys=False), {}, ["has beta_1, beta_2:"]),
        # Identity taps start only from checkpoints without taps.
        (FREE_TAPS, KVShiftConfig(window=3, init="identity"), {"finetune": True}, ["alpha_3"]),
        (set(), FREE, {}, ["load: ", "holds no taps", "--kv-shift-init identity"]),
        (set(), FREE, {"finetune": True}, ["holds no taps", "--kv-shift-init identity"]),
        (set(), IDENTITY, {}, ["load: ", "optimizer state", "--finetune", "--no-load-optim"]),
    ],
)
def test_unequal_taps_are_refused_with_setting_and_remedy(stored, kv_shift, given, parts):
    with pytest.raises(ValueError) as caught:
        compare_taps(Path("run/iter_0000002"), stored, kv_shift, arguments(load="run", **given))
    for part in ["run/iter_0000002", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"load": "run", "finetune": True},
        {"load": "run", "no_load_optim": True},
        # Megatron loads only the weights of --pretrained-checkpoint.
        {"load": None, "pretrained_checkpoint": "run"},
        {"load": "new", "pretrained_checkpoint": "run"},
    ],
)
def test_identity_taps_start_from_a_vanilla_checkpoints_weights(given):
    assert compare_taps(Path("run/iter_0000002"), set(), IDENTITY, arguments(**given)) is True


def test_a_trailing_slash_in_load_still_names_the_same_folder(tmp_path):
    root = checkpoints(tmp_path / "run")
    args = arguments(load=root + "/")
    with pytest.raises(ValueError, match="--finetune"):
        compare_taps(checkpoint_to_load(args).directory, set(), IDENTITY, args)


# --- the whole check, as check_model calls it ---


@pytest.fixture
def loading(tmp_path, monkeypatch):
    """Return a function that makes Megatron's arguments load a checkpoint with given keys."""

    def load(keys, **given):
        root = checkpoints(tmp_path / "run", "2")
        save_distributed(Path(root) / "iter_0000002", VANILLA_NAMES + keys)
        args = arguments(load=root, **given)
        monkeypatch.setattr(checkpoint, "megatron_args", lambda: args)

    return load


TAP_KEYS = [f"decoder.layers.self_attention.{name}" for name in sorted(FREE_TAPS)]


def test_a_vanilla_checkpoint_is_refused_before_it_is_loaded(megatron_rank, loading):
    loading([])
    model = build(FREE)
    with pytest.raises(ValueError, match="--kv-shift-init identity"):
        check_checkpoint([model], FREE)


def test_a_checkpoint_with_taps_is_refused_for_the_baseline(megatron_rank, loading):
    loading(TAP_KEYS)
    with pytest.raises(ValueError, match="drop --no-kv-shift"):
        check_checkpoint([build(None)], None)


def test_a_model_asks_a_vanilla_checkpoint_for_no_taps(megatron_rank, loading):
    loading([], finetune=True)
    model = build(IDENTITY)
    assert len(asked_for(model)) == 8
    check_checkpoint([model], IDENTITY)
    assert asked_for(model) == []


def test_a_matching_checkpoint_passes_and_so_does_none(megatron_rank, loading, monkeypatch):
    monkeypatch.setattr(checkpoint, "megatron_args", lambda: None)
    for kv_shift in (None, FREE, IDENTITY):
        check_checkpoint([build(kv_shift)], kv_shift)
    loading(TAP_KEYS)
    model = build(FREE)
    check_checkpoint([model], FREE)
    assert len(asked_for(model)) == 8


# --- the rest of the model, and the files ---

# With these settings keys have layer numbers; otherwise layers are stacked under one key.
NUMBERED = {
    "num_moe_experts": 4,
    "moe_layer_freq": [0, 1],
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "add_bias_linear": False,
}


def build_mtp():
    config = transformer_config(mtp_num_layers=1)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    return gpt_with_mtp(config, *convert_specs(block, mtp, config, FREE, None))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return a function that saves a model and makes Megatron's arguments load it."""

    def save(model, **given):
        root = checkpoints(tmp_path / "run", "2")
        directory = Path(root) / "iter_0000002"
        directory.mkdir()
        content = {"singleton_local_shards": False}
        state = {"model": model.sharded_state_dict(metadata=content)}
        dist_checkpointing.save(state, str(directory), content_metadata=content)
        args = arguments(load=root, **given)
        monkeypatch.setattr(checkpoint, "megatron_args", lambda: args)
        return directory

    return save


@pytest.mark.parametrize(
    ("overrides", "numbered"), [({}, False), (NUMBERED, True)], ids=["stacked", "numbered"]
)
@pytest.mark.parametrize("kv_shift", [None, FREE], ids=["vanilla", "taps"])
def test_a_checkpoint_of_the_same_model_passes(megatron_rank, saved, overrides, numbered, kv_shift):
    directory = saved(build(kv_shift, **overrides))
    keys = read_checkpoint(directory).shapes
    assert ("decoder.layers.1.self_attention.linear_qkv.weight" in keys) == numbered
    check_checkpoint([build(kv_shift, **overrides)], kv_shift)


def test_wrapped_models_pass_and_so_does_multi_token_prediction(megatron_rank, saved):
    directory = saved(build_mtp())
    assert any(key.startswith("mtp.layers.0.") for key in read_checkpoint(directory).shapes)
    model = build_mtp()
    check_checkpoint([model], FREE)
    bf16 = transformer_config(bf16=True, params_dtype=torch.bfloat16)
    check_checkpoint([Float16Module(bf16, model)], FREE)


@pytest.mark.parametrize("overrides", [{}, NUMBERED], ids=["stacked", "numbered"])
def test_identity_taps_are_not_expected_in_a_vanilla_checkpoint(megatron_rank, saved, overrides):
    saved(build(None, **overrides), finetune=True)
    model = build(IDENTITY, **overrides)
    check_checkpoint([model], IDENTITY)
    assert asked_for(model) == []


def test_another_padding_of_the_vocabulary_passes(megatron_rank, saved):
    saved(build(FREE))
    check_checkpoint([build(FREE, vocab_size=96)], FREE)


@pytest.mark.parametrize(
    ("trained", "built", "parts"),
    [
        ({}, {"hidden_size": 64}, ["decoder.final_layernorm.weight", "[32]", "[64] (and "]),
        ({}, {"num_layers": 3}, ["decoder.layers.mlp.linear_fc1.", "[2, 32]", "[3, 32]"]),
        ({}, {"num_query_groups": 4}, ["self_attention.alpha_1", "[2, 2]", "[2, 4]"]),
        ({}, {"ffn_hidden_size": 64}, ["mlp.linear_fc1.weight", "[2, 96, 32]", "[2, 128, 32]"]),
        ({}, {"qk_layernorm": True}, ["does not hold", "k_layernorm.weight", "shape [2, 8]"]),
        ({}, NUMBERED, ["does not hold decoder.layers.0.mlp.", "shape [32]"]),
        (NUMBERED, {}, ["does not hold decoder.layers.mlp.", "shape [2, 32]"]),
        (NUMBERED, {**NUMBERED, "num_query_groups": 4}, ["layers.0.self_attention.alpha_1", "[4]"]),
        (
            NUMBERED,
            {**NUMBERED, "num_layers": 3, "moe_layer_freq": [0, 1, 0]},
            ["does not hold decoder.layers.2."],
        ),
        (
            {**NUMBERED, "num_layers": 3, "moe_layer_freq": [0, 1, 0]},
            NUMBERED,
            ["layers that the model does not have", "drop (decoder.layers.2)"],
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(megatron_rank, saved, trained, built, parts):
    saved(build(FREE, **trained))
    with pytest.raises(ValueError) as caught:
        check_checkpoint([build(FREE, **built)], FREE)
    for part in ["load: the checkpoint", "run/iter_0000002", "--num-layers", *parts]:
        assert part in str(caught.value)


def test_parts_may_be_missing_if_the_user_allows_it(megatron_rank, saved):
    saved(build(FREE), dist_ckpt_strictness="log_unexpected")
    check_checkpoint([build(FREE, qk_layernorm=True)], FREE)
    with pytest.raises(ValueError, match=r"\[2, 32\].*\[3, 32\]"):
        check_checkpoint([build(FREE, num_layers=3)], FREE)


def shards(directory):
    return sorted(directory.glob("*.distcp"))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: shards(d)[0].unlink(), ["file __0_0.distcp of", "is missing (it holds "]),
        (
            lambda d: shards(d)[0].write_bytes(shards(d)[0].read_bytes()[:-1]),
            ["file __0_0.distcp of", "bytes long and should be"],
        ),
        (lambda d: (d / ".metadata").unlink(), ["no .metadata", "save did not finish"]),
        (
            lambda d: (d / ".metadata").write_bytes((d / ".metadata").read_bytes()[:-99]),
            [".metadata of the checkpoint", "cannot be read"],
        ),
        (lambda d: (d / ".metadata").write_bytes(b""), [".metadata", "cannot be read"]),
        (lambda d: d.rename(d.with_name("elsewhere")), ["no checkpoint folder", "--ckpt-step"]),
    ],
    ids=["no shard", "short shard", "no metadata", "short metadata", "no bytes", "no folder"],
)
def test_a_damaged_checkpoint_is_refused(megatron_rank, saved, damage, parts):
    directory = saved(build(FREE))
    damage(directory)
    with pytest.raises(ValueError) as caught:
        check_checkpoint([build(FREE)], FREE)
    for part in ["load: ", "run/iter_0000002", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-30]), "is cut off, or not what torch"),
        (lambda file: file.write_bytes(b""), "is cut off, or not what torch.save wrote"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_of_the_older_format_is_refused(tmp_path, damage, words):
    files = [tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt" for rank in range(2)]
    for file in files:
        file.parent.mkdir()
        torch.save({"model": torch.zeros(9)}, file)
    torch.save({"model": torch.zeros(9)}, files[0], _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path) is None
    damage(files[1])
    with pytest.raises(ValueError, match=rf"file mp_rank_01/model_optim_rng.pt of .* {words}"):
        read_checkpoint(tmp_path)


# --- every way in which Megatron comes to a checkpoint ---

WAYS = {
    "a tracker file": ("", "2", {}),
    "no tracker file": ("", None, {"ckpt_step": 2}),
    "a non-persistent one": ("non_persistent", "2", {"non_persistent_ckpt_type": "global"}),
    "a non-persistent one elsewhere": (
        "elsewhere",
        "2",
        {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": "elsewhere"},
    ),
    "a pretrained one": ("base", "2", {"pretrained_checkpoint": "base"}),
    "before it is converted": ("", "2", {"ckpt_convert_format": "torch"}),
}


@pytest.fixture
def come_to(tmp_path, monkeypatch):
    """Return a function that puts a checkpoint in place, with the arguments that lead to it."""

    def come(way, save):
        place, tracker, given = WAYS[way]
        paths = {name for name in given if name.endswith(("_dir", "_checkpoint"))}
        given = {name: str(tmp_path / v) if name in paths else v for name, v in given.items()}
        root = tmp_path / place
        root.mkdir(exist_ok=True)
        save(root / "iter_0000002")
        if tracker is not None:
            (root / "latest_checkpointed_iteration.txt").write_text(tracker)
        args = arguments(load=str(tmp_path), **given)
        monkeypatch.setattr(checkpoint, "megatron_args", lambda: args)
        return args

    return come


def save_model(model):
    def save(directory):
        directory.mkdir()
        content = {"singleton_local_shards": False}
        state = {"model": model.sharded_state_dict(metadata=content)}
        dist_checkpointing.save(state, str(directory), content_metadata=content)

    return save


def save_plain(model):
    """Save in torch's plain format, as with --ckpt-format torch_dcp."""

    def save(directory):
        state = {k: v for k, v in model.state_dict().items() if v is not None}
        writer = dcp.FileSystemWriter(directory)
        dcp.save({"model": state}, storage_writer=writer, no_dist=True)

    return save


# Non-persistent checkpoints have one format.
PLAIN = [(way, save_plain) for way in WAYS if "non-persistent" not in way]


@pytest.mark.parametrize(("way", "save"), [*((way, save_model) for way in WAYS), *PLAIN])
def test_the_baseline_never_loads_taps(megatron_rank, come_to, way, save):
    come_to(way, save(build(FREE)))
    with pytest.raises(ValueError, match=r"iter_0000002 was trained with .*drop --no-kv-shift"):
        check_checkpoint([build(None)], None)
    check_checkpoint([build(FREE)], FREE)


@pytest.mark.parametrize("way", WAYS)
def test_other_taps_and_damage_are_refused(megatron_rank, come_to, way):
    args = come_to(way, save_model(build(FREE)))
    gate = KVShiftConfig(variant="gate")
    with pytest.raises(ValueError, match=r"holds the taps alpha_1.*has alpha_logit"):
        check_checkpoint([build(gate)], gate)
    found = checkpoint_to_load(args).directory
    shards(found)[0].write_bytes(b"")
    with pytest.raises(ValueError, match=rf"of the checkpoint {found} is 0 bytes long"):
        check_checkpoint([build(FREE)], FREE)


def test_a_non_persistent_vanilla_one_needs_finetune_as_the_others_do(megatron_rank, come_to):
    args = come_to("a non-persistent one", save_model(build(None)))
    with pytest.raises(ValueError, match="optimizer state of the vanilla checkpoint"):
        check_checkpoint([build(IDENTITY)], IDENTITY)
    args.finetune = True
    model = build(IDENTITY)
    check_checkpoint([model], IDENTITY)
    assert asked_for(model) == []


def test_a_dense_checkpoint_is_compared_with_the_dense_model_only(megatron_rank, come_to):
    """With --moe-use-upcycling Megatron builds the model with experts first."""
    args = come_to("a tracker file", save_model(build(FREE)))
    args.moe_use_upcycling, args.num_experts = True, 4
    check_checkpoint([build(FREE, **NUMBERED)], FREE)
    args.num_experts = None
    with pytest.raises(ValueError, match="drop --no-kv-shift"):
        check_checkpoint([build(None)], None)


def test_only_files_and_taps_of_plain_torch_checkpoints_are_checked(tmp_path):
    directory = save_distributed(tmp_path / "iter_0000002", VANILLA_NAMES)
    assert read_checkpoint(directory).content is None
    shards(directory)[0].unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_checkpoint(directory)
