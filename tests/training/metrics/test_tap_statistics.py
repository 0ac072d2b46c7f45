"""Statistics of whole layers, and whole layers from the ranks' parts, against float64."""

import pytest
import torch

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_names
from kvshift_megatron.training.metrics.tap_statistics import LayerPart, assemble, statistics
from tests.training.metrics.float64_taps import assert_tags, effective

CONFIGS = {
    "free": KVShiftConfig(),
    "window 3": KVShiftConfig(window=3),
    "window 4": KVShiftConfig(window=4),
    "gate": KVShiftConfig(variant="gate"),
    "clamp": KVShiftConfig(variant="clamp"),
    "keys": KVShiftConfig(shift_values=False),
    "values": KVShiftConfig(shift_keys=False),
}


def random_layers(kv_shift, groups=16, names=("layer_1", "layer_2", "layer_10", "mtp_layer_1")):
    """Draw parameters that also lie well outside [0, 1], as trained taps do."""
    torch.manual_seed(len(names) + groups)
    count = kv_shift.parameters_per_group
    return {name: (kv_shift, torch.randn(count, groups)) for name in names}


def whole(layers):
    """Convert layers to the input of float64_taps."""
    return {
        name: effective(
            kv_shift.variant,
            dict(zip([n for kind in tap_names(kv_shift).values() for n in kind], values.tolist())),
        )
        for name, (kv_shift, values) in layers.items()
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_statistics_are_those_of_the_taps_that_the_shift_applies(config):
    layers = random_layers(CONFIGS[config])
    assert_tags(statistics(layers), whole(layers))


def test_layers_of_different_sizes():
    layers = random_layers(KVShiftConfig(), 4, ("layer_1",))
    layers |= random_layers(KVShiftConfig(), 6, ("layer_2", "layer_3"))
    assert_tags(statistics(layers), whole(layers))


def test_table_4():
    """The paper's 2.9B model: 50 / 17 / 9 / 52 of its 128 pairs."""
    cells = {(1, 1): 50, (1, 0): 17, (0, 1): 9, (0, 0): 52}
    columns = [
        [0.75, 0.25] * first + [0.25, 0.75] * (1 - first) + [0.9, -0.1] * second
        + [-0.1, 0.9] * (1 - second)
        for (first, second), count in cells.items()
        for _ in range(count)
    ]  # fmt: skip
    order = torch.randperm(128)
    taps = torch.tensor(columns).T[:, order]
    layers = {f"layer_{i + 1}": (KVShiftConfig(), taps[:, 8 * i : 8 * i + 8]) for i in range(16)}
    tags = statistics(layers)
    counts = [
        tags[f"taps/all_layers/pairs_a1_{a}_a2_b1_{b}_b2"] for a in ("gt", "le")
        for b in ("gt", "le")
    ]  # fmt: skip
    assert counts == [50, 17, 9, 52]


def test_equal_taps_are_not_greater():
    tags = statistics({"layer_1": (KVShiftConfig(), torch.full((4, 3), 0.5))})
    assert tags["taps/layer_1/pairs_a1_le_a2_b1_le_b2"] == 3


def test_a_nan_tap_shows():
    taps = torch.full((4, 3), 0.5)
    taps[0, 1] = torch.nan
    tags = statistics({"layer_1": (KVShiftConfig(), taps)})
    assert tags["taps/layer_1/alpha_1_mean"] != tags["taps/layer_1/alpha_1_mean"]
    assert tags["taps/layer_1/alpha_2_mean"] == 0.5


def shard(layers, tp, pp, replicated=False):
    """Return layout and rows of tp x pp ranks; with pp 2 the first stage has one layer."""
    names = list(layers)
    layout, rows = [], []
    for stage in [names] if pp == 1 else [names[:1], names[1:]]:
        for rank in range(tp):
            parts, row = [], []
            for name in stage:
                kv_shift, values = layers[name]
                groups = values.shape[1]
                first, last = rank * groups // tp, (rank + 1) * groups // tp
                if replicated:
                    first, last = 0, groups
                parts.append(LayerPart(name, kv_shift, groups, first, last))
                row.append(values[:, first:last].flatten())
            layout.append(parts)
            rows.append(torch.cat(row))
    longest = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    return layout, padded


@pytest.mark.parametrize("config", ["free", "window 3", "gate"])
@pytest.mark.parametrize(("tp", "pp", "replicated"), [(4, 1, False), (2, 2, False), (4, 2, True)])
def test_whole_layers_from_shards(config, tp, pp, replicated):
    layers = random_layers(CONFIGS[config])
    layout, rows = shard(layers, tp, pp, replicated)
    found = assemble(layout, rows)
    assert found.keys() == layers.keys()
    for name, (kv_shift, values) in found.items():
        assert kv_shift == layers[name][0]
        assert torch.equal(values, layers[name][1])


def test_layers_are_in_the_order_of_the_model():
    layers = random_layers(KVShiftConfig(), names=("mtp_layer_1", "layer_10", "layer_9"))
    layout, rows = shard(layers, tp=2, pp=2)
    assert list(assemble(layout, rows)) == ["layer_9", "layer_10", "mtp_layer_1"]


def test_planted_errors_are_seen():
    layers = random_layers(KVShiftConfig())
    truth = whole(layers)
    layout, rows = shard(layers, tp=2, pp=2)
    for wrong in (
        statistics(layers) | {"taps/layer_1/alpha_1_mean": 0.0},
        # One rank's taps in place of another's, and a missing rank.
        statistics(assemble(layout, rows[[0, 0, 2, 3]])),
        statistics(assemble([layout[0], *layout[2:]], rows[[0, 2, 3]])),
        statistics(layers) | {"taps/all_layers/pairs_a1_gt_a2_b1_gt_b2": -1},
        {tag: value for tag, value in statistics(layers).items() if "layer_10" not in tag},
    ):
        with pytest.raises(AssertionError):
            assert_tags(wrong, truth)
    logits = random_layers(CONFIGS["gate"])
    with pytest.raises(AssertionError):
        # Logits taken for taps.
        assert_tags(
            statistics(logits),
            {
                name: {"alpha_1": v[0].tolist(), "alpha_2": (1 - v[0]).tolist(),
                       "beta_1": v[1].tolist(), "beta_2": (1 - v[1]).tolist()}
                for name, (_, v) in logits.items()
            },
        )  # fmt: skip
