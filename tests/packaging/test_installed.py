"""The installed wheel: every command, --spec in a stock script, an exported model."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from kvshift_megatron.cpu.flags import DEFAULTS
from kvshift_megatron.megatron_lm import patch
from tests.integration.tiny_gpt import flags
from tests.megatron_lm import megatron_trees
from tests.support.launch import PROJECT

pytestmark = pytest.mark.slow

SCRIPTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
STOCK_SCRIPT = Path(__file__).with_name("stock_script.py")
SPEC = ["--spec", "kvshift_megatron.layer_specs", "kv_shift_layer_spec"]


def test_the_installed_package_is_what_is_imported(installed):
    where = "import kvshift_megatron, torch; print(kvshift_megatron.__file__, torch.__file__)"
    package, shared = map(Path, installed.python(where).split())
    assert installed.folder in package.parents and installed.folder not in shared.parents
    children = "from kvshift_megatron.utils.launchers import own_path; print(own_path())"
    assert installed.python(children) == "[]\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(installed, name):
    assert installed.run(name, "--help").startswith(f"usage: {name} ")


def test_a_recipe(installed):
    said = installed.run("kvshift-recipe", "19b", "240x80gb").splitlines()
    assert "--num-layers 48" in said and "--tensor-model-parallel-size 4" in said
    wrong = installed.run("kvshift-recipe", "7b", "cpu", status=2)
    assert wrong.startswith("error: model 7b: neither one of 1.5b, ") and wrong.count("\n") == 1


def test_a_plan(installed):
    said = installed.run("kvshift-plan", "10m", "cpu", "--json", "plan.json")
    assert "  FITS: " in said
    assert json.loads((installed.home / "plan.json").read_text())["title"] == "10m on cpu"


def test_patching_a_megatron(installed, tmp_path):
    root, _ = megatron_trees.installed_tree(tmp_path)
    chosen = patch.find_set(patch.read_version(root))
    files = {path: (root / path).read_bytes() for path in chosen.unpatched}
    there = ["--megatron-path", root]
    assert installed.run("kvshift-patch", "check", *there).count("  not applied ") >= len(files)
    assert installed.run("kvshift-patch", "apply", *there).count("  applied: ") == len(files)
    assert b"--kv-shift" in (root / "megatron/training/arguments.py").read_bytes()
    assert "not applied" not in installed.run("kvshift-patch", "check", *there)
    assert installed.run("kvshift-patch", "revert", *there).count("  reverted: ") == len(files)
    assert {path: (root / path).read_bytes() for path in files} == files


def test_checking_a_megatron(installed, tmp_path):
    """Only the refusal: the six runs of a real check take too long."""
    said = installed.run("kvshift-check", "--megatron-path", tmp_path, status=2)
    assert said.startswith(f"kvshift-check: {tmp_path} holds no pretrain_gpt.py")


@pytest.fixture(scope="module")
def trained(installed) -> str:
    """Train with --spec in a stock script, and return its output."""
    return installed.run("kvshift-cpu", STOCK_SCRIPT, *flags(train_iters=3), *SPEC)


def test_spec_on_a_stock_script(trained):
    line = "kvshift_megatron: attention: KV shifting (free, window 2, keys and values) in layers"
    assert f"{line} 1-2; 16 taps" in trained
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", trained)]
    # As of a guess among 128 tokens.
    assert len(losses) == 3 and all(abs(loss - math.log(128)) < 0.3 for loss in losses)


@pytest.mark.parametrize("by", ["the launcher", "the package's import"])
def test_a_misspelt_module_never_trains_vanilla(installed, by):
    wrong = ["--spec", "kvshift_megatron.layer_spec", "kv_shift_layer_spec"]
    said = "there is no kvshift_megatron.layer_spec: for --spec, "
    if by == "the launcher":
        words = ["kvshift-cpu", STOCK_SCRIPT, *flags(), *wrong]
        assert installed.run(*words, status=2).startswith(f"kvshift-cpu: {said}")
    else:
        # As on a GPU, where nothing of this package runs before Megatron imports it.
        on_a_cpu = [word for flag in DEFAULTS for word in flag if word]
        words = ["python", STOCK_SCRIPT, *flags(), *on_a_cpu, *wrong]
        assert said in installed.run(*words, status=1).splitlines()[-1]


def test_the_compiled_shift_is_built_from_the_wheel(trained, installed):
    assert list((installed.home / "cache").rglob("*.so"))


def test_the_entry_point(installed):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = ["-m", "kvshift_megatron.pretrain", *flags(train_iters=2)]
    said = installed.run("python", *torchrun, *words)
    assert "16 taps" in said and len(re.findall(r"lm loss: \S+", said)) == 2


_GENERATE = """
import sys
import torch
from transformers import AutoModelForCausalLM

import kvshift_megatron.hf

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("kvshift_megatron.hf."), type(model)
tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
torch.save(model(tokens).logits.detach(), sys.argv[2])
print(model.generate(tokens, min_new_tokens=4, max_new_tokens=4, do_sample=False).shape[1])
"""


def test_a_model_through_both_formats(installed, tmp_path):
    """Convert a Llama to Megatron with identity taps, and then to a folder for Auto classes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=32)).eval()
    llama.save_pretrained(tmp_path / "llama")
    installed.run("kvshift-convert", "hf-to-megatron", tmp_path / "llama", tmp_path / "megatron")
    installed.run("kvshift-convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "hf")
    said = installed.python(_GENERATE, tmp_path / "hf", tmp_path / "logits.pt")
    assert said.split()[-1] == "12"
    logits = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        expected = llama(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
