"""Packed documents on context-parallel ranks, each of which must give what it gives alone."""

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron.layer_specs import kv_shift_layer_spec
from tests.distributed import canonical
from tests.distributed.cases import Case
from tests.distributed.engine import transformer_config

# Seeds of the documents' lengths and contents; a failure names its seed.
SEEDS = range(6)


def document_lengths(seed: int, window: int, ranks: int = 4) -> list[int]:
    """Draw lengths that 4 ranks can split, with chunks at least as long as the shift looks back."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 6, (1,), generator=generator))
    shortest = window - 1
    chunks = torch.randint(shortest, shortest + 4, (count,), generator=generator)
    return [2 * ranks * int(chunk) for chunk in chunks]


def hidden_states(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (input, gradient of the output), each fp32 [tokens, 1, 64]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randn(tokens, 1, 64, generator=generator) for _ in range(2))


def attention_of(case: Case) -> torch.nn.Module:
    config = transformer_config(case)
    spec = kv_shift_layer_spec(config, kv_shift=case.model.kv_shift)
    attention = build_module(
        spec.layer_specs[0].submodules.self_attention, config=config, layer_number=1
    )
    canonical.fill(attention)
    return attention


def alone(case: Case) -> dict[int, dict]:
    """Run each document alone, unpacked on one rank; return the joined results by seed."""
    results = {}
    for seed in SEEDS:
        attention = attention_of(case)
        lengths = document_lengths(seed, case.model.kv_shift.window)
        x, grad = hidden_states(seed, sum(lengths))
        x.requires_grad_()
        outputs = []
        for document, grad_document in zip(x.split(lengths), grad.split(lengths)):
            output = _run(attention, document, len(document), None)
            output.backward(grad_document, retain_graph=True)
            outputs.append(output.detach())
        results[seed] = _result(torch.cat(outputs), x.grad, attention)
    return results


def packed(case: Case) -> dict[int, dict]:
    """Run the same documents packed and split over the context-parallel ranks."""
    rank = parallel_state.get_context_parallel_rank()
    group = parallel_state.get_context_parallel_group()
    results = {}
    for seed in SEEDS:
        attention = attention_of(case)
        lengths = document_lengths(seed, case.model.kv_shift.window)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        mine = local_tokens(lengths, rank, group.size())
        x, grad = hidden_states(seed, sum(lengths))
        local = x[mine].clone().requires_grad_()
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
        output = _run(attention, local, max(lengths), params)
        output.backward(grad[mine])
        for parameter in attention.parameters():
            torch.distributed.all_reduce(parameter.grad, group=group)
        whole = [torch.zeros_like(x) for _ in range(2)]
        whole[0][mine], whole[1][mine] = output.detach(), local.grad
        for tensor in whole:
            torch.distributed.all_reduce(tensor, group=group)
        results[seed] = _result(*whole, attention)
    return results


def local_tokens(lengths: list[int], rank: int, ranks: int) -> torch.Tensor:
    """Return the indices of a rank's tokens: chunks r and 2C-1-r of each document."""
    indices, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * ranks)
        indices += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(indices)


def _run(attention, x, longest: int, params):
    rotary = RotaryEmbedding(
        kv_channels=8, rotary_percent=1.0, rotary_base=100_000, use_cpu_initialization=True,
        cp_group=parallel_state.get_context_parallel_group(),
    )  # fmt: skip
    frequencies = rotary(longest, packed_seq=params is not None)
    output, _ = attention(
        x, attention_mask=None, rotary_pos_emb=frequencies, packed_seq_params=params
    )
    return output


def _result(output, x_grad, attention) -> dict[str, torch.Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in attention.named_parameters()}
    return {"output": output, "gradient of the input": x_grad, **gradients}
