"""Hybrid models: Hugging Face's side does not notice, and change-form changes nothing else."""

import filecmp
import json

import pytest
import torch
from megatron.core import dist_checkpointing

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.checks.model_forms import pattern_of
from kvshift_megatron.convert.change_form import ChangeForm, change_form
from kvshift_megatron.convert.command_line import main
from kvshift_megatron.convert.form_keys import named, things
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.checks.models import build_hybrid
from tests.convert import models
from tests.convert.test_round_trips import equal, random_folder, stored
from tests.support.saved_tensors import differing, tensors

KINDS = {
    "dense": {},
    "norms and window": {"qk_layernorm": True, "kv_shift": KVShiftConfig(window=3)},
    "experts": {"num_experts": 4},
    "biases, without taps": {"add_qkv_bias": True, "kv_shift": None},
}


def pattern(arch):
    return pattern_of(arch.num_layers, bool(arch.num_experts))


def hybrid_model(arch):
    """Build Megatron's hybrid model, with other weights than any other model."""
    experts = {}
    if arch.num_experts:
        experts = {"num_moe_experts": arch.num_experts, "moe_router_topk": arch.moe_router_topk}
        experts["moe_ffn_hidden_size"] = arch.ffn_hidden_size
    return build_hybrid(
        arch.kv_shift,
        pattern(arch),
        arch.padded_vocab_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        qk_layernorm=arch.qk_layernorm,
        add_qkv_bias=arch.add_qkv_bias,
        **experts,
    )


@torch.no_grad()
def copy_weights(gpt, hybrid):
    """Give each layer of a hybrid model the weights of its part of the GPT layer."""
    theirs = dict(gpt.named_parameters())
    for name, parameter in hybrid.named_parameters():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) // 2)
        parameter.copy_(theirs.pop(".".join(parts).replace("final_norm", "final_layernorm")))
    assert not theirs


def save_hybrid(model, arch, folder, **arguments):
    given = {"num_layers": 2 * arch.num_layers, "hybrid_layer_pattern": pattern(arch), **arguments}
    return models.save_with_megatron(model, arch, folder, given)


@pytest.fixture(params=list(KINDS))
def both(request, megatron_rank, tmp_path):
    """Save a GPT model and the hybrid model with its weights; return the architecture."""
    arch = models.architecture(**KINDS[request.param])
    gpt, hybrid = models.random_model(arch), hybrid_model(arch)
    copy_weights(gpt, hybrid)
    models.save_with_megatron(gpt, arch, tmp_path / "gpt")
    save_hybrid(hybrid, arch, tmp_path / "hybrid")
    return arch


def same_files(one, other) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


# --- to Hugging Face and back ---


def test_the_folder_is_that_of_the_gpt_model(both, tmp_path):
    for form in ("gpt", "hybrid"):
        megatron_to_hf(ToHF(tmp_path / form, tmp_path / f"hf-{form}"))
    assert same_files(tmp_path / "hf-gpt", tmp_path / "hf-hybrid")
    # An error that the comparison must see: a layer's attention from the other layer.
    hybrid = hybrid_model(both)
    copy_weights(models.load_by_map(tmp_path / "gpt")[0], hybrid)
    first, second = hybrid.decoder.layers[0], hybrid.decoder.layers[2]
    first.self_attention.load_state_dict(second.self_attention.state_dict())
    save_hybrid(hybrid, both, tmp_path / "swapped")
    megatron_to_hf(ToHF(tmp_path / "swapped", tmp_path / "hf-swapped"))
    assert not same_files(tmp_path / "hf-gpt", tmp_path / "hf-swapped")


def test_stages_of_a_pipeline_do_not_matter(megatron_rank, tmp_path):
    arch = models.architecture()
    model = hybrid_model(arch)
    for name, text in (("plain", "*-*-"), ("stages", "*-|*-"), ("uneven", "*|-*|-")):
        save_hybrid(model, arch, tmp_path / name, hybrid_layer_pattern=text)
        megatron_to_hf(ToHF(tmp_path / name, tmp_path / f"hf-{name}"))
        assert same_files(tmp_path / "hf-plain", tmp_path / f"hf-{name}")


