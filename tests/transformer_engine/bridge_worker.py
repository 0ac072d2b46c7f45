"""Two ranks on a CPU: load Hugging Face folders into Megatron with AutoBridge, and export them.

    torchrun --nproc-per-node 2 -m kvshift_megatron.cpu bridge_worker.py OUTPUT

Writes OUTPUT/<case>.rank<N>.json: what differs, and the largest difference of the logits if the
layers can run here.
"""

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import kvshift_megatron.bridge  # noqa: F401  (registers)
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.hf import KVShiftLlamaConfig, KVShiftLlamaForCausalLM

VOCABULARY = 300
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Case:
    """A configuration and its layout in Megatron.

    Args:
        fields: Of the configuration.
        te: Whether to build Transformer Engine's layers.
        plant: Whether to damage the Megatron model before the export.
        save: Whether to also save a folder, from a folder with a tokenizer.
    """

    fields: dict = field(default_factory=dict)
    tp: int = 2
    pp: int = 1
    te: bool = False
    plant: bool = False
    save: bool = False

    @property
    def runs(self) -> bool:
        """Whether its layers run on a CPU; if TE is installed, a router of experts needs it."""
        return not self.te and "num_local_experts" not in self.fields


CASES = {
    "tap-sharded": Case({"kv_shift_window": 3, "qk_norm": True}, save=True),
    "tap-whole": Case({"num_key_value_heads": 1, "kv_shift_variant": "gate"}),
    "tied-biases": Case({"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-qkv-bias": Case({"rope_parameters": _LLAMA3, "qkv_bias": True}),
    "experts": Case({"num_local_experts": 4, "kv_shift_keys": False}),
    "te": Case({"num_key_value_heads": 1, "tie_word_embeddings": True}, te=True),
    "te-experts-pp": Case({"num_local_experts": 4}, tp=1, pp=2, te=True),
    "planted": Case(plant=True),
}


def main(output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        parallel_state.initialize_model_parallel(case.tp, case.pp)
        model_parallel_cuda_manual_seed(1)
        result = run(case, output / name)
        (output / f"{name}.rank{rank}.json").write_text(json.dumps(result))
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run(case: Case, folder: Path) -> dict:
    """Load one folder and export it; return differing names and the distance of the logits."""
    reference = hugging_face_model(case)
    if torch.distributed.get_rank() == 0:
        reference.save_pretrained(folder)
        if case.save:
            save_tokenizer(folder)
    torch.distributed.barrier()
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, case)
    shifting = [m for m in model.modules() if isinstance(m, KVShiftSelfAttention)]
    if case.plant:
        first = shifting[0]
        first.alpha_1.data, first.alpha_2.data = first.alpha_2.data, first.alpha_1.data
    exported = dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))
    if case.save:
        bridge.save_hf_pretrained([model], folder / "saved", show_progress=False)
    expected = reference.state_dict()
    if case.fields.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    return {
        "shifting_layers": len(shifting),
        "missing": sorted(set(expected) - set(exported)),
        "extra": sorted(set(exported) - set(expected)),
        "unequal": sorted(
            name
            for name in set(expected) & set(exported)
            if not torch.equal(expected[name], exported[name])
        ),
        "logits": logits_distance(model, reference) if case.runs else None,
    }


def hugging_face_model(case: Case) -> KVShiftLlamaForCausalLM:
    """Build the same model on every rank; norms and taps get random weights too."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(KVShiftLlamaConfig(**{**_SHAPE, **case.fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.5)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer, without which Bridge does not save the model."""
    words = {f"t{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def build(bridge: AutoBridge, case: Case) -> torch.nn.Module:
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size, provider.sequence_parallel = case.tp, case.tp > 1
    provider.pipeline_model_parallel_size = case.pp
    provider.pipeline_dtype = torch.float32
    provider.use_cpu_initialization = True
    provider.perform_initialization = False
    # Off: fused kernels, and what needs a GPU's libraries even to be constructed.
    provider.gradient_accumulation_fusion = provider.apply_rope_fusion = False
    provider.bias_activation_fusion = provider.moe_permute_fusion = False
    provider.moe_token_dispatcher_type = "allgather"
    needs_gpu = contextlib.nullcontext()
    if case.te:
        needs_gpu = mock.patch("torch.cuda.is_available", return_value=True)
    else:
        provider.transformer_impl = "local"
        provider.moe_grouped_gemm = False
    provider.finalize()
    with needs_gpu:
        (model,) = provider.provide_distributed_model(
            wrap_with_ddp=False, mixed_precision_wrapper=None
        )
    return model.eval()


@torch.no_grad()
def logits_distance(model: torch.nn.Module, reference: KVShiftLlamaForCausalLM) -> float:
    """Return the largest difference of the models' logits, relative to the largest logit."""
    tokens = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(16).expand(2, -1)
    logits = gather_from_tensor_model_parallel_region(model(tokens, positions, None))
    expected = reference(tokens).logits
    return ((logits[..., :VOCABULARY] - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
