"""Any value in any field: converted rightly, or refused in one sentence with file and field.

What counts as right on Hugging Face's side is what Transformers' own classes read.
"""

import contextlib
import copy
import io
import json
import math
import random
import shutil
import time
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import kvshift_megatron.hf  # noqa: F401  (registers the model)
from kvshift_megatron.convert.command_line import main
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from tests.convert import models
from tests.convert.test_round_trips import equal, random_folder, weights

pytestmark = pytest.mark.slow

SECONDS = 20  # of one conversion, on a busy machine; most take 0.01
# JSON's, and those that Python's reader accepts.
VALUES = [None, True, False, "", "false", "true", "1", "silu", "two\nlines", "\ud800", "x" * 5000,
          0, 1, 2, 3, 4, 7, -1, -8, 2**31, 10**12, 10**30, 10**400,
          0.0, -0.0, 0.5, 1.0, -1e-5, 1e-5, 1e-320, 32.0, 1e308, math.nan, math.inf, -math.inf,
          [], [1], [None], ["a"], ["full_attention"] * 2, [[]],
          {}, {"a": {}}, {"a": 1}, {"rope_theta": math.nan}, {"rope_theta": "1e4"},
          {"rope_type": ["default"]}, {"rope_type": "llama3"}]  # fmt: skip
ODD = torch.zeros(2)
UNREAD = {"params_dtype", "bf16", "fp16", "ckpt_format", "consumed_train_samples", "world_size",
          "skipped_train_samples", "consumed_valid_samples", "data_parallel_size", "seq_length",
          "pipeline_model_parallel_size", "expert_model_parallel_size", "attention_dropout",
          "context_parallel_size", "hidden_dropout", "apply_query_key_layer_scaling",
          "use_rotary_position_embeddings", "add_position_embedding"}  # fmt: skip
OPTIONAL = ["head_dim", "sliding_window", "use_sliding_window", "layer_types", "rope_scaling",
            "rope_theta", "partial_rotary_factor", "num_local_experts", "num_experts_per_tok",
            "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act",
            "attention_bias", "mlp_bias", "conv_window", "kv_shift_cache_history"]  # fmt: skip
LAYOUTS = {"kvshift": {}, "mixtral": {"kv_shift": None, "num_experts": 3}, "baichuan_m1": {},
           "qwen3": {"kv_shift": None, "qk_layernorm": True},
           "llama": {"kv_shift": None}}  # fmt: skip
SAME = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size", "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads", "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings", "layernorm_epsilon": "rms_norm_eps",
        }  # fmt: skip


def run(*words):
    """Run the command; return its exit code and what it said, and check that it answers soon."""
    said, start = io.StringIO(), time.monotonic()
    # Whoever wrote the source may have written matching hashes too.
    flags = ["--no-verify-integrity"] if words[0] == "megatron-to-hf" else []
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([*map(str, words), *flags])
    assert time.monotonic() - start < SECONDS, said.getvalue()
    lines = [one for one in said.getvalue().splitlines() if not one.startswith("converted ")]
    assert code == 0 or (code == 1 and len(lines) == 1 and len(lines[0]) < 1000), lines
    return code, " ".join(lines)


class Side:
    """One source: change some fields, convert, look at the result, and change them back."""

    def __init__(self, source, command, named):
        self.source, self.command, self.named = source, command, named
        self.target = source.parent / f"{source.name}-converted"
        assert run(command, source, self.target) == (0, "")
        self.expected = self.read()
        self.counts = {"refused": 0, "converted": 0}

    def read(self):
        raise NotImplementedError

    def write(self, changes):
        raise NotImplementedError

    def rightly(self, changes):
        """Return the tensors to expect."""
        return self.expected

    def right(self, changes):
        raise NotImplementedError

    def judge(self, changes):
        shutil.rmtree(self.target, ignore_errors=True)
        self.write(changes)
        code, said = run(self.command, self.source, self.target)
        if code == 0:
            assert equal(self.read(), self.rightly(changes)), changes
            self.right(changes)
        else:
            assert not self.target.exists()
            assert self.named in said, (changes, said)
            fields = set(changes) | {name for value in changes.values() for name in related(value)}
            fields |= {other for name in changes for other in RELATED.get(name, ())}
            assert any(field in said for field in fields), (changes, said)
        self.counts["refused" if code else "converted"] += 1


# Fields that one in error may be reported by: the tensors call for them, or they are its partners.
TENSORS = (".weight", "tensors", "experts")
RELATED = {
    "num_layers": TENSORS,
    **dict.fromkeys(("hidden_size", "intermediate_size", "ffn_hidden_size", "head_dim"), TENSORS),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups", "kv_channels"), TENSORS),
    "num_attention_heads": ("num_key_value_heads", *TENSORS),
    "hidden_size": ("num_attention_heads", "head_dim", *TENSORS),
    **dict.fromkeys(("vocab_size", "tensor_model_parallel_size"), ("padded to", *TENSORS)),
    "make_vocab_size_divisible_by": ("vocab_size",),
    "num_local_experts": TENSORS,
    "num_experts": TENSORS,
    "moe_ffn_hidden_size": TENSORS,
    "tie_word_embeddings": ("lm_head.weight",),
    "untie_embeddings_and_output_weights": ("output_layer.weight",),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "qk_norm"), TENSORS),
    **dict.fromkeys(("add_bias_linear", "add_qkv_bias", "qk_layernorm"), (".bias", *TENSORS)),
    "kv_shift_window": ("alpha",),
    "kv_shift_variant": ("alpha",),
    "kv_shift_keys": ("alpha", "shift_keys"),
    "kv_shift_values": ("beta", "shift_values"),
    "sliding_window": ("max_position_embeddings",),
    "max_position_embeddings": ("sliding_window",),
    "model_type": TENSORS,
    "use_rope_scaling": ("rope_scaling_factor",),
    "num_hidden_layers": ("layer_types", *TENSORS),
    "group_query_attention": ("num_query_groups", *TENSORS),
}


