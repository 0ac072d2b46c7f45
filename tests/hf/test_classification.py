"""Heads for sequences and tokens give what Llama's give over the same hidden states."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from kvshift_megatron.hf import AUTO_MAP
from tests.hf.models import agrees, randomize, tiny_config, tiny_model, tokens

HEADS = {
    "sequence": (AutoModelForSequenceClassification, LlamaForSequenceClassification),
    "token": (AutoModelForTokenClassification, LlamaForTokenClassification),
}


@pytest.fixture(params=HEADS)
def ours_and_llama(request):
    """Return a model with identity taps, and Llama's with its weights."""
    auto, stock = HEADS[request.param]
    torch.manual_seed(0)
    ours = auto.from_config(tiny_config(num_labels=3)).eval()
    randomize(ours)
    known = {k: v for k, v in ours.config.to_dict().items() if k not in ("model_type", "auto_map")}
    llama = stock(LlamaConfig(**known)).eval()
    left = llama.load_state_dict(ours.state_dict(), strict=False)
    assert not left.missing_keys and all("self_attn." in name for name in left.unexpected_keys)
    for name, parameter in ours.named_parameters():
        if "alpha_" in name or "beta_" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("_1")))
    return ours, llama


def test_scores_and_losses_are_llama_s(ours_and_llama):
    ours, llama = ours_and_llama
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    for row, places in ((0, slice(0, 2)), (1, slice(4, 6))):
        ids[row, places] = mask[row, places] = 0
    by_token = "Token" in type(ours).__name__
    labels = torch.tensor([0, 2, 1])
    labels = labels[:, None].repeat(1, 6) if by_token else labels
    got, expected = (m(ids, attention_mask=mask, labels=labels) for m in (ours, llama))
    real = mask.bool() if by_token else slice(None)
    assert got.logits.shape == expected.logits.shape
    assert agrees(got.logits[real], expected.logits[real], 1e-6)
    labels = labels.where(mask.bool(), -100) if by_token else labels
    losses = [m(ids, attention_mask=mask, labels=labels).loss for m in (ours, llama)]
    assert agrees(*losses, 1e-6)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert torch.equal(ours(ids, attention_mask=mask, return_dict=False)[0], got.logits)
    # Live taps are in effect.
    torch.nn.init.constant_(ours.model.layers[0].self_attn.beta_2, 0.3)
    assert not agrees(ours(ids, attention_mask=mask).logits, got.logits, 1e-3)


def test_a_reward_model_from_a_language_model(tmp_path):
    model, ids = tiny_model(kv_shift_window=3, pad_token_id=None), tokens(1, 5)
    model.save_pretrained(tmp_path / "text")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "text", num_labels=1)
    states = model.model(ids).last_hidden_state
    assert agrees(reward(ids).logits, reward.score(states[:, -1]), 1e-6)
    assert reward(inputs_embeds=reward.get_input_embeddings()(ids)).logits.equal(reward(ids).logits)
    with pytest.raises(ValueError, match="pad_token_id is not set"):
        reward(ids.repeat(2, 1))
    reward.save_pretrained(tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert (tmp_path / "reward" / "heads_kvshift.py").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert again(ids).logits.equal(reward.eval()(ids).logits)