def test_experts_that_no_layer_has_do_not_matter(megatron_rank, tmp_path):
    """A pattern says which layers have experts, whatever --num-experts says."""
    arch = models.architecture()
    save_hybrid(hybrid_model(arch), arch, tmp_path / "hybrid", num_experts=4)
    megatron_to_hf(ToHF(tmp_path / "hybrid", tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_local_experts"] == 0


@pytest.mark.slow
def test_the_logits_of_a_hybrid_checkpoint_are_verified(megatron_rank, tmp_path, capsys):
    arch = models.architecture()
    save_hybrid(hybrid_model(arch), arch, tmp_path / "hybrid")
    command = ["megatron-to-hf", str(tmp_path / "hybrid"), str(tmp_path / "hf"), "--verify"]
    assert main(command) == 0
    assert "largest difference of logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("M*-", ["no layer of the kind M"]),
        ("*-G-", ["no layer of the kind G"]),
        ("*-D-", ["no layer of the kind D"]),
        ("**--", ["*- per layer"]),
        ("*", ["*- per layer"]),
        ("*-*E", ["*- per layer, or *E per layer"]),
        ("*-*-/*-", ["multi-token prediction"]),
        (None, ["do not say which", "hybrid_layer_pattern"]),
        ("*-*-*-", ["holds the layers *-*-", "*-*-*-", "not of the same model"]),
        ("*E*E", ["holds the layers *-*-", "*E*E", "not of the same model"]),
    ],
)
def test_what_is_no_gpt_model_is_refused(megatron_rank, tmp_path, capsys, text, parts):
    arch = models.architecture()
    save_hybrid(hybrid_model(arch), arch, tmp_path / "hybrid", hybrid_layer_pattern=text)
    for command in (["megatron-to-hf"], ["change-form", "--model-form", "gpt"]):
        assert main([*command, str(tmp_path / "hybrid"), str(tmp_path / "target")]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "iter_0000005" in said
        for part in parts:
            assert part in said
        assert not (tmp_path / "target").exists()


def test_what_hybrid_models_ignore_is_refused(megatron_rank, tmp_path, capsys):
    """Megatron's hybrid model has no scaling of rotary frequencies."""
    arch = models.architecture()
    scaled = {"use_rope_scaling": True}
    save_hybrid(hybrid_model(arch), arch, tmp_path / "hybrid", **scaled)
    models.save_with_megatron(models.random_model(arch), arch, tmp_path / "gpt", scaled)
    target = str(tmp_path / "target")
    assert main(["megatron-to-hf", str(tmp_path / "hybrid"), target]) == 1
    assert main(["change-form", str(tmp_path / "gpt"), target, "--model-form", "hybrid"]) == 1
    megatron_to_hf(ToHF(tmp_path / "gpt", tmp_path / "hf"))
    assert main(["hf-to-megatron", str(tmp_path / "hf"), target, "--model-form", "hybrid"]) == 1
    said = capsys.readouterr().err
    assert said.count("use_rope_scaling=True") == 2 and "set --model-form gpt" in said
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_hybrid_model_loads_every_key_that_it_asks_for(megatron_rank, tmp_path, kind):
    arch = models.architecture(**KINDS[kind])
    layout = "kvshift" if arch.kv_shift else "qwen2"
    before = random_folder(tmp_path / "hf", arch, layout)
    job = {"kv_shift": None, "divisible_by": 64}
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "hybrid", form="hybrid", **job))
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "gpt", **job))
    hybrid, expected = hybrid_model(arch), hybrid_model(arch)
    loaded = dist_checkpointing.load(
        {"model": hybrid.sharded_state_dict()},
        str(tmp_path / "hybrid" / "release"),
        strict="raise_unexpected",
    )
    hybrid.load_state_dict(loaded["model"])
    copy_weights(models.load_by_map(tmp_path / "gpt")[0], expected)
    assert equal(dict(hybrid.named_parameters()), dict(expected.named_parameters()))
    assert loaded["args"].hybrid_layer_pattern == pattern(arch)
    assert loaded["args"].num_layers == 2 * arch.num_layers
    megatron_to_hf(ToHF(tmp_path / "hybrid", tmp_path / "back"))
    assert equal(stored(tmp_path / "back"), before)


# --- change-form ---


def objects(folder) -> set[str]:
    return {
        k for k, entry in TorchDistReader(folder).stored().items() if not hasattr(entry, "size")
    }


def test_it_writes_what_megatron_saves_of_the_other_form(both, tmp_path):
    for form, other in (("gpt", "hybrid"), ("hybrid", "gpt")):
        target = tmp_path / f"as-{other}"
        allowed = set(torch.serialization.get_safe_globals())
        change_form(ChangeForm(tmp_path / form, target, other))
        # Megatron's own loads in this process need what it has allowed.
        assert set(torch.serialization.get_safe_globals()) == allowed
        iteration = target / "iter_0000005"
        assert (target / "latest_checkpointed_iteration.txt").read_text() == "5"
        native = tmp_path / other / "iter_0000005"
        assert differing(tensors(iteration), tensors(native)) == []
        assert objects(iteration) == objects(native)
        assert (iteration / "common.pt").exists() == (native / "common.pt").exists()
        ours, theirs = (TorchDistReader(path).arguments() for path in (iteration, native))
        assert ours.hybrid_layer_pattern == getattr(theirs, "hybrid_layer_pattern", None)
        del ours.hybrid_layer_pattern
        vars(theirs).pop("hybrid_layer_pattern", None)
        assert ours == theirs
        TorchDistReader(iteration).compare_hashes()
        with (iteration / "__0_0.distcp").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xa5")
        with pytest.raises(ValueError, match="not what was saved"):
            TorchDistReader(iteration).compare_hashes()


