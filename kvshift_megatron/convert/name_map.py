"""The only table of weight names: Megatron's, Hugging Face's, and the transform between them.

It serves both directions, every layout and both of Megatron's layer kinds (Transformer Engine's and
TE-free).

    for row in rows("kvshift", architecture):
        row.megatron    # tuple of MegatronName, containing {layer} (and {expert})
        row.hf          # tuple of Hugging Face names, containing {layer}
        row.transform   # .to_hf(tensors, architecture), .to_megatron(tensors, architecture)

A row is the smallest set of tensors that can be converted alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.layouts import LAYOUTS
from kvshift_megatron.convert.transforms import (
    Convolution,
    ExpertMatrices,
    GateAndUp,
    Identity,
    PackedQKV,
    SeparateQKV,
    Transform,
    Vocabulary,
)
from kvshift_megatron.taps import tap_names


@dataclass(frozen=True)
class MegatronName:
    """One Megatron parameter, under each of its names.

    Args:
        te: Name in a model of Transformer Engine layers with grouped experts; `{expert}` stands for
            each expert's number.
        local: Name in a model of TE-free layers. Sequential experts have this name in Transformer
            Engine's layers, too.
        stored: Keys in torch_dist checkpoints, the usual one first. Experts are stacked there along
            a first axis. Checkpoints may also stack the layers, under a key without the layer's
            number (see `torch_dist.py`).
        axes: Its shape, in the names of `Architecture.size`; experts stacked.
        num_written: How many of the stored keys a new checkpoint gets.
    """

    te: str
    local: str
    stored: tuple[str, ...]
    axes: tuple[str, ...]
    num_written: int = 1

    @property
    def written(self) -> tuple[str, ...]:
        """Stored keys that a new checkpoint gets, so that layers of both kinds find theirs."""
        return self.stored[: self.num_written]

    def shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Return its shape in the checkpoint, with experts stacked."""
        return tuple(architecture.size(axis) for axis in self.axes)


@dataclass(frozen=True)
class Row:
    """Megatron tensors and the Hugging Face tensors that hold the same numbers."""

    megatron: tuple[MegatronName, ...]
    hf: tuple[str, ...]
    transform: Transform

    def with_experts(self, num_experts: int) -> "Row":
        """Return the row with one Hugging Face name per expert, if the layout separates experts."""
        if not any("{expert}" in name for name in self.hf):
            return self
        hf = [
            name.replace("{expert}", str(expert))
            for expert in range(num_experts)
            for name in self.hf
        ]
        return replace(self, hf=tuple(hf))

    @property
    def per_layer(self) -> bool:
        """Whether every layer of the model has this row."""
        return "{layer}" in self.megatron[0].te

    def in_layer(self, layer: int) -> "Row":
        """Return the row with the layer's number (0-based) in every name."""

        def named(text: str) -> str:
            return text.replace("{layer}", str(layer))

        return replace(
            self,
            megatron=tuple(
                replace(
                    name,
                    te=named(name.te),
                    local=named(name.local),
                    stored=tuple(map(named, name.stored)),
                )
                for name in self.megatron
            ),
            hf=tuple(map(named, self.hf)),
        )


def rows(layout: str, architecture: Architecture) -> list[Row]:
    """Return the table for one Hugging Face layout and one architecture, in the model's order.

    Raises:
        ValueError: The layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    return [
        *_embedding(),
        *_attention(layout, architecture),
        *(_experts(layout) if architecture.num_experts else _mlp(architecture)),
        *_head(architecture),
    ]


def expand(layout: str, architecture: Architecture) -> Iterator[Row]:
    """Yield the rows for every layer in turn, with numbers in their names, in the model's order."""
    table = rows(layout, architecture)
    first_layer = next(i for i, row in enumerate(table) if row.per_layer)
    per_layer = [row for row in table if row.per_layer]
    yield from table[:first_layer]
    for layer in range(architecture.num_layers):
        for row in per_layer:
            yield row.in_layer(layer).with_experts(architecture.num_experts)
    yield from (row for row in table[first_layer:] if not row.per_layer)


_MEGATRON_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _plain(megatron: str, axes: str, hf: str, transform: Transform = Identity()) -> Row:
    """Return the row of a tensor with a single name in Megatron, and one in Hugging Face."""
    return Row(
        (MegatronName(megatron, megatron, (megatron,), tuple(axes.split())),), (hf,), transform
    )


def _in_layer(megatron: str, axes: str, *hf: str, transform: Transform = Identity()) -> Row:
    name = _MEGATRON_LAYER + megatron
    return Row(
        (MegatronName(name, name, (name,), tuple(axes.split())),),
        tuple(_HF_LAYER + hf_name for hf_name in hf),
        transform,
    )


def _norm(te: str, local: str, hf: str, *stored: str) -> Row:
    """Return the row of a norm that Transformer Engine fuses into the linear layer after it."""
    te, local = _MEGATRON_LAYER + te, _MEGATRON_LAYER + local
    return Row(
        (MegatronName(te, local, stored or (te, local), ("hidden",), len(stored) or 1),),
        (_HF_LAYER + hf,),
        Identity(),
    )


def _embedding() -> list[Row]:
    return [
        _plain(
            "embedding.word_embeddings.weight",
            "vocab hidden",
            "model.embed_tokens.weight",
            Vocabulary(),
        )
    ]


