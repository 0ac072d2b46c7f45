"""Saving and loading, with and without this package."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvshift_megatron.hf import AUTO_MAP, KVShiftLlamaForCausalLM, KVShiftLlamaModel, write_code
from tests.hf.models import agrees, full_logits, named, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.slow

MODELS = [
    {"kv_shift_window": 3, "tie_word_embeddings": True},
    {"kv_shift_variant": "gate", "num_local_experts": 4, "qk_norm": True, "qkv_bias": True},
]

# Run where neither this package nor Megatron can be imported.
ELSEWHERE = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kvshift_megatron", "megatron"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocked())
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
folders, ids = sys.argv[1].split(","), torch.load(sys.argv[2], weights_only=True)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(
        generated, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    )
    logits = model(ids).logits.detach()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.allclose(model.lm_head(base(ids).last_hidden_state), logits, atol=1e-6)
    model.save_pretrained(folder + "-again")
    torch.save([logits, generated], folder + "/elsewhere.pt")
"""


def test_the_model_names_every_file_that_it_needs(tmp_path):
    """Transformers 5.0 copies only the files that the named one imports itself."""
    written = {path.stem: path.read_text() for path in write_code(tmp_path)}

    def needed(name):
        return set(re.findall(r"^from \.(\w+) import", written[name], re.MULTILINE))

    for name in {value.split(".")[0] for value in AUTO_MAP.values()}:
        everything = [needed(name)]
        while found := set().union(*map(needed, everything[-1])) - set().union(*everything):
            everything.append(found)
        assert len(everything) == 1, f"{name}.py must import from {sorted(everything[1])} itself"


def test_a_folder_works_without_this_package(tmp_path):
    ids = tokens(2, 6)
    torch.save(ids, tmp_path / "ids.pt")
    folders, models = [], []
    for number, options in enumerate(MODELS):
        models.append(tiny_model(**options))
        folder = tmp_path / f"model {number}"
        folders.append(folder)
        models[-1].save_pretrained(folder)
    # The converter writes the source with write_code instead.
    by_hand = tmp_path / "by hand"
    models[0].save_pretrained(by_hand)
    for path in by_hand.glob("*.py"):
        path.write_text("")
    written = write_code(by_hand)
    for path in written:
        assert path.read_bytes() == (folders[0] / path.name).read_bytes()
    folders, models = [*folders, by_hand], [*models, models[0]]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, ",".join(map(str, folders)), str(tmp_path / "ids.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, model in zip(folders, models):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        logits, generated = torch.load(folder / "elsewhere.pt", weights_only=True)
        assert agrees(logits, full_logits(model, ids), 1e-6)
        assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))
        # A folder saved again from there is the same, and this package can load it.
        again = folder.with_name(folder.name + "-again")
        for path in written:
            assert path.read_bytes() == (again / path.name).read_bytes()
        back = AutoModelForCausalLM.from_pretrained(again)
        assert type(back) is KVShiftLlamaForCausalLM
        assert agrees(full_logits(back, ids), logits, 1e-6)


@pytest.mark.parametrize("options", MODELS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_as_saved(options, dtype, tmp_path):
    model = tiny_model(**options).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is KVShiftLlamaForCausalLM and loaded.dtype == dtype
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is KVShiftLlamaModel
    as_float64 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in as_float64.parameters()} == {torch.float64}


def test_names_and_shapes_in_the_file(tmp_path):
    tiny_model(
        kv_shift_window=3,
        num_local_experts=4,
        qk_norm=True,
        qkv_bias=True,
        num_hidden_layers=1,
        kv_shift_values=False,
    ).save_pretrained(tmp_path)
    shapes = {k: list(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    layer, attention = "model.layers.0.", "model.layers.0.self_attn."
    assert shapes == {
        "model.embed_tokens.weight": [61, 32],
        f"{layer}input_layernorm.weight": [32],
        f"{layer}post_attention_layernorm.weight": [32],
        f"{attention}q_proj.weight": [32, 32],
        f"{attention}q_proj.bias": [32],
        f"{attention}k_proj.weight": [16, 32],
        f"{attention}k_proj.bias": [16],
        f"{attention}v_proj.weight": [16, 32],
        f"{attention}v_proj.bias": [16],
        f"{attention}o_proj.weight": [32, 32],
        f"{attention}q_norm.weight": [8],
        f"{attention}k_norm.weight": [8],
        f"{attention}alpha_1": [2],
        f"{attention}alpha_2": [2],
        f"{attention}alpha_3": [2],
        f"{layer}mlp.gate.weight": [4, 32],
        f"{layer}mlp.experts.gate_up_proj": [4, 80, 32],
        f"{layer}mlp.experts.down_proj": [4, 32, 40],
        "model.norm.weight": [32],
        "lm_head.weight": [61, 32],
    }


def test_only_missing_taps_are_drawn(tmp_path):
    model = tiny_model(kv_shift_variant="gate")
    kept = {k: v for k, v in model.state_dict().items() if "beta" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        else:
            assert parameter.isfinite().all() and parameter.std() > 0, name


def test_importing_does_not_need_megatron():
    code = (
        "import sys; import kvshift_megatron.hf; from transformers import AutoConfig; "
        "AutoConfig.for_model('kvshift_llama'); "
        "print([m for m in sys.modules if m.split('.')[0] == 'megatron'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_built_from_a_configuration():
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert type(model) is KVShiftLlamaForCausalLM and model.dtype == torch.bfloat16
    assert type(AutoModel.from_config(tiny_config())) is KVShiftLlamaModel
