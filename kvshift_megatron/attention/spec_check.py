"""Compare a layer's spec with the configuration that it is built under.

Megatron's functions get_gpt_layer_*_spec turn settings into specs. A finished spec under another
configuration builds without a word: a dense layer under --num-experts trains the dense model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig

_INSTEAD = (
    "take --spec kvshift_megatron.layer_specs kv_shift_layer_spec, `python -m "
    "kvshift_megatron.pretrain` (both megatron-core 0.19), or a patched Megatron-LM with --kv-shift"
)


@dataclass(frozen=True)
class LayerSpec:
    """What is known of the spec that a KV-shifting attention stands in.

    Args:
        has_experts: Whether the layer's MLP is a mixture of experts; None if it has no MLP, or if
            nobody has looked.
        name: Of a static spec, for messages.
        only: Static specs: setting -> the only values that the spec honours, the first one as if it
            were not set.
        attention_numbers: Hybrid stacks: layer number -> number among the attention layers, both
            1-based and global; or a function that returns it when a layer is built.
    """

    has_experts: bool | None = None
    name: str = ""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention_numbers: Mapping[int, int] | Callable[[], Mapping[int, int]] = field(
        default_factory=dict
    )

    def attention_number(self, layer_number: int) -> int:
        """Return the layer's number among the attention layers; in a GPT model, its own."""
        numbers = self.attention_numbers
        numbers = numbers() if callable(numbers) else numbers
        return numbers.get(layer_number, layer_number)

    def check(self, config: TransformerConfig, layer_number: int) -> None:
        """Raise ValueError if the configuration asks for another layer.

        Args:
            config: Of the layer.
            layer_number: 1-based and global.
        """
        for setting, values in self.only.items():
            asked = getattr(config, setting, values[0])
            if asked not in values:
                raise ValueError(
                    f"{setting}={asked!r} is not honoured by the static spec {self.name}, which "
                    f"was made for {' or '.join(map(repr, values))}: {_INSTEAD}, or leave the "
                    "setting out"
                )
        if self.has_experts is None:
            return
        asked = experts_asked(config, layer_number)
        if self.has_experts not in asked:
            kind = ("an MLP", "experts")
            raise ValueError(
                f"num_moe_experts={config.num_moe_experts} and moe_layer_freq="
                f"{config.moe_layer_freq} ask for {kind[not self.has_experts]} in layer "
                f"{layer_number}, but its spec has {kind[self.has_experts]}: {_INSTEAD}, or drop "
                "--num-experts"
            )


def experts_asked(config: TransformerConfig, layer_number: int) -> set[bool]:
    """Return whether a configuration asks for experts in a layer.

    Two answers if it may be a layer of multi-token prediction, which has a number of its own and
    the spec of the last decoder layer.
    """
    if config.num_moe_experts is None:
        return {False}
    frequency = config.moe_layer_freq
    layers = range(config.num_layers)
    pattern = frequency if isinstance(frequency, list) else [i % frequency == 0 for i in layers]
    places = {layer_number - 1}
    if layer_number <= (config.mtp_num_layers or 0):
        places.add(config.num_layers - 1)
    return {bool(pattern[place]) for place in places if place < len(pattern)}


def check_norms(config: TransformerConfig, norms: tuple[Any, Any]) -> None:
    """Raise ValueError unless the norms of queries and keys are those of the configuration.

    Megatron builds what the spec names, whatever the configuration says; its own TE-free spec
    leaves out the norm of qk_l2_norm.

    Args:
        config: Of the layer.
        norms: The built norms; a missing one is None or an IdentityOp.
    """
    asked = "qk_l2_norm" if config.qk_l2_norm else "qk_layernorm" if config.qk_layernorm else None
    for norm in norms:
        is_missing = isinstance(norm, NoneType | IdentityOp)
        if asked is None and not is_missing:
            raise ValueError(
                f"the layer spec has a norm of queries and keys ({type(norm).__name__}), but "
                "neither qk_layernorm nor qk_l2_norm is on: use a spec without it, or add "
                "--qk-layernorm"
            )
        if asked is not None and is_missing:
            raise ValueError(
                f"{asked} is on, but the layer spec has no norm of queries and keys: use a spec "
                f"with it ({_INSTEAD}; kvshift_megatron.static_specs has one for qk_layernorm), or "
                f"drop --{asked.replace('_', '-')}"
            )
        if asked is not None and isinstance(norm, L2Norm) != config.qk_l2_norm:
            raise ValueError(
                f"{asked} is on, but the layer spec norms queries and keys by "
                f"{type(norm).__name__}: {_INSTEAD}, or drop --{asked.replace('_', '-')}"
            )