def _head(architecture: Architecture) -> list[Row]:
    head = [_plain("decoder.final_layernorm.weight", "hidden", "model.norm.weight")]
    if not architecture.tied:
        head.append(_plain("output_layer.weight", "vocab hidden", "lm_head.weight", Vocabulary()))
    return head


def _attention(layout: str, architecture: Architecture) -> list[Row]:
    qkv = "self_attention.linear_qkv"
    table = [
        # The TE-free layer saves its norms under Transformer Engine's names too.
        _norm(f"{qkv}.layer_norm_weight", "input_layernorm.weight", "input_layernorm.weight")
    ]
    if layout == "baichuan_m1":
        table.append(
            _in_layer(
                f"{qkv}.weight", "qkv hidden", "self_attn.W_pack.weight", transform=PackedQKV()
            )
        )
    else:
        kinds = ["weight", *(["bias"] if architecture.has_qkv_bias else [])]
        for kind, axes in zip(kinds, ("qkv hidden", "qkv")):
            hf = [f"self_attn.{projection}_proj.{kind}" for projection in "qkv"]
            table.append(_in_layer(f"{qkv}.{kind}", axes, *hf, transform=SeparateQKV()))
    table.append(
        _in_layer(
            "self_attention.linear_proj.weight", "hidden attention", "self_attn.o_proj.weight"
        )
    )
    if architecture.add_bias_linear:
        table.append(
            _in_layer("self_attention.linear_proj.bias", "hidden", "self_attn.o_proj.bias")
        )
    if architecture.qk_layernorm:
        for kind in "qk":
            table.append(
                _in_layer(
                    f"self_attention.{kind}_layernorm.weight",
                    "head",
                    f"self_attn.{kind}_norm.weight",
                )
            )
    return table + _taps(layout, architecture)


def _taps(layout: str, architecture: Architecture) -> list[Row]:
    if architecture.kv_shift is None:
        return []
    table = []
    for kind, names in tap_names(architecture.kv_shift).items():
        one_by_one = [
            _in_layer(f"self_attention.{name}", "groups", f"self_attn.{name}") for name in names
        ]
        if layout != "baichuan_m1":
            table += one_by_one
            continue
        convolution = {"alpha": "conv_k", "beta": "conv_v"}[kind]
        table.append(
            Row(
                tuple(row.megatron[0] for row in one_by_one),
                (f"{_HF_LAYER}self_attn.{convolution}",),
                Convolution(),
            )
        )
    return table


def _mlp(architecture: Architecture) -> list[Row]:
    table = [
        _norm(
            "mlp.linear_fc1.layer_norm_weight",
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
        )
    ]
    kinds = ["weight", *(["bias"] if architecture.add_bias_linear else [])]
    for kind, fc1, fc2 in zip(kinds, ("2ffn hidden", "2ffn"), ("hidden ffn", "hidden")):
        hf = [f"mlp.{projection}_proj.{kind}" for projection in ("gate", "up")]
        table.append(_in_layer(f"mlp.linear_fc1.{kind}", fc1, *hf, transform=GateAndUp()))
        table.append(_in_layer(f"mlp.linear_fc2.{kind}", fc2, f"mlp.down_proj.{kind}"))
    return table


def _experts(layout: str) -> list[Row]:
    """Return the rows of experts: stacked in one tensor per layer (kvshift), or one by one."""
    fc1: tuple[str, ...]
    transforms: tuple[Transform, Transform]
    if layout == "mixtral":
        mlp, router = "block_sparse_moe", "block_sparse_moe.gate.weight"
        fc1 = (f"{mlp}.experts.{{expert}}.w1.weight", f"{mlp}.experts.{{expert}}.w3.weight")
        fc2 = (f"{mlp}.experts.{{expert}}.w2.weight",)
        transforms = ExpertMatrices(per_expert=2), ExpertMatrices(per_expert=1)
    else:
        router = "mlp.gate.weight"
        fc1, fc2 = ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",)
        transforms = Identity(), Identity()
    te = f"{_MEGATRON_LAYER}pre_mlp_layernorm.weight"
    return [
        # With experts, Transformer Engine's layer keeps the norm separate, but the TE-free layer
        # still saves it as if it were fused.
        _norm(
            "pre_mlp_layernorm.weight",
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            te,
            f"{_MEGATRON_LAYER}mlp.linear_fc1.layer_norm_weight",
        ),
        _in_layer("mlp.router.weight", "experts hidden", router),
        _expert_row("linear_fc1", "experts 2ffn hidden", fc1, transforms[0]),
        _expert_row("linear_fc2", "experts hidden ffn", fc2, transforms[1]),
    ]


def _expert_row(linear: str, axes: str, hf: tuple[str, ...], transform: Transform) -> Row:
    experts = f"{_MEGATRON_LAYER}mlp.experts"
    name = MegatronName(
        te=f"{experts}.{linear}.weight{{expert}}",
        local=f"{experts}.local_experts.{{expert}}.{linear}.weight",
        # Grouped and sequential experts are saved alike.
        stored=(f"{experts}.experts.{linear}.weight",),
        axes=tuple(axes.split()),
    )
    return Row((name,), tuple(_HF_LAYER + hf_name for hf_name in hf), transform)
