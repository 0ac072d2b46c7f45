"""Programs of torch.export, with and without a cache, give what the model gives."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.integrations.executorch import (
    TorchExportableModuleWithStaticCache,
    export_with_dynamic_cache,
)

from kvshift_megatron.hf.plan_kvshift import real_places
from tests.hf.models import agrees, full_logits, tiny_model, tokens
from tests.hf.releases import since

pytestmark = pytest.mark.slow

MASK = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])


def operators(program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_places_without_a_sort():
    real = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    real[0], real[1] = True, False
    places, count = real_places(real)
    assert torch.equal(places, torch.argsort((~real).to(torch.int8), dim=-1, stable=True))
    assert torch.equal(count, real.cumsum(-1))


@torch.no_grad()
def test_with_a_mask_and_without_a_cache():
    model, ids = tiny_model(kv_shift_window=3, num_hidden_layers=1), tokens(2, 6)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    kwargs = {"attention_mask": MASK, "position_ids": positions, "use_cache": False}
    program = torch.export.export(model, (ids,), kwargs, strict=False)
    assert not {name for name in operators(program) if "sort" in name}
    # Another mask than the one that it was exported with.
    mask = MASK.flip(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = program.module()(ids, **kwargs | {"attention_mask": mask, "position_ids": positions})
    expected = full_logits(model, ids, attention_mask=mask, position_ids=positions)
    assert agrees(got.logits[mask.bool()], expected[mask.bool()])


@since("5.4", "counts tokens in its caches")
@torch.no_grad()
def test_a_static_cache_as_executorch_has_it():
    model, ids = tiny_model(kv_shift_window=3, num_hidden_layers=2), tokens(1, 7)
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    recipe = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=7)
    example = {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])}
    step = torch.export.export(recipe, (), example, strict=False).module()

    def run(ids, start=0):
        return torch.cat(
            [
                step(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i]))
                for i in range(start, ids.shape[1])
            ],
            1,
        )

    assert agrees(run(ids), full_logits(model, ids))
    # Another sequence in the same program, and going back to a place in the middle.
    other = tokens(1, 7, 5)
    assert agrees(run(other), full_logits(model, other))
    turn = torch.cat([other[:, :4], ids[:, 4:]], 1)
    assert agrees(run(turn, 4), full_logits(model, turn)[:, 4:])


@since("5.24", "calls it cache")
@torch.no_grad()
def test_a_dynamic_cache_as_executorch_has_it():
    """Check a program for the prompt, and one for the next tokens, with padding on the left."""
    model, ids = tiny_model(kv_shift_window=3, num_hidden_layers=1), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    prompt = export_with_dynamic_cache(model, ids[:, :6], mask[:, :6]).module()
    first = prompt(
        input_ids=ids[:, :6],
        attention_mask=mask[:, :6],
        cache=DynamicCache(config=model.config),
        use_cache=True,
    )
    example = {"input_ids": ids[:, 6:], "attention_mask": mask, "cache": first.cache}
    step = torch.export.export(model, (), example | {"use_cache": True}, strict=False).module()
    second = step(**example, use_cache=True)
    expected = full_logits(model, ids, attention_mask=mask)
    got = torch.cat([first.logits, second.logits], 1)
    assert agrees(got[mask.bool()], expected[mask.bool()])
    with pytest.raises(ValueError, match="position_ids cannot be exported"):
        positions = torch.tensor([[6, 7]])
        torch.export.export(model, (), example | {"position_ids": positions}, strict=False)
    # Outside of a program such a cache is one that another model has filled.
    with pytest.raises(ValueError, match="filled without the unshifted"):
        model(ids[:, 6:], past_key_values=first.cache)
