"""The Baichuan-M1 layout: a public client of it, mlx-lm, agrees with Megatron."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan.norm_head_padding import FIELD, Padding
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from kvshift_megatron.convert.transforms import Convolution
from kvshift_megatron.convert.verify import Run, largest_difference, mlx_logits
from tests.convert import models

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_rank")]
TOLERANCE = 1e-4


def export(tmp_path, norm_head="fold", equal_rows=False, **changes):
    """Build a random Megatron model and export it to a folder in the layout."""
    arch = models.architecture(**changes)
    model = models.random_model(arch)
    output = model.shared_embedding_or_output_weight() if arch.tied else model.output_layer.weight
    if equal_rows:
        with torch.no_grad():
            output.mul_(3.7 / output.norm(dim=-1, keepdim=True))
    source = models.save_with_megatron(model, arch, tmp_path / "megatron")
    folder = tmp_path / "hf"
    megatron_to_hf(ToHF(source, folder, layout="baichuan_m1", norm_head=norm_head))
    return model, arch, folder


def edit(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


PADDED = {
    "tied": {"tied": True},
    "gate, one group": {"kv_shift": KVShiftConfig(variant="gate"), "num_query_groups": 1},
    "clamp, wide heads": {"kv_shift": KVShiftConfig(variant="clamp"), "kv_channels": 12},
}


class Case(NamedTuple):
    ours: list[torch.Tensor]
    run: Run
    folder: Path
    model: torch.nn.Module
    arch: Architecture


@pytest.fixture(scope="module")
def cases(tmp_path_factory, megatron_rank) -> dict[str, Case]:
    """Return everything for the client to run; it runs in one process, which is slow to start."""

    def case(name, by_token=False, **how):
        model, arch, folder = export(tmp_path_factory.mktemp("baichuan"), **how)
        run = Run(folder, models.PROMPTS, by_token)
        made[name] = Case(models.logits_of_megatron(model, arch), run, folder, model, arch)
        return made[name]

    made = {}
    case("whole", equal_rows=True)
    case("by token", equal_rows=True, by_token=True)
    edit(case("swapped in the file", equal_rows=True).folder, swap_taps)
    edit(case("stretched", equal_rows=True).folder, stretch_rows)
    right = Convolution.to_hf
    with mock.patch.object(Convolution, "to_hf", lambda *a: (right(*a)[0].flip(-1),)):
        case("swapped by the converter", equal_rows=True)
    for name, changes in PADDED.items():
        case(name, norm_head="pad", **changes)
    return made


@pytest.fixture(scope="module")
def theirs(cases) -> dict[str, list[torch.Tensor]]:
    return dict(zip(cases, mlx_logits([case.run for case in cases.values()])))


def swap_taps(tensors):
    for name in tensors:
        if ".conv_" in name:
            tensors[name] = tensors[name].flip(-1).contiguous()


def stretch_rows(tensors):
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = head * torch.linspace(0.5, 4.0, len(head))[:, None]


@pytest.mark.parametrize("name", ["whole", "by token", *PADDED])
def test_the_public_client_agrees(cases, theirs, name):
    ours = cases[name].ours
    assert max(logits.abs().max() for logits in ours) > 1.0
    assert largest_difference(ours, theirs[name]) < TOLERANCE


@pytest.mark.parametrize("name", ["swapped in the file", "swapped by the converter"])
def test_swapped_taps_are_noticed(cases, theirs, name):
    assert largest_difference(cases[name].ours, theirs[name]) > 0.01


@pytest.mark.parametrize("name", PADDED)
def test_the_import_removes_the_padding(cases, name, tmp_path):
    _, _, folder, _, arch = cases[name]
    head = load_file(folder / "model.safetensors")["lm_head.weight"].double()
    lengths = head.norm(dim=-1)
    assert torch.allclose(lengths, lengths[0].expand_as(lengths), rtol=1e-6)
    hf_to_megatron(ToMegatron(folder, tmp_path / "back"))
    back, found = models.load_by_map(tmp_path / "back")
    assert (found.hidden_size, found.kv_channels) == (arch.hidden_size, arch.kv_channels)
    assert found.ffn_hidden_size == arch.ffn_hidden_size == 48
    assert found.rotary_base == arch.rotary_base
    again = models.logits_of_megatron(back, found)
    assert largest_difference(cases[name].ours, again) < TOLERANCE


@pytest.mark.parametrize("name", PADDED)
def test_clients_can_quantize_what_is_padded(cases, name):
    """Quantization of mlx-lm leaves out matrices whose rows are not whole groups of 64 numbers."""
    tensors = load_file(cases[name].folder / "model.safetensors")
    widths = {key: t.shape[-1] for key, t in tensors.items() if t.dim() == 2}
    assert len(widths) == 2 + 2 * 5
    assert {key: width for key, width in widths.items() if width % 64} == {}


@pytest.mark.parametrize("heads, hidden", [(32, 4096), (40, 5120), (14, 896), (1, 64), (4, 63)])
def test_padded_heads_are_the_smallest_that_fit(heads, hidden):
    padding = Padding(hidden, hidden // heads, 1e-5, 1e4, 1.0)
    size = padding.new_head_dim(heads)
    fitting = [d for d in range(2, 2 * hidden + 66, 2) if heads * d % 64 == 0]
    assert size == min(d for d in fitting if heads * d > hidden)


def test_a_record_of_another_models_padding_is_refused(cases, tmp_path):
    folder = shutil.copytree(cases["tied"].folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for wrong in ({"hidden_size": 64}, {"head_dim": 18}, {"intermediate_size": 65}):
        changed = {**config, FIELD: {**config[FIELD], **wrong}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{FIELD}=.* does not fit hidden_size=64"):
            hf_to_megatron(ToMegatron(folder, tmp_path / "back"))


def test_an_output_layer_that_clients_would_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows of the output layer have lengths.*--norm-head pad"):
        export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


def test_the_import_normalizes_as_clients_do(cases, theirs, tmp_path):
    stretched = cases["stretched"]
    hf_to_megatron(ToMegatron(stretched.folder, tmp_path / "back"))
    ours = models.logits_of_megatron(*models.load_by_map(tmp_path / "back"))
    assert largest_difference(ours, theirs["stretched"]) < TOLERANCE
    assert largest_difference(ours, stretched.ours) < TOLERANCE


def test_the_round_trip_is_bitwise_exact_if_nothing_is_scaled(cases, tmp_path):
    hf_to_megatron(ToMegatron(cases["whole"].folder, tmp_path / "back", divisible_by=64))
    back, _ = models.load_by_map(tmp_path / "back")
    for name, before in cases["whole"].model.named_parameters():
        if "decoder.layers" in name:
            assert torch.equal(back.get_parameter(name), before), name


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("sliding_window_layers", [0], "global-attention layers only"),
        ("conv_window", 3, "it has to be 2"),
        ("tie_word_embeddings", True, "clients need an lm_head"),
    ],
)
def test_unsupported_fields_are_refused(tmp_path, field, value, message):
    _, _, folder = export(tmp_path, equal_rows=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"config.json: {field}=.*{message}"):
        hf_to_megatron(ToMegatron(folder, tmp_path / "back"))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"kv_shift": KVShiftConfig(window=3)}, "a window above 2 tokens"),
        ({"kv_shift": KVShiftConfig(shift_keys=False)}, "keys or values that are not shifted"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"num_experts": 2}, "experts"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"kv_channels": 12}, "heads that do not add up to the hidden size"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(tmp_path, changes, name):
    with pytest.raises(ValueError, match=f"baichuan_m1 has no place for {name}"):
        export(tmp_path, **changes)