def related(value):
    return [str(name) for name in value] if isinstance(value, dict) else []


class HuggingFace(Side):
    """A folder: config.json is changed."""

    def __init__(self, source):
        self.config = json.loads((source / "config.json").read_text())
        super().__init__(source, "hf-to-megatron", str(source))

    def write(self, changes):
        (self.source / "config.json").write_text(json.dumps({**self.config, **changes}))

    def read(self):
        return weights(self.target)

    def right(self, changes):
        fields = copy.deepcopy({**self.config, **changes})  # Transformers 5.0 writes into them
        arguments = TorchDistReader(self.target).arguments()
        if fields["model_type"] == "baichuan_m1":  # Transformers has no such class
            theirs, theta = Namespace(**fields), fields["rope_theta"]
        else:
            theirs = AutoConfig.for_model(fields.pop("model_type"), **fields)
            theta = theirs.rope_parameters["rope_theta"]
        assert float(arguments.rotary_base) == float(theta)
        for ours, name in SAME.items():
            assert getattr(arguments, ours) == getattr(theirs, name), (name, changes)
        assert arguments.untie_embeddings_and_output_weights is not theirs.tie_word_embeddings
        if arguments.num_experts:
            assert arguments.moe_router_topk == theirs.num_experts_per_tok
            assert arguments.num_experts == theirs.num_local_experts


class Megatron(Side):
    """A checkpoint: its stored arguments are changed."""

    def __init__(self, source):
        self.common = source / "release" / "common.pt"
        self.content = torch.load(self.common, weights_only=False)
        self.arguments = vars(self.content["args"])
        super().__init__(source, "megatron-to-hf", str(source / "release"))

    def write(self, changes):
        arguments = Namespace(**{**self.arguments, **changes})
        torch.save({**self.content, "args": arguments}, self.common)

    def read(self):
        return load_file(self.target / "model.safetensors")

    def rightly(self, changes):
        tokens = changes.get("vocab_size") or self.arguments["vocab_size"]
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        return {k: v[:tokens] if k in tables else v for k, v in self.expected.items()}

    def right(self, changes):
        arguments = Namespace(**{**self.arguments, **changes})
        config = json.loads((self.target / "config.json").read_text())
        # Missing here: derived fields, which the tensors decide.
        for ours, name in SAME.items():
            if ours in changes and changes[ours] is not None and ours != "num_query_groups":
                assert config[name] == getattr(arguments, ours), changes
        assert config["rope_parameters"]["rope_theta"] == arguments.rotary_base
        kind = "llama3" if arguments.use_rope_scaling else "default"
        assert config["rope_parameters"]["rope_type"] == kind, changes
        if kind == "llama3":
            assert config["rope_parameters"]["factor"] == arguments.rope_scaling_factor


def random_pairs(fields, number):
    draw = random.Random(0)
    for _ in range(number):
        yield {name: draw.choice(VALUES) for name in draw.sample(fields, 2)}


def random_source(folder, layout):
    random_folder(folder, models.architecture(**LAYOUTS[layout]), layout)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_value_in_a_config(tmp_path, layout):
    side = HuggingFace(random_source(tmp_path / "hf", layout))
    fields = sorted({*side.config, *OPTIONAL} - {"architectures", "dtype", "use_cache"})
    every = [{name: value} for name in fields for value in VALUES]
    number = 300 if layout == "kvshift" else 50
    for changes in (*random.Random(1).sample(every, number), *random_pairs(fields, number // 8)):
        side.judge(changes)
    assert min(side.counts.values()) > 1 and sum(side.counts.values()) > number


def test_any_value_in_megatrons_arguments(tmp_path):
    run("hf-to-megatron", random_source(tmp_path / "hf", "kvshift"), tmp_path / "checkpoint")
    side = Megatron(tmp_path / "checkpoint")
    fields = [name for name in side.arguments if name not in UNREAD]
    every = [{name: value} for name in fields for value in (*VALUES, ODD)]
    for changes in (*random.Random(1).sample(every, 200), *random_pairs(fields, 20)):
        side.judge(changes)
    assert min(side.counts.values()) > 5, side.counts


def test_the_judge_notices(tmp_path, monkeypatch):
    """Without the table a word counts as true, and a number in place of a list ends in an error."""
    side = HuggingFace(random_source(tmp_path / "hf", "llama"))
    monkeypatch.setattr("kvshift_megatron.convert.from_hf_config.check_config", lambda *_: None)
    with pytest.raises(TypeError):
        side.judge({"layer_types": 7})
    with pytest.raises(AssertionError):
        side.judge({"rms_norm_eps": math.nan})
