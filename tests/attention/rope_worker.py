"""A layer that rotates its keys in the pass that shifts them, in Triton's interpreter, on a CPU.

Started by test_rope.py: the interpreter must be chosen before Triton is first imported. Prints
{case: {quantity: relative error}} as JSON, against a layer whose keys Megatron rotates.
"""

import json
import os
from unittest import mock

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention import rope
from kvshift_megatron.ops import kv_shift_rope
from kvshift_megatron.ops.reference import rotate
from tests.attention.test_self_attention import build_attention
from tests.support.compare import relative_error
from tests.support.single_process import seed_everything, single_process, transformer_config

TOKENS, HEAD = 12, 8
DOCUMENTS = torch.tensor([0, 3, 4, 11], dtype=torch.int32)


def main() -> None:
    found = {}
    with single_process():
        for name, (kv_shift, settings, packed) in {
            "free": (KVShiftConfig(), {}, False),
            "window 3, interleaved": (KVShiftConfig(window=3), {"rotary_interleaved": True}, False),
            "keys": (KVShiftConfig(shift_values=False), {}, False),
            "values": (KVShiftConfig(shift_keys=False), {}, False),
            "packed": (KVShiftConfig(), {}, True),
        }.items():
            found[name] = errors(kv_shift, settings, packed)
        with mock.patch.object(rope, "kv_shift_rope", with_channels_rolled):
            found["planted"] = errors(KVShiftConfig(), {}, False)
    print(json.dumps(found))


def with_channels_rolled(*arguments, **keywords):
    key, value = kv_shift_rope(*arguments, **keywords)
    return key.roll(1, dims=-1), value


def errors(kv_shift: KVShiftConfig, settings: dict, packed: bool) -> dict[str, float]:
    separate, fused = (run(choice, kv_shift, settings, packed) for choice in ("separate", "fused"))
    assert separate.pop("rotations") == 2 and fused.pop("rotations") == 1
    return {name: relative_error(fused[name], separate[name]) for name in separate}


def run(choice: str, kv_shift: KVShiftConfig, settings: dict, packed: bool) -> dict:
    """Return output and gradients of one attention, and the number of Megatron's rotations."""
    seed_everything()
    config = transformer_config(**settings)
    # TransformerConfig refuses it without Transformer Engine, whose rotation is replaced below.
    config.apply_rope_fusion = True
    os.environ[rope.VARIABLE] = choice
    attention = build_attention(kv_shift, config)
    batch = 1 if packed else 2
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(TOKENS, batch, 32, generator=generator) for _ in range(2))
    # Both channels of a pair have the same angle.
    angles = torch.randn(TOKENS, 1, 1, HEAD // 2, generator=generator)
    if config.rotary_interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = angles.repeat(1, 1, 1, 2)
    documents = None
    if packed:
        documents = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=DOCUMENTS, cu_seqlens_kv=DOCUMENTS,
            max_seqlen_q=7, max_seqlen_kv=7,
        )  # fmt: skip
    rotations = []

    def rotation(t, freqs, interleaved):
        rotations.append(t.shape)
        return rotate(t, freqs, None, interleaved, 1.0)

    def packed_rotation(t, cu_seqlens, freqs, cp_size, cp_rank, interleaved):
        rotations.append(t.shape)
        places = (
            torch.arange(len(t))
            - cu_seqlens.long()[
                torch.searchsorted(cu_seqlens[1:].long(), torch.arange(len(t)), right=True)
            ]
        )
        return rotate(t, freqs, places, interleaved, 1.0)

    with (
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", rotation),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", packed_rotation),
    ):
        x.requires_grad_()
        output = attention(x, None, rotary_pos_emb=angles, packed_seq_params=documents)[0]
        output.backward(grad)
    named = {name: p.grad for name, p in attention.named_parameters()}
    return {"output": output, "input gradient": x.grad, **named, "rotations": len(rotations)}


if __name__ == "__main__":
    main()
