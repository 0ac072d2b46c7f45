"""With identity taps the model equals the stock model: Llama, Qwen2, Qwen3, Mixtral."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.hf.models import agrees, full_logits, randomize, tiny_config, tiny_model, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
STOCK = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"qkv_bias": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"qk_norm": True, "head_dim": 12}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, EXPERTS),
}


@pytest.fixture(params=STOCK)
def stock_and_ours(request):
    """Return a stock model, and a KV-shifting one with its weights and identity taps."""
    config_class, model_class, options = STOCK[request.param]
    ours = tiny_model(**options)
    known = ours.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        known.pop(name, None)
    torch.manual_seed(4)
    stock = model_class(config_class(**known)).eval()
    randomize(stock, 4)
    left = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all("alpha_" in name or "beta_" in name for name in left.missing_keys)
    for name, parameter in ours.named_parameters():
        if "alpha_" in name or "beta_" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("_1")))
    return stock, ours


def test_identity_taps_change_nothing(stock_and_ours):
    stock, ours = stock_and_ours
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert agrees(full_logits(ours, ids), full_logits(stock, ids), 1e-6)
    got, expected = (full_logits(model, ids, attention_mask=mask) for model in (ours, stock))
    assert agrees(got[mask.bool()], expected[mask.bool()], 1e-6)
    with torch.no_grad():
        ours.model.layers[1].self_attn.beta_2.fill_(0.1)
    assert not agrees(full_logits(ours, ids), full_logits(stock, ids), 1e-3)


def test_experts_start_as_mixtrals():
    torch.manual_seed(0)
    model = tiny_model(**EXPERTS, initializer_range=0.05)
    experts, router = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    for weight in (experts.gate_up_proj, experts.down_proj, router.weight):
        assert 0.03 < weight.std() < 0.07


def test_llama3_scaling_is_in_effect():
    ids = tokens(1, 40)
    scaled = tiny_model(rope_parameters=LLAMA3)
    plain = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    plain.load_state_dict(scaled.state_dict())
    assert not agrees(full_logits(plain, ids), full_logits(scaled, ids), 1e-3)
    assert tiny_config(rope_parameters=LLAMA3).rope_parameters["factor"] == 8.0
