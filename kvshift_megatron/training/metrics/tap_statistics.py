"""Statistics of the taps of each layer: mean, min, max, and the counts of the paper's Table 4.

The taps are read between the backward pass and the optimizer's step, so that an iteration's
statistics are of the taps that its loss was computed with. Right after the step the distributed
optimizer may not have gathered the new parameters yet (--overlap-param-gather).
"""

from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.attention_places import attention_places
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_names, taps_by_kind

_ALL = "taps/all_layers"


class LayerPart(NamedTuple):
    """One rank's part of one layer's taps.

    Args:
        name: Of the layer in the tags: "layer_7", or "mtp_layer_1" in multi-token prediction, by
            the number of attention_places, which GPT and hybrid models share.
        kv_shift: The layer's configuration.
        num_query_groups: Of the whole layer.
        first, last: The rank's query groups, last exclusive.
    """

    name: str
    kv_shift: KVShiftConfig
    num_query_groups: int
    first: int
    last: int


class TapStatistics:
    """Gathers the taps of all layers on the ranks of one model replica and describes them.

    Args:
        model: This rank's model chunks.
    """

    def __init__(self, model: list[torch.nn.Module]):
        self._modules = _shifting_layers(model)
        self._group = get_attr_wrapped_model(model[0], "pg_collection").mp
        self._ranks = torch.distributed.get_process_group_ranks(self._group)
        self._flat: Tensor | None = None
        self._layout: list[list[LayerPart]] | None = None
        self._longest = 0

    @torch.no_grad()
    def take(self) -> None:
        """Copy the current values of this rank's tap parameters: two kernels, no waiting."""
        values = [
            getattr(module, name).reshape(-1)
            for _, module in self._modules
            for names in tap_names(module.kv_shift).values()
            for name in names
        ]
        device = torch.cuda.current_device()
        self._flat = torch.cat(values).float() if values else torch.zeros(0, device=device)

    def describe(self) -> dict[str, float]:
        """Return statistics of what `take` copied, over all layers and query groups.

        Collective over the tensor- and pipeline-parallel ranks of the last rank's model replica;
        other ranks do nothing. It takes one all-gather for any number of layers; the first call
        takes a second one to learn which part each rank holds.

        Returns:
            On the last rank {tag: value}, see `statistics`. Empty on other ranks, and if `take` was
            not called since the last call.
        """
        flat, self._flat = self._flat, None
        writer = torch.distributed.get_world_size() - 1
        if flat is None or writer not in self._ranks:
            return {}
        layout = self._exchange_layout() if self._layout is None else self._layout
        if not self._longest:
            return {}
        padded = flat.new_zeros(self._longest)
        padded[: flat.numel()] = flat
        gathered = flat.new_empty(len(self._ranks) * self._longest)
        torch.distributed.all_gather_into_tensor(gathered, padded, group=self._group)
        if torch.distributed.get_rank() != writer:
            return {}
        return statistics(assemble(layout, gathered.view(len(self._ranks), -1).cpu()))

    def _exchange_layout(self) -> list[list[LayerPart]]:
        """Gather, once, which parts each rank holds. Collective over the replica's ranks."""
        own = [
            LayerPart(
                name,
                module.kv_shift,
                module.config.num_query_groups,
                module.stored_groups.start,
                module.stored_groups.stop,
            )
            for name, module in self._modules
        ]
        layout: list[list[LayerPart]] = [[] for _ in self._ranks]
        torch.distributed.all_gather_object(layout, own, group=self._group)
        self._longest = max(sum(map(_numel, parts)) for parts in layout)
        self._layout = layout
        return layout


def assemble(
    layout: list[list[LayerPart]], rows: Tensor
) -> dict[str, tuple[KVShiftConfig, Tensor]]:
    """Assemble whole layers from the parts of all ranks.

    Args:
        layout: The parts of each rank, in the order of its row.
        rows: The parameters of each rank's parts in turn, fp32 [ranks, longest].

    Returns:
        {layer: (configuration, parameters)}, parameters fp32 [parameters per group,
        num_query_groups]. Decoder layers ascending, then those of multi-token prediction.
    """
    layers: dict[str, tuple[KVShiftConfig, Tensor]] = {}
    for parts, row in zip(layout, rows):
        start = 0
        for part in parts:
            parameters = part.kv_shift.parameters_per_group
            values = row[start : start + _numel(part)].view(parameters, -1)
            start += _numel(part)
            shape = (parameters, part.num_query_groups)
            # A part that no rank holds stays NaN.
            whole = layers.setdefault(part.name, (part.kv_shift, torch.full(shape, torch.nan)))[1]
            whole[:, part.first : part.last] = values
    return {name: layers[name] for name in sorted(layers, key=_position)}


