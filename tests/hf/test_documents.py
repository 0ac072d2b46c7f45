"""Packed sequences give what each gives alone, however attention is told where they start."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward

from kvshift_megatron.hf import modeling_kvshift
from kvshift_megatron.hf.plan_kvshift import ShiftPlan
from tests.hf import flash
from tests.hf.models import agrees, full_logits, tiny_model, tokens
from tests.hf.releases import has_release

LENGTHS = [1, 5, 2, 4]
TOTAL = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
FLASH = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 5, "max_length_k": 5}


def collated(**options) -> dict:
    """Return what the library's collator makes of the sequences, without ids and labels."""
    features = [{"input_ids": part.tolist()} for part in tokens(1, TOTAL)[0].split(LENGTHS)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    assert torch.equal(batch.pop("input_ids"), tokens(1, TOTAL))
    batch.pop("labels")
    return batch


# How a call names the sequences -> its arguments; whether an all-ones mask comes with them.
WAYS = {
    "positions": {"position_ids": POSITIONS},
    "all arguments of flash": {"position_ids": POSITIONS, **FLASH},
    "only cu_seq_lens_q": {"cu_seq_lens_q": ENDS},
    "arguments of flash without positions": FLASH,
    "positions and cu_seq_lens_q": {"position_ids": POSITIONS, "cu_seq_lens_q": ENDS},
    "the collator": collated(),
    "the collator, for flash": collated(return_flash_attn_kwargs=True),
    "the collator, without positions": collated(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
    "the collator, with seq_idx": collated(return_flash_attn_kwargs=True, return_seq_idx=True),
    # As TRL's collator flattens a batch.
    "int32 positions": {"position_ids": POSITIONS.int()},
}


@pytest.fixture
def on_flash():
    with flash.registered() as name:
        yield name


def on(attention: str, **options):
    model = tiny_model(**options, attn_implementation="eager")
    model.config._attn_implementation = attention
    return model


def alone(model, ids):
    return torch.cat([full_logits(model, part) for part in ids.split(LENGTHS, 1)], 1)


def as_llama(model):
    """Return a Llama with the model's weights, and give the model identity taps."""
    known = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "auto_map")}
    llama = LlamaForCausalLM(LlamaConfig(**known, attn_implementation="eager")).eval()
    llama.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "alpha" not in k and "beta" not in k}
    )
    llama.config._attn_implementation = model.config._attn_implementation
    for name, parameter in model.named_parameters():
        if "alpha_" in name or "beta_" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("_1")))
    return llama


@pytest.mark.parametrize("attention", ["eager", "sdpa", flash.NAME])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_name_them(way, attention, on_flash):
    model, ids = on(attention, kv_shift_window=4), tokens(1, TOTAL)
    expected = alone(model, ids)
    assert agrees(full_logits(model, ids, **WAYS[way]), expected)
    assert not agrees(full_logits(model, ids), expected, 1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [2, 4])
def test_a_mask_that_flash_attention_drops(way, window, on_flash):
    """Check an all-ones mask, as tokenizers add one: it hides no edge from flash attention."""
    model, ids = on(flash.NAME, kv_shift_window=window), tokens(1, TOTAL)
    got = full_logits(model, ids, attention_mask=torch.ones_like(ids), **WAYS[way])
    assert flash.SEEN[-1][0] is None
    assert agrees(got, alone(model, ids))
    # A cache that is still empty changes nothing here.
    with torch.no_grad():
        got = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, **WAYS[way]).logits
    assert agrees(got, alone(model, ids))


@pytest.mark.parametrize("attention", ["eager", "sdpa", flash.NAME])
def test_attention_itself_sees_these_edges(attention, on_flash):
    """Check against Llama: with identity taps, documents are what they are for its attention."""
    model, ids = on(attention), tokens(1, TOTAL)
    llama = as_llama(model)
    ones = {"attention_mask": torch.ones_like(ids)}
    for kwargs in (WAYS["positions"], WAYS["all arguments of flash"], WAYS["positions"] | ones):
        assert agrees(full_logits(model, ids, **kwargs), full_logits(llama, ids, **kwargs), 1e-6)
    # Elsewhere than in flash attention, a mask makes one sequence of a row: for Llama too.
    masked = full_logits(llama, ids, **WAYS["positions"], **ones)
    one_row = agrees(masked, alone(llama, ids), 1e-3)
    assert one_row == (attention == flash.NAME)


def test_a_leak_is_noticed(on_flash, monkeypatch):
    model, ids = on(flash.NAME), tokens(1, TOTAL)
    expected = alone(model, ids)
    monkeypatch.setattr(modeling_kvshift, "make_plan", lambda *_: ShiftPlan())
    assert not agrees(full_logits(model, ids, **WAYS["positions"]), expected, 1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa", flash.NAME])
def test_several_rows(attention, on_flash):
    """Check rows that are packed differently; flash attention needs all its arguments for them."""
    model, ids = on(attention, kv_shift_window=3), tokens(2, 6)
    lengths = [[2, 4], [3, 1, 2]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ends = torch.tensor([0, 2, 6, 9, 10, 12])
    flat = {name: ends if "cu" in name else 4 for name in FLASH}
    expected = torch.cat(
        [
            torch.cat([full_logits(model, part) for part in row[None].split(n, 1)], 1)
            for row, n in zip(ids, lengths)
        ]
    )
    for kwargs in ({"position_ids": positions, **flat}, flat):
        assert agrees(full_logits(model, ids, **kwargs), expected)
    if attention == flash.NAME:
        with pytest.raises(ValueError, match="one row"):
            full_logits(model, ids, position_ids=positions)
        with pytest.raises(ValueError, match="one row"):
            full_logits(model, ids, cu_seq_lens_q=ends)
    else:
        assert agrees(full_logits(model, ids, position_ids=positions), expected)
    # A sequence that goes on in the next row.
    for wrong in (flat, {"position_ids": positions, **flat}):
        wrong = wrong | dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], torch.tensor([0, 2, 12]))
        with pytest.raises(ValueError, match=r"every jump|starts above 0"):
            full_logits(model, ids, **wrong)


