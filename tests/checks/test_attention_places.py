"""Numbers of attentions: the same in a GPT model and in the hybrid model of the same layers."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.checks.attention_places import attention_places
from kvshift_megatron.checks.model import assert_kv_shift, describe, local_layers
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.specs.hybrid_pattern import attention_numbers, num_layers
from kvshift_megatron.specs.te_free import SequenceParallelNorm
from kvshift_megatron.specs.te_free.hybrid_stack import local_hybrid_stack
from kvshift_megatron.upstream import builder_table
from kvshift_megatron.upstream.substitutions import Applied
from tests.checks.models import FREE, build
from tests.distributed.models import HybridModel
from tests.support.single_process import transformer_config

KIND = f"KV shifting ({FREE.describe()})"


class LinearAttention(torch.nn.Module):
    """Stands for a gated delta net, which only Transformer Engine's stack has."""

    def __init__(self, config, layer_number, **_):
        super().__init__()
        self.config, self.layer_number = config, layer_number


def hybrid(
    pattern: str, kv_shift: KVShiftConfig | None = FREE, segment: int | None = None
) -> torch.nn.Module:
    """Build a hybrid model, or one segment of its pattern."""
    depths = pattern.count("/")
    config = transformer_config(num_layers=num_layers(pattern), mtp_num_layers=depths or None)
    stack = local_hybrid_stack(config)
    static = LayerSpec(attention_numbers=attention_numbers(pattern))
    spec, _ = convert_specs(stack, None, config, kv_shift, static=static)
    linear = TransformerLayerSubmodules(self_attention=ModuleSpec(LinearAttention))
    spec.submodules.gdn_layer = ModuleSpec(TransformerLayer, submodules=linear)
    with Applied(builder_table.local_final_norm(SequenceParallelNorm)):
        return HybridModel(
            config,
            spec,
            vocab_size=64,
            max_sequence_length=16,
            hybrid_layer_pattern=pattern,
            position_embedding_type="rope",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vp_stage=segment,
        )


def places(model: torch.nn.Module) -> list[tuple[int, bool, str]]:
    return [place[1:] for place in attention_places(model)]


def test_attentions_have_the_numbers_of_the_gpt_model(megatron_rank):
    model = hybrid("*-*-*-")
    numbers = [number for number, _, _ in places(model)]
    assert numbers == [number for number, _, _ in places(build(FREE, num_layers=3))] == [1, 2, 3]
    # A planted error: Megatron's own numbers, which count MLP layers too.
    assert [place.module.layer_number for place in attention_places(model)] == [1, 3, 5] != numbers
    assert describe(local_layers([model])) == f"attention: {KIND} in * layers 1-3; 24 taps"


def test_the_number_is_the_one_that_the_first_taps_are_drawn_by(megatron_rank):
    drawn = KVShiftConfig(seed=5)
    pair = (list(attention_places(model)) for model in (hybrid("-*-*", drawn),
                                                        build(drawn, num_layers=2)))  # fmt: skip
    for ours, theirs in zip(*pair, strict=True):
        assert ours.number == theirs.number
        assert torch.equal(ours.module.alpha_1, theirs.module.alpha_1)
        assert ours.module.alpha_1.unique().numel() > 1


@pytest.mark.parametrize(
    ("pattern", "segment", "numbers"),
    [("*-|*-*-|-*", 0, [1]), ("*-|*-*-|-*", 1, [2, 3]), ("*-|*-*-|-*", 2, [4]), ("-|-*", 0, [])],
)
def test_numbers_go_on_over_the_segments_of_a_pattern(megatron_rank, pattern, segment, numbers):
    model = hybrid(pattern, segment=segment)
    assert places(model) == [(number, False, "*") for number in numbers]


def test_wrapping_changes_nothing(megatron_rank):
    wrapped = torch.nn.Sequential(hybrid("*-|*-", segment=1))
    assert places(wrapped) == [(2, False, "*")]


def test_multi_token_prediction_is_counted_over_its_depths(megatron_rank):
    model = hybrid("-*-*/-*/-*")
    expected = [(1, False, "*"), (2, False, "*"), (1, True, "*"), (2, True, "*")]
    assert places(model) == expected
    assert assert_kv_shift(model, FREE) == (
        f"attention: {KIND} in * layers 1-2; {KIND} in MTP * layers 1-2; 32 taps"
    )
    # Megatron's numbers begin anew in each depth.
    found = [place.module.layer_number for place in attention_places(model)]
    assert found == [2, 4, 2, 2]


def test_each_kind_of_layer_is_counted_on_its_own(megatron_rank):
    model = hybrid("G-*-G-G*")
    assert places(model) == [(1, False, "G"), (1, False, "*"), (2, False, "G"), (3, False, "G"),
                             (2, False, "*")]  # fmt: skip
    layers = sorted(local_layers([model]), key=lambda layer: layer.symbol)
    assert describe(layers) == (
        f"attention: {KIND} in * layers 1-2; vanilla (LinearAttention) in G layers 1-3; 16 taps"
    )
    # What has no keys need not shift them; an attention must, and one must be there.
    assert_kv_shift(model, FREE)
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in \* layers 1-2"):
        assert_kv_shift(hybrid("G-*-G-G*", None), FREE)
    with pytest.raises(ValueError, match=r"vanilla \(LinearAttention\) in G layer 1; 0 taps"):
        assert_kv_shift(hybrid("G-"), FREE)
