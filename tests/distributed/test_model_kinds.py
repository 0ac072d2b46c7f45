"""Every kind of model shifts in exactly the layers where Megatron has a SelfAttention."""

import pytest

from tests.distributed.cases import (
    KINDS,
    LAYOUTS,
    MTP,
    NO_ROPE,
    REFERENCES,
    SCALED,
    SLIDING,
    UNEVEN,
    Case,
)

pytestmark = pytest.mark.slow

# Numbers, from 0, of the decoder layers with a SelfAttention; all four if not listed.
_SHIFTING = {"heterogeneous": (0, 1, 4)}
_CASES = [
    (world, case)
    for world, cases in LAYOUTS.items()
    for case in cases
    if case.model in KINDS or case.transformer == UNEVEN
]


@pytest.mark.parametrize(
    ("world_size", "case"), _CASES, ids=[f"{world}-{case.name}" for world, case in _CASES]
)
def test_kv_shift_stands_exactly_where_self_attention_stood(results, world_size, case):
    found = results(world_size, case.name)["attention"]
    assert "refusal" not in found
    before = {name for name, kind in found["baseline"].items() if kind == "SelfAttention"}
    shifts = {name for name, kind in found["classes"].items() if kind == "KVShiftSelfAttention"}
    numbers = _SHIFTING.get(case.model.name, range(4))
    expected = {f"decoder.layers.{number}.self_attention" for number in numbers}
    decoder = {name for name in before if name.startswith("decoder.")}
    assert decoder == expected
    assert len(before - decoder) == (case.model == MTP)
    assert shifts == before
    # All other attentions are unchanged.
    for name in found["baseline"].keys() - before:
        assert found["classes"][name] == found["baseline"][name]
    assert found["classes"].keys() == found["baseline"].keys()


@pytest.mark.parametrize("model", [SLIDING, SCALED, NO_ROPE], ids=lambda model: model.name)
def test_a_setting_of_the_attention_has_an_effect(results, model):
    """Guard the comparison of layouts: a setting that nothing reads would agree everywhere."""
    plain, other = (results(1, REFERENCES[name].name)["losses"][0] for name in ("gqa2", model.name))
    assert abs(plain - other) > 1e-4 * plain


@pytest.mark.parametrize("world_size", [2])
def test_a_vanilla_mtp_layer_is_refused(results, world_size):
    found = results(world_size, Case(MTP, tp=2, planted_error="mtp_spec_not_converted").name)[
        "attention"
    ]
    assert "vanilla (SelfAttention) in MTP layer 1" in found["refusal"]
