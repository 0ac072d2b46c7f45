"""Build a Megatron model of an Architecture in this process: TE-free, one rank, on the CPU."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.name_map import Row


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Set up the CPU device layer, a process group of one rank and Megatron's parallel state.

    Do nothing if there is a process group already, which must have one rank.
    """
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == 1
        yield
        return
    from kvshift_megatron import cpu

    was_enabled = cpu.is_enabled()
    cpu.enable(force=True)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # A store in memory: no port, no environment variables.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        if not was_enabled:
            cpu.disable()


def build_model(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Any:
    """Build Megatron's GPTModel with random weights, in `dtype` and in evaluation mode.

    Call it within `one_rank`, or with an equivalent setup.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec

    arch = architecture
    config = _transformer_config(arch, dtype)
    if arch.kv_shift is None:
        spec = vanilla_layer_spec(config)
    else:
        spec = kv_shift_layer_spec(config, kv_shift=arch.kv_shift)
    scaling = {}
    if arch.rope_scaling is not None:
        scaling = {"rope_scaling": True, "rope_scaling_factor": arch.rope_scaling.factor}
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **scaling,
    ).eval()


def _transformer_config(arch: Architecture, dtype: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = {}
    if arch.num_experts:
        experts = {
            "num_moe_experts": arch.num_experts,
            "moe_router_topk": arch.moe_router_topk,
            "moe_ffn_hidden_size": arch.ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.norm_epsilon,
        qk_layernorm=arch.qk_layernorm,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias,
        params_dtype=dtype,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **experts,
    )


@torch.no_grad()
def fill_model(
    model: torch.nn.Module, rows: Iterable[Row], read: Callable[[int], tuple[Tensor, ...]]
) -> None:
    """Copy a checkpoint into the model.

    Args:
        model: Megatron's, TE-free.
        rows: Rows of the name map, expanded to every layer.
        read: Returns the Megatron tensors of a row, by its index.

    Raises:
        ValueError: The model's parameters are not those of the rows.
    """
    parameters = dict(model.named_parameters())
    for i, row in enumerate(rows):
        for name, tensor in zip(row.megatron, read(i), strict=True):
            for parameter, part in by_parameter(name.local, tensor).items():
                if parameter not in parameters:
                    raise ValueError(f"the TE-free model has no parameter {parameter}")
                parameters.pop(parameter).copy_(part)
    if parameters:
        raise ValueError(f"the checkpoint holds nothing for {', '.join(sorted(parameters))}")


def by_parameter(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a tensor of the checkpoint into the model's parameters, by name: one per expert."""
    if "{expert}" not in name:
        return {name: tensor}
    return {name.replace("{expert}", str(i)): expert for i, expert in enumerate(tensor)}


@torch.no_grad()
def megatron_logits(
    model: torch.nn.Module, prompts: list[list[int]], vocab_size: int
) -> list[Tensor]:
    """Compute each prompt's logits separately: fp32 [tokens, vocab], without padding tokens."""
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        positions = torch.arange(len(prompt))[None]
        logits = model(tokens, positions, attention_mask=None)
        results.append(logits[0, :, :vocab_size].float())
    return results
