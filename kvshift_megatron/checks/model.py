"""Report the attention of every layer of a built model, or stop the run if it is wrong."""

from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_attr_wrapped_model

from kvshift_megatron.attention.implementation import agree
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.attention_places import attention_places
from kvshift_megatron.checks.checkpoint import check_checkpoint
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.specs.hybrid_names import Symbols

_GATED_DELTA_NET = Symbols.GDN


class LayerAttention(NamedTuple):
    """One layer's attention.

    Args:
        number: 1-based and global; multi-token-prediction layers have numbers of their own. See
            attention_places.
        class_name: Class of the attention module.
        kv_shift: Its taps; None if it does not shift.
        taps: Number of KV shifting's parameters in the whole layer, not only this rank's.
        is_mtp: Whether it belongs to multi-token prediction.
        symbol: Of the layer in a hybrid pattern, among whose layers the number counts; empty in a
            GPT model.
    """

    number: int
    class_name: str
    kv_shift: KVShiftConfig | None
    taps: int
    is_mtp: bool = False
    symbol: str = ""


def assert_kv_shift(
    model: torch.nn.Module | list[torch.nn.Module], kv_shift: KVShiftConfig | None = None
) -> str:
    """Raise unless every attention of a model shifts its keys and values.

    Collective over the pipeline-parallel group.

    Args:
        model: A model or its virtual pipeline chunks, wrapped or not.
        kv_shift: The taps that every layer must have; None accepts any.

    Returns:
        One line that says which layers have which attention, and how many taps there are.

    Raises:
        ValueError: A layer has another attention or other taps, or no layer has any attention; the
            message holds the line. Raised on every pipeline stage.
    """
    chunks = model if isinstance(model, list) else [model]
    layers = gather_layers(chunks)
    line = describe(layers)
    expected = f" ({kv_shift.describe()})" if kv_shift else ""
    # A gated delta net, a layer of its own kind in a hybrid stack, has no keys to shift.
    attentions = [layer for layer in layers if layer.symbol != _GATED_DELTA_NET]
    if not attentions or any(
        layer.kv_shift is None or kv_shift not in (None, layer.kv_shift) for layer in attentions
    ):
        raise ValueError(
            f"KV shifting{expected} was asked for, but not every attention of the model has it "
            f"({line}): check the layer spec (--spec) and the specs of multi-token prediction; a "
            "script whose model builder ignores --kv-shift cannot shift"
        )
    mtp = getattr(get_attr_wrapped_model(chunks[0], "config"), "mtp_num_layers", None)
    if mtp and not any(layer.is_mtp for layer in layers):
        raise ValueError(
            f"mtp_num_layers={mtp}, but the model has no layer of multi-token prediction ({line}): "
            "pass GPTModel an mtp_block_spec, converted with with_kv_shift, or drop "
            "--mtp-num-layers"
        )
    return line


def report_after_build(model_config: Any, kv_shift: KVShiftConfig | None) -> None:
    """Have the built model checked and reported once, before training starts.

    Args:
        model_config: Megatron's model configuration. Without hooks, as in a bare TransformerConfig,
            nothing happens.
        kv_shift: The taps that were asked for; None for the baseline model.
    """
    hooks = getattr(model_config, "post_wrap_hooks", None)
    # A spec callable runs for every virtual pipeline stage: one hook is enough.
    if hooks is None or any(isinstance(hook, ModelCheck) for hook in hooks):
        return
    hooks.append(ModelCheck(kv_shift))


class ModelCheck:
    """`check_model` as a post-wrap hook of Megatron's (and Megatron-Bridge's) model builders.

    Args:
        kv_shift: The taps that were asked for; None for the baseline model.
    """

    def __init__(self, kv_shift: KVShiftConfig | None) -> None:
        self.kv_shift = kv_shift

    def __call__(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        check_model(model, self.kv_shift)
        return model


def check_model(model: list[torch.nn.Module], kv_shift: KVShiftConfig | None) -> None:
    """Print on rank 0 which attention was built; raise if it is not what was asked for.

    Also settle which implementation of the shift runs, and check the checkpoint that Megatron is
    about to load. Collective over all ranks.

    Args:
        model: This rank's chunks, before a checkpoint is loaded.
        kv_shift: The taps that were asked for; None for the baseline model.

    Raises:
        ValueError: The model or the checkpoint is not what was asked for, or an implementation was
            asked for that cannot run.
    """
    lines = []
    if kv_shift is not None:
        lines.append(assert_kv_shift(model, kv_shift))
        lines += agree(
            place.module
            for chunk in model
            for place in attention_places(chunk)
            if isinstance(place.module, KVShiftSelfAttention)
        )
    else:
        layers = gather_layers(model)
        line = describe(layers)
        if any(layer.kv_shift for layer in layers):
            raise ValueError(f"the baseline model was asked for, but the model shifts ({line})")
        lines.append(line)
    if torch.distributed.get_rank() == 0:
        for line in lines:
            print(f"kvshift_megatron: {line}", flush=True)
    check_checkpoint(model, kv_shift)


def local_layers(model: list[torch.nn.Module]) -> list[LayerAttention]:
    """Return the layers of this rank, in the order of the modules."""
    layers = []
    for module, number, is_mtp, symbol in (p for chunk in model for p in attention_places(chunk)):
        kv_shift = module.kv_shift if isinstance(module, KVShiftSelfAttention) else None
        taps = kv_shift.parameters_per_group * module.config.num_query_groups if kv_shift else 0
        kind = type(module).__name__
        layers.append(LayerAttention(number, kind, kv_shift, taps, is_mtp, symbol))
    return layers


def gather_layers(model: list[torch.nn.Module]) -> list[LayerAttention]:
    """Return `local_layers` of all pipeline stages, by layer number; collective over these."""
    layers = local_layers(model)
    group = get_attr_wrapped_model(model[0], "pg_collection").pp
    if group.size() > 1:
        parts: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(parts, layers, group=group)
        layers = [layer for part in parts for layer in part]
    return sorted(layers, key=lambda layer: (layer.is_mtp, layer.symbol, layer.number))


def describe(layers: list[LayerAttention]) -> str:
    """Return one line: which layers have which attention, and how many taps there are in all."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        shift = layer.kv_shift
        kind = f"KV shifting ({shift.describe()})" if shift else f"vanilla ({layer.class_name})"
        which = " ".join(filter(None, ("MTP" if layer.is_mtp else "", layer.symbol)))
        kinds.setdefault((kind, which), []).append(layer.number)
    parts = [
        " ".join(filter(None, (kind, "in", which, _ranges(numbers))))
        for (kind, which), numbers in kinds.items()
    ]
    taps = sum(layer.taps for layer in layers)
    return f"attention: {'; '.join(parts) or 'none'}; {taps} taps"


def _ranges(numbers: list[int]) -> str:
    """Return 'layers 1-3, 7' for [1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"