def test_numbered_layers_stay_numbered(megatron_rank, tmp_path):
    arch, numbered = models.architecture(), {"singleton_local_shards": True}
    models.save_with_megatron(models.random_model(arch), arch, tmp_path / "gpt", **numbered)
    change_form(ChangeForm(tmp_path / "gpt", tmp_path / "hybrid", "hybrid"))
    keys = TorchDistReader(tmp_path / "hybrid").weights()
    assert "decoder.layers.3.mlp.linear_fc1.weight_v" in keys
    megatron_to_hf(ToHF(tmp_path / "gpt", tmp_path / "hf-gpt"))
    megatron_to_hf(ToHF(tmp_path / "hybrid", tmp_path / "hf-hybrid"))
    assert same_files(tmp_path / "hf-gpt", tmp_path / "hf-hybrid")


def test_a_release_and_its_tokenizer_go_along(tmp_path):
    random_folder(tmp_path / "hf", models.architecture())
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "gpt"))
    (tmp_path / "gpt" / "tokenizer").mkdir(exist_ok=True)
    (tmp_path / "gpt" / "tokenizer" / "tokenizer.json").write_text("{}")
    change_form(ChangeForm(tmp_path / "gpt", tmp_path / "hybrid", "hybrid"))
    assert (tmp_path / "hybrid" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (tmp_path / "hybrid" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "direct", form="hybrid"))
    ours, direct = (tmp_path / name / "release" for name in ("hybrid", "direct"))
    assert differing(tensors(ours), tensors(direct)) == []
    assert objects(ours) == objects(direct)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"mtp_num_layers": 1}, ["mtp_num_layers=1"]),
        ({"multi_latent_attention": True}, ["multi_latent_attention=True"]),
        ({"no_rope_freq": 2}, ["no_rope_freq=2"]),
        ({"num_experts": 4, "moe_layer_freq": [0, 1]}, ["moe_layer_freq=[0, 1]"]),
        ({"num_layers": 3}, ["holds 2 layers", "num_layers=3"]),
    ],
)
def test_models_without_another_form_are_refused(megatron_rank, tmp_path, capsys, arguments, parts):
    arch = models.architecture()
    models.save_with_megatron(models.random_model(arch), arch, tmp_path / "gpt", arguments)
    command = ["change-form", str(tmp_path / "gpt"), str(tmp_path / "x"), "--model-form", "hybrid"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (tmp_path / "x").exists()
    for part in ["iter_0000005", *parts]:
        assert part in said


def test_the_form_that_it_has_and_other_formats_of_the_optimizer_are_refused(
    megatron_rank, tmp_path, capsys
):
    arch = models.architecture()
    models.save_with_megatron(models.random_model(arch), arch, tmp_path / "gpt")
    source, target = str(tmp_path / "gpt"), str(tmp_path / "x")
    assert main(["change-form", source, target, "--model-form", "gpt"]) == 1
    assert "is of a GPT model already" in capsys.readouterr().err
    folder = tmp_path / "gpt" / "iter_0000005"
    content = {"distrib_optim_sharding_type": "dp_reshardable"}
    # This file comes before the object that Megatron has stored.
    common = TorchDistReader(folder).common_state() | {"content_metadata": content}
    torch.save(common, folder / "common.pt")
    assert main(["change-form", source, target, "--model-form", "hybrid"]) == 1
    said = capsys.readouterr().err
    assert "the format dp_reshardable" in said and "--dist-ckpt-optim-fully-reshardable" in said
    assert not (tmp_path / "x").exists()


def test_a_damaged_source_leaves_nothing(megatron_rank, tmp_path, capsys):
    arch = models.architecture()
    models.save_with_megatron(models.random_model(arch), arch, tmp_path / "gpt")
    (shard,) = (tmp_path / "gpt" / "iter_0000005").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    command = ["change-form", str(tmp_path / "gpt"), str(tmp_path / "x"), "--model-form", "hybrid"]
    assert main(command) == 1
    assert capsys.readouterr().err.count("kvshift-convert: /") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt"]


def test_keys_of_objects_get_and_lose_the_axis_of_layers():
    prefix = "optimizer.state.exp_avg.decoder.layers."
    for stacked, numbered in (
        ("mlp.linear_fc1._extra_state/shard_1_8", "3.mlp.linear_fc1._extra_state/shard_0_1"),
        (
            "mlp.experts.experts.linear_fc1._extra_state/shard_1.3_8.4",
            "3.mlp.experts.experts.linear_fc1._extra_state/shard_3_4",
        ),
        (
            "mlp.experts.experts.linear_fc1._extra_state/shard_1.0_8.1",
            "3.mlp.experts.experts.linear_fc1._extra_state/shard_0_1",
        ),
        ("self_attention.k._extra_state/shard_7_8", "14.self_attention.k._extra_state/shard_0_1"),
    ):
        ((_, thing),) = things(prefix + stacked, None, "gpt")
        assert named(thing, "hybrid", None, True).key == prefix + numbered
        ((_, thing),) = things(prefix + numbered, None, "hybrid")
        assert named(thing, "gpt", 8, True).key == prefix + stacked
    for key in ("decoder.layers.0.mlp.a", "decoder.layers.1.self_attention.a", "decoder.layers.x"):
        with pytest.raises(ValueError):
            list(things(key, 2, "hybrid"))
