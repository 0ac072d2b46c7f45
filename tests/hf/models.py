"""Tiny KV-shifting models, and a plain float64 definition of what they compute, token by token.

The definition shares no code with the model: it reads tensors by their names in a checkpoint.
"""

import torch
from torch import Tensor

from kvshift_megatron.hf import KVShiftLlamaConfig, KVShiftLlamaForCausalLM
from tests.hf.agreement import LOGITS

VARIANTS = [
    {},
    {"kv_shift_window": 3},
    {"kv_shift_window": 4},
    {"kv_shift_variant": "gate"},
    {"kv_shift_variant": "clamp"},
    {"kv_shift_variant": "clamp", "kv_shift_window": 3},
    {"kv_shift_values": False},
    {"kv_shift_keys": False, "kv_shift_window": 3},
    {"kv_shift_keys": False, "kv_shift_variant": "gate"},
]


def named(settings: dict) -> str:
    return ",".join(f"{k.removeprefix('kv_shift_')}={v}" for k, v in settings.items()) or "default"


def tiny_config(**settings) -> KVShiftLlamaConfig:
    return KVShiftLlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        | settings
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Set random values in parameters that start out constant or tied: taps, biases, norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "alpha" in name or "beta" in name:
                parameter.copy_(0.4 + 0.6 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)


def tiny_model(seed: int = 0, **settings) -> KVShiftLlamaForCausalLM:
    torch.manual_seed(seed)
    model = KVShiftLlamaForCausalLM(tiny_config(**settings)).eval()
    randomize(model, seed)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def defined_taps(config, parameters: dict[str, Tensor], prefix: str, kind: str) -> list[Tensor]:
    """Return the taps of "alpha" or "beta", float64 [g] each, current token first."""
    if f"{prefix}{kind}_logit" in parameters:
        gate = 1 / (1 + torch.exp(-parameters[f"{prefix}{kind}_logit"].double()))
        return [gate, 1 - gate]
    if f"{prefix}{kind}_1" not in parameters:
        return []
    taps = [
        parameters[f"{prefix}{kind}_{j}"].double() for j in range(1, config.kv_shift_window + 1)
    ]
    if config.kv_shift_variant == "clamp":
        # Clamped, with the derivative 1 everywhere.
        taps = [t - (t - t.minimum(torch.ones(())).maximum(torch.zeros(()))).detach() for t in taps]
    return taps


def defined_attention(config, parameters, prefix: str, hidden: Tensor) -> Tensor:
    """Map one sequence of hidden states float64 [s, hidden] to attention output [s, hidden]."""
    heads, groups, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def project(name, x):
        y = x @ parameters[f"{prefix}{name}.weight"].double().T
        bias = parameters.get(f"{prefix}{name}.bias")
        return y if bias is None else y + bias.double()

    length = len(hidden)
    query = project("q_proj", hidden).view(length, heads, size)
    key = project("k_proj", hidden).view(length, groups, size)
    value = project("v_proj", hidden).view(length, groups, size)
    if f"{prefix}q_norm.weight" in parameters:
        query = normalized(query, parameters[f"{prefix}q_norm.weight"], config.rms_norm_eps)
        key = normalized(key, parameters[f"{prefix}k_norm.weight"], config.rms_norm_eps)
    shifted = {}
    for kind, states in (("alpha", key), ("beta", value)):
        taps = defined_taps(config, parameters, prefix, kind)
        rows = []
        for i in range(length):
            row = torch.zeros_like(states[i]) if taps else states[i]
            for j, tap in enumerate(taps):
                if i - j >= 0:
                    row = row + tap[:, None] * states[i - j]
            rows.append(row)
        shifted[kind] = torch.stack(rows)
    base = config.rope_parameters["rope_theta"]
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def rotate(x):
        angle = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
        first, second = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    query, key, value = rotate(query), rotate(shifted["alpha"]), shifted["beta"]
    outputs = []
    for i in range(length):
        row = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = key[: i + 1, group] @ query[i, head] / size**0.5
            row.append(torch.softmax(scores, 0) @ value[: i + 1, group])
        outputs.append(torch.cat(row))
    return project("o_proj", torch.stack(outputs))


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def defined_mlp(config, parameters, prefix: str, x: Tensor) -> Tensor:
    silu = torch.nn.functional.silu
    if not config.num_local_experts:
        gate, up, down = (
            parameters[f"{prefix}{name}_proj.weight"].double() for name in ("gate", "up", "down")
        )
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T
    rows = []
    for token in x:
        logits = parameters[f"{prefix}gate.weight"].double() @ token
        best = logits.topk(config.num_experts_per_tok)
        row = 0
        for share, expert in zip(torch.softmax(best.values, 0), best.indices):
            both = parameters[f"{prefix}experts.gate_up_proj"][expert].double() @ token
            half = len(both) // 2
            down = parameters[f"{prefix}experts.down_proj"][expert].double()
            row = row + share * (down @ (silu(both[:half]) * both[half:]))
        rows.append(row)
    return torch.stack(rows)


def defined_logits(config, parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Map one sequence of ids [s] to float64 logits [s, vocab]."""
    x = parameters["model.embed_tokens.weight"].double()[ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        y = normalized(x, parameters[f"{layer}input_layernorm.weight"], config.rms_norm_eps)
        x = x + defined_attention(config, parameters, f"{layer}self_attn.", y)
        y = normalized(
            x, parameters[f"{layer}post_attention_layernorm.weight"], config.rms_norm_eps
        )
        x = x + defined_mlp(config, parameters, f"{layer}mlp.", y)
    x = normalized(x, parameters["model.norm.weight"], config.rms_norm_eps)
    head = parameters.get("lm_head.weight", parameters["model.embed_tokens.weight"])
    return x @ head.double().T


def model_parameters(model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@torch.no_grad()
def full_logits(model, ids: Tensor, **kwargs) -> Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def agrees(actual: Tensor, expected: Tensor, tolerance: float = LOGITS) -> bool:
    """Check that no difference exceeds `tolerance` times the largest value; NaN never agrees."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs().max()
    return bool(difference <= tolerance * expected.double().abs().max())