def statistics(layers: dict[str, tuple[KVShiftConfig, Tensor]]) -> dict[str, float]:
    """Return the tags of all layers.

    Args:
        layers: {layer: (configuration, parameters)}, as `assemble` returns them.

    Returns:
        taps/layer_7/alpha_1_mean, _min, _max: Over the query groups; likewise every other tap, as
            the shift applies it (after gate or clamp).
        taps/layer_7/pairs_a1_gt_a2_b1_le_b2: Number of query groups with alpha_1 > alpha_2 and not
            beta_1 > beta_2; likewise the other three cells of the paper's Table 4. There are two
            cells if only keys or only values shift.
        taps/all_layers/...: The same over the query groups of all decoder layers.
    """
    tags: dict[str, float] = {}
    for part in _grouped(layers):
        kv_shift = part[0][1]
        taps = _effective(kv_shift, torch.stack([parameters for _, _, parameters in part]))
        described = _describe(taps)
        for position, (name, *_) in enumerate(part):
            tags |= {f"taps/{name}/{key}": row[position] for key, row in described.items()}
    # Taps are comparable only if all decoder layers have the same configuration.
    decoder = [value for name, value in layers.items() if not name.startswith("mtp_")]
    if len({kv_shift for kv_shift, _ in decoder}) == 1:
        kv_shift = decoder[0][0]
        whole = torch.cat([parameters for _, parameters in decoder], dim=1)[None]
        described = _describe(_effective(kv_shift, whole))
        tags |= {f"{_ALL}/{key}": row[0] for key, row in described.items()}
    return tags


def _grouped(
    layers: dict[str, tuple[KVShiftConfig, Tensor]],
) -> list[list[tuple[str, KVShiftConfig, Tensor]]]:
    """Return the layers grouped by configuration and shape; a group is described at once."""
    parts: dict[Any, list[tuple[str, KVShiftConfig, Tensor]]] = {}
    for name, (kv_shift, parameters) in layers.items():
        parts.setdefault((kv_shift, parameters.shape), []).append((name, kv_shift, parameters))
    return list(parts.values())


def _effective(kv_shift: KVShiftConfig, parameters: Tensor) -> dict[str, Tensor]:
    """Return {"alpha": fp32 [window, layers, ng], ...} from parameters [layers, parameters, ng]."""
    shape = (kv_shift.window, parameters.shape[0], parameters.shape[2])
    taps = taps_by_kind(kv_shift, parameters.transpose(0, 1).flatten(1))
    return {kind: values.reshape(shape) for kind, values in taps.items()}


def _describe(taps: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return {"alpha_1_mean": one number per layer, ...} of taps [window, layers, ng]."""
    tags = {}
    for kind, values in taps.items():
        for number, tap in enumerate(values, start=1):
            tags[f"{kind}_{number}_mean"] = tap.double().mean(-1).tolist()
            tags[f"{kind}_{number}_min"] = tap.amin(-1).tolist()
            tags[f"{kind}_{number}_max"] = tap.amax(-1).tolist()
    cells = {"pairs": torch.ones((), dtype=torch.bool)}
    for kind, values in taps.items():
        greater, letter = values[0] > values[1], kind[0]
        cells = {
            f"{name}_{letter}1_{word}_{letter}2": cell & side
            for name, cell in cells.items()
            for word, side in (("gt", greater), ("le", ~greater))
        }
    return tags | {name: cell.sum(-1).tolist() for name, cell in cells.items()}


def _shifting_layers(model: list[torch.nn.Module]) -> list[tuple[str, KVShiftSelfAttention]]:
    layers = []
    for chunk in model:
        for place in attention_places(chunk):
            if isinstance(place.module, KVShiftSelfAttention):
                prefix = "mtp_layer" if place.is_mtp else "layer"
                layers.append((f"{prefix}_{place.number}", place.module))
    return layers


def _numel(part: LayerPart) -> int:
    return part.kv_shift.parameters_per_group * (part.last - part.first)


def _position(name: str) -> tuple[str, int]:
    prefix, _, number = name.rpartition("_")
    return prefix, int(number)
