"""A checkpoint of any layout, loaded at any other, gives bitwise the same state and losses."""

import json

import pytest
import torch

from tests.distributed.resharding import FAMILIES, PLANTS, SAVED_AFTER, STEPS
from tests.support.launch import ranks
from tests.support.releases import imported_from
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_TIMEOUT = 600  # seconds; it takes a tenth of that on two cores

_LAYOUTS = [(family, layout) for family, layouts in FAMILIES.items() for layout in layouts]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, request):
    """Return a function that returns the result of a save or load by its name."""
    directory = tmp_path_factory.mktemp("resharding")
    world_size = min(4, request.config.getoption("max_ranks") or 4)
    launch = ranks(world_size, "tests.distributed.resharding_worker", [str(directory)], _TIMEOUT)
    for rank in range(world_size):
        path = directory / f"megatron-{rank}.json"
        assert path.exists(), f"not every rank started:\n{launch.stdout[-5000:]}"
        assert json.loads(path.read_text()) == imported_from()

    def of(name: str) -> dict:
        path = directory / f"{name}.pt"
        assert path.exists(), f"{name} gave nothing; the launch said:\n{launch.stdout[-5000:]}"
        outcome = torch.load(path)
        assert "error" not in outcome, f"{name}: {outcome['error']}"
        return outcome["result"]

    return of


def each(pairs):
    return pytest.mark.parametrize(
        ("family", "layout", "world_size"),
        [pytest.param(f, layout, layout.ranks, id=f"{layout.name}") for f, layout in pairs],
    )


def savers(family, request):
    """Return the layouts of a family that this run launches."""
    most = request.config.getoption("max_ranks") or 4
    return [layout for layout in FAMILIES[family] if layout.ranks <= most]


@each(_LAYOUTS)
def test_every_layouts_checkpoint_is_loaded_bitwise(outcome, request, family, layout, world_size):
    load = outcome(f"load:{layout.name}")
    for saver in savers(family, request):
        differences = load["differences"].pop(saver.name)
        assert not differences, f"{saver.name} -> {layout.name}: {differences}"
    assert not load["differences"]


@each(_LAYOUTS)
def test_training_goes_on_at_the_same_layout_as_without_a_break(
    outcome, family, layout, world_size
):
    losses = outcome(f"save:{layout.name}")["losses"]
    assert len(losses) == STEPS
    assert outcome(f"load:{layout.name}")["losses"][layout.name] == losses[SAVED_AFTER:]


@each([pair for pair in _LAYOUTS if not pair[1].case.model.bf16])
def test_training_goes_on_at_another_layout_like_a_single_process(
    outcome, request, family, layout, world_size
):
    losses = outcome(f"load:{layout.name}")["losses"]
    layouts = savers(family, request)
    before = layouts[layouts.index(layout) - 1]
    assert before != layout and losses.keys() == {before.name, layout.name}
    expected = outcome(f"unbroken:{family}")["losses"][SAVED_AFTER:]
    assert len(losses[before.name]) == len(expected) == STEPS - SAVED_AFTER
    for got, want in zip(losses[before.name], expected):
        assert abs(got - want) <= FP32_REL * want


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compared_tensors_are_neither_zero_nor_equal(outcome, family):
    """Guard the comparison: moments of zero or equal taps would agree everywhere."""
    saved = outcome(f"save:{FAMILIES[family][0].name}")["state"]
    assert saved["steps"].tolist() == [SAVED_AFTER]
    taps = [name for name in saved if ".alpha_" in name or ".beta_" in name]
    of_a_layer = [name for name in taps if name.startswith("param decoder.layers.0.")]
    layers = FAMILIES[family][0].case.model.transformer.get("num_layers", 4)
    assert len(taps) == 4 * layers * len(of_a_layer) and of_a_layer
    for kind in ("main", "exp_avg", "exp_avg_sq"):
        values = [v for n in taps if n.startswith(kind + " ") for v in saved[n].tolist()]
        assert 0.0 not in values and len(set(values)) == len(values) > 0


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_error_is_noticed(outcome, plant):
    (differences,) = outcome(f"load:{plant.name}")["differences"].values()
    # Exactly the four taps of two layers, with the three tensors that the optimizer keeps of each.
    assert len(differences) == 4 * 2 * 4
    assert all(".alpha_" in line or ".beta_" in line for line in differences)
