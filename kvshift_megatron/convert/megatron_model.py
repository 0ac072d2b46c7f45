"""A Megatron model of an Architecture in this process: TE-free, one rank, on the CPU."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.name_map import Row


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """The CPU device layer, a process group of one and Megatron's parallel state.

    Without effect where a process group is there already; it has to be of one rank then.
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


def build_model(architecture: Architecture, dtype: torch.dtype = torch.float32):
    """Megatron's GPTModel with random weights; within `one_rank`, or tests' own.

    Returns:
        The model in `dtype`, in evaluation mode.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec

    one = architecture
    config = _transformer_config(one, dtype)
    if one.kv_shift is None:
        spec = vanilla_layer_spec(config)
    else:
        spec = kv_shift_layer_spec(config, kv_shift=one.kv_shift)
    scaling = {}
    if one.rope_scaling is not None:
        scaling = {"rope_scaling": True, "rope_scaling_factor": one.rope_scaling.factor}
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=one.padded_vocab_size,
        max_sequence_length=one.max_position_embeddings,
        share_embeddings_and_output_weights=one.tied,
        position_embedding_type="rope",
        rotary_base=one.rotary_base,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **scaling,
    ).eval()


def _transformer_config(one: Architecture, dtype: torch.dtype):
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = {}
    if one.num_experts:
        experts = {
            "num_moe_experts": one.num_experts,
            "moe_router_topk": one.moe_router_topk,
            "moe_ffn_hidden_size": one.ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(
        num_layers=one.num_layers,
        hidden_size=one.hidden_size,
        ffn_hidden_size=one.ffn_hidden_size,
        num_attention_heads=one.num_attention_heads,
        num_query_groups=one.num_query_groups,
        kv_channels=one.kv_channels,
        layernorm_epsilon=one.norm_epsilon,
        qk_layernorm=one.qk_layernorm,
        add_bias_linear=one.add_bias_linear,
        add_qkv_bias=one.add_qkv_bias,
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
        rows: of the name map, with every layer written out.
        read: index of a row -> its Megatron tensors.

    Raises:
        ValueError: the model's parameters are not those of the rows.
    """
    parameters = dict(model.named_parameters())
    for i, row in enumerate(rows):
        for name, tensor in zip(row.megatron, read(i), strict=True):
            for one, part in by_parameter(name.local, tensor).items():
                if one not in parameters:
                    raise ValueError(f"the TE-free model has no parameter {one}")
                parameters.pop(one).copy_(part)
    if parameters:
        raise ValueError(f"the checkpoint holds nothing for {', '.join(sorted(parameters))}")


def by_parameter(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the checkpoint by the names of the model's parameters: experts one by one."""
    if "{expert}" not in name:
        return {name: tensor}
    return {name.replace("{expert}", str(i)): expert for i, expert in enumerate(tensor)}


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, prompts: list[list[int]], vocab_size: int):
    """Logits of each prompt by itself: [tokens, vocab] each, fp32, without the padding's."""
    results = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        positions = torch.arange(len(prompt))[None]
        logits = model(tokens, positions, attention_mask=None)
        results.append(logits[0, :, :vocab_size].float())
    return results
