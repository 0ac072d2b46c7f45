"""One gloo rank in this process, for Megatron's layers without a launcher."""

from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from kvshift_megatron import cpu

SEED = 20241129


@contextmanager
def single_process():
    """Set up the CPU layer, a process group of one rank and Megatron's parallel state."""
    was_enabled = cpu.is_enabled()
    cpu.enable()
    # A store in memory: no port, no environment variables.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        if not was_enabled:
            cpu.disable()


def seed_everything(seed: int = SEED) -> None:
    """Seed torch's generator and Megatron's tensor-parallel RNG tracker."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(**overrides) -> TransformerConfig:
    """Configure a tiny TE-free fp32 model like the paper's: RMSNorm, SwiGLU, GQA, no biases."""
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "attention_softmax_in_fp32": True,
    }
    return TransformerConfig(**{**fields, **overrides})


def gpt_model(config: TransformerConfig, spec, *, vocab_size=64, seq_length=16) -> GPTModel:
    """Build a GPTModel with RoPE of the paper's base."""
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=seq_length,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=100_000,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


@torch.no_grad()
def randomize_taps(model: torch.nn.Module, seed: int = SEED) -> None:
    """Draw normal taps: like trained ones they leave [0, 1] and do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith(("alpha_", "beta_")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by name; every parameter must have one."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient reached {missing}"
    return grads