def test_padding_at_the_end_of_a_pack(on_flash):
    """Check TRL's pad_to_multiple_of: more positions 0, each a sequence of its own."""
    ids = tokens(1, TOTAL + 3)
    positions = torch.cat([POSITIONS, torch.zeros(1, 3, dtype=torch.long)], 1)
    for attention in ("sdpa", flash.NAME):
        model = on(attention)
        got = full_logits(model, ids, position_ids=positions)
        assert agrees(got[:, :TOTAL], alone(model, ids[:, :TOTAL]))


WRONG = {
    "positions that flash attention does not see": (
        {"position_ids": torch.tensor([[0, 1, 2, 5, 6, 0, 1, 2, 3, 4, 5, 6]])},
        "starts above 0",
    ),
    "the same, said to be meant": (
        {
            "position_ids": torch.tensor([[0, 1, 2, 5, 6, 0, 1, 2, 3, 4, 5, 6]]),
            "starts_anywhere": True,
        },
        "every jump",
    ),
    "other edges in cu_seq_lens_q": (
        {"position_ids": POSITIONS, "cu_seq_lens_q": torch.tensor([0, 1, 5, 8, 12])},
        "every jump",
    ),
    "positions that go on": (
        {"position_ids": torch.arange(TOTAL)[None], **FLASH},
        "every jump",
    ),
    "too few tokens": (FLASH | {"cu_seq_lens_q": ENDS[:-1], "cu_seq_lens_k": ENDS[:-1]}, "12 tok"),
    "too many tokens": ({"position_ids": POSITIONS, "cu_seq_lens_q": ENDS * 2}, "12 tokens"),
    "out of order": (FLASH | {"position_ids": POSITIONS, "cu_seq_lens_q": ENDS.flip(0)}, "same"),
    "other keys": (FLASH | {"cu_seq_lens_k": torch.tensor([0, 1, 7, 8, 12]).int()}, "the same"),
    "fewer keys": (FLASH | {"cu_seq_lens_k": ENDS[1:]}, "4 entries"),
    "seq_idx alone": (collated(return_position_ids=False, return_seq_idx=True), "seq_idx"),
    "another seq_idx": (collated() | {"seq_idx": torch.zeros(1, TOTAL).int()}, "other packed"),
    "a mask with padding": (
        FLASH | {"attention_mask": torch.ones(1, TOTAL).long().index_fill(1, torch.tensor(0), 0)},
        "leave out the attention_mask",
    ),
    "numbers of documents in a mask": (
        {"attention_mask": torch.tensor([[1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 0]])},
        "other values than 0 and 1",
    ),
    "positions of another length": ({"position_ids": POSITIONS[:, 1:]}, "has the shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_leaves_the_edges_open(wrong, on_flash):
    kwargs, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        full_logits(on(flash.NAME), tokens(1, TOTAL), **kwargs)


def test_packed_sequences_after_a_cache(on_flash):
    for attention in ("sdpa", flash.NAME):
        model, cache = on(attention), DynamicCache()
        with torch.no_grad():
            model(tokens(1, 3), past_key_values=cache)
        with pytest.raises(ValueError, match="empty cache"):
            model(tokens(1, TOTAL), past_key_values=cache, **FLASH)


def test_in_one_graph():
    """Check torch.compile: packed sequences without reading back, and a refusal by assertion."""
    model, ids = on("sdpa", kv_shift_window=3), tokens(1, TOTAL)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for way in ("positions", "all arguments of flash", "only cu_seq_lens_q"):
        assert agrees(full_logits(compiled, ids, **WAYS[way]), alone(model, ids)), way
    with pytest.raises(RuntimeError, match="starts above 0"):
        full_logits(compiled, ids, position_ids=POSITIONS + 1)
    with pytest.raises(RuntimeError, match="every jump"):
        wrong = torch.tensor([0, 1, 5, 8, 12])
        full_logits(compiled, ids, position_ids=POSITIONS, cu_seq_lens_q=wrong)


@pytest.mark.skipif(not has_release("5.24"), reason="the integration's inner names are of 5.24")
def test_the_stand_in_is_the_library_s_integration(monkeypatch):
    """Check the stand-in against the library's own choice of kernel, over the same kernels."""
    from transformers import modeling_flash_attention_utils as utils

    def kernel(q, k, v, softmax_scale, **kwargs):
        return torch.stack([flash.attend(*row, softmax_scale) for row in zip(q, k, v)])

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, **kwargs):
        return flash.attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def chosen(**kwargs):
        return {"softmax_scale": kwargs["softmax_scale"]}

    functions = (kernel, packed, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(
        utils, "lazy_import_flash_attention", lambda *_: (functions, (chosen, chosen))
    )
    ids = tokens(1, TOTAL)
    ones = torch.ones_like(ids)
    padded = ones.index_fill(1, torch.tensor([0, 1, 11]), 0)
    cases = [{}, {"attention_mask": padded}, *WAYS.values()]
    cases += [{"attention_mask": ones, **way} for way in WAYS.values()]
    results = []
    for function in (flash.stand_in_for_flash, flash_attention_forward):
        with flash.registered(function) as name:
            llama = as_llama(on(name))
            results.append([full_logits(llama, ids, **case) for case in cases])
    for case, ours, theirs in zip(cases, *results):
        real = case.get("attention_mask", ones).bool()
        assert agrees(ours[real], theirs[real], 1e-6), case
