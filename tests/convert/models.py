"""Tiny models for both sides: Megatron models, saved by Megatron, and Transformers models."""

from pathlib import Path

import torch

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.megatron_arguments import arguments_from_architecture
from kvshift_megatron.convert.megatron_model import build_model, fill_model, megatron_logits
from kvshift_megatron.convert.to_hf import MegatronTable, fitting_layout, read_architecture

FREE = KVShiftConfig(init="identity")
# A small configuration of any of Transformers' classes.
SMALL = {
    "vocab_size": 59,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROMPTS = [[3], [0, 58, 58, 58, 1], [7, 50, 12, 9, 31, 2, 44, 7, 50, 12, 13]]


def architecture(**changes) -> Architecture:
    """Return a small version of the paper's: grouped queries, untied, a vocabulary to pad."""
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 59,
        "padded_vocab_size": 64,
        "max_position_embeddings": 32,
        "rotary_base": 100_000.0,
        "kv_shift": FREE,
    }
    return Architecture(**{**fields, **changes})


@torch.no_grad()
def random_model(arch: Architecture, seed: int = 1, dtype: torch.dtype = torch.float32):
    """Build Megatron's model with weights, norms, biases and taps far from their initial values."""
    model = build_model(arch, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_norm = "layernorm" in name or "layer_norm" in name
        is_tap = name.rpartition(".")[2].startswith(("alpha_", "beta_"))
        parameter.copy_(1.0 + 0.3 * drawn if is_norm else drawn * (1.0 if is_tap else 0.2))
    return model


def save_with_megatron(model, arch: Architecture, folder: Path, arguments=None, **metadata) -> Path:
    """Save a checkpoint with Megatron's own code, with arguments like its training loop's.

    Args:
        model: Megatron's.
        arch: The model.
        folder: To create, for --load.
        arguments: Megatron's that differ from those of the GPT model, by name.
        **metadata: How layers are stored.
    """
    from megatron.core import dist_checkpointing

    iteration = folder / "iter_0000005"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    args = arguments_from_architecture(arch, 64)
    vars(args).update(arguments or {})
    state = {"args": args, "checkpoint_version": 3.0}
    state |= {"iteration": 5, "model": model.sharded_state_dict(metadata=metadata or None)}
    dist_checkpointing.save(state, str(iteration), async_strategy="mcore")
    return folder


def load_by_map(folder: Path) -> tuple[torch.nn.Module, Architecture]:
    """Build the Megatron model of any checkpoint, through the name map."""
    reader = TorchDistReader(folder)
    arch = read_architecture(reader)
    table = MegatronTable(reader, fitting_layout(arch), arch)
    model = build_model(arch)
    fill_model(model, table.rows, table.megatron)
    return model, arch


def logits_of_megatron(model, arch: Architecture, prompts=PROMPTS) -> list[torch.Tensor]:
    return megatron_logits(model, prompts, arch.vocab_size)


@torch.no_grad()
def logits_of_transformers(model, prompts=PROMPTS) -> list[torch.Tensor]:
    return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 2) -> torch.nn.Module:
    """Set random weights, norms and biases in a Transformers model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1.0 + 0.3 * drawn if "norm" in name else 0.2 * drawn)
    return model.eval()
