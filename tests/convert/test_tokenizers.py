"""An exported folder has a tokenizer and the rows of its tokens, and stops at end of text."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvshift_megatron.convert.formats.tokenizer_files import keep_token_ids
from kvshift_megatron.convert.formats.tokenizer_vocabulary import (
    read_vocabulary,
    special_token_ids,
    vocabulary_of_files,
)
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf, read_architecture
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from kvshift_megatron.convert.vocabulary import number_of_tokens
from tests.convert import models, tokenizers
from tests.convert.test_bad_input import edit_arguments, edit_json
from tests.convert.test_round_trips import random_folder


def write(folder: Path, form) -> Path:
    folder.mkdir()
    form(folder)
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture
def checkpoint(tmp_path):
    """Write one of 64 rows whose arguments say no vocabulary, as with most tokenizers."""
    arch = models.architecture(vocab_size=64, padded_vocab_size=64)
    random_folder(tmp_path / "source", arch)
    hf_to_megatron(ToMegatron(tmp_path / "source", tmp_path / "megatron", divisible_by=64))
    (tmp_path / "megatron" / "tokenizer" / "generation_config.json").unlink(missing_ok=True)
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}
    edit_arguments(tmp_path / "megatron", **changes)
    return tmp_path / "megatron"


@pytest.mark.parametrize("form", tokenizers.FORMS, ids=lambda form: form.__name__)
def test_vocabulary_and_special_tokens_are_those_of_the_library(form, tmp_path):
    from transformers import AutoTokenizer

    folder = write(tmp_path / "tokenizer", form)
    tokens = vocabulary_of_files(folder)
    library = AutoTokenizer.from_pretrained(folder)
    assert max(tokens.values()) + 1 == len(library) == tokenizers.NUM_TOKENS
    assert tokens == library.get_vocab()
    ids = special_token_ids(folder, tokens)
    assert all(ids.get(name) == getattr(library, name) for name in tokenizers.IDS)
    assert read_vocabulary(folder) == (tokens, ids)
    kept = keep_token_ids(folder, 64, {}, {})
    assert kept == tokenizers.IDS and read(folder, "generation_config.json").items() >= kept.items()


@pytest.mark.parametrize("form", tokenizers.FORMS, ids=lambda form: form.__name__)
def test_an_export_stops_at_end_of_text(form, tmp_path, checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvshift_megatron.hf  # noqa: F401  (registers the model)

    folder = write(tmp_path / "tokenizer", form)
    megatron_to_hf(ToHF(checkpoint, tmp_path / "hf", tokenizer=folder))
    config = read(tmp_path / "hf", "config.json")
    # Rows of padding are no tokens.
    assert config["vocab_size"] == tokenizers.NUM_TOKENS
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["lm_head.weight"].shape[0] == tokenizers.NUM_TOKENS
    assert config.items() >= tokenizers.IDS.items()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.generation_config.eos_token_id == tokenizers.IDS["eos_token_id"]
    with torch.no_grad():
        # Nothing but the end of text has a large logit.
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        bias = torch.nn.Parameter(torch.zeros(tokenizers.NUM_TOKENS))
        bias[tokenizers.IDS["eos_token_id"]] = 9.0
        model.lm_head.bias = bias
        out = model.generate(torch.tensor([[3, 4]]), max_new_tokens=6, do_sample=False)
    assert out.tolist() == [[3, 4, tokenizers.IDS["eos_token_id"]]]
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    original = AutoTokenizer.from_pretrained(folder)
    assert exported.get_vocab() == original.get_vocab()
    assert exported.chat_template == original.chat_template


def test_the_templates_are_carried_both_ways(tmp_path):
    random_folder(tmp_path / "hf", models.architecture())
    tokenizers.names_as_text(tmp_path / "hf")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "back"))
    assert read(tmp_path / "back", "tokenizer_config.json")["chat_template"] == tokenizers.TEMPLATE
    more = tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja"
    assert more.read_text() == "tools"
    assert read(tmp_path / "back", "config.json").items() >= tokenizers.IDS.items()
    # A template that Megatron trained with replaces the tokenizer's.
    edit_arguments(tmp_path / "megatron", chat_template="trained with")
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "again"))
    from transformers import AutoTokenizer

    templates = AutoTokenizer.from_pretrained(tmp_path / "again").chat_template
    assert templates == {"default": "trained with", "tool_use": "tools"}


def test_the_files_that_megatron_trained_with_are_found(tmp_path, checkpoint):
    folder = write(tmp_path / "trained with", tokenizers.names_as_text)
    edit_arguments(checkpoint, tokenizer_model=str(folder))
    megatron_to_hf(ToHF(checkpoint, tmp_path / "hf"))
    config = read(tmp_path / "hf", "config.json")
    assert config["vocab_size"] == tokenizers.NUM_TOKENS
    assert config.items() >= tokenizers.IDS.items()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    # Megatron appends what the tokenizer lacks.
    edit_arguments(checkpoint, special_tokens=["<one>", "<two>", tokenizers.EOS])
    found = read_architecture(TorchDistReader(checkpoint))
    assert found.vocab_size == tokenizers.NUM_TOKENS + 2
    megatron_to_hf(ToHF(checkpoint, tmp_path / "more"))
    exported = read_vocabulary(tmp_path / "more")
    assert max(exported.tokens.values()) + 1 == tokenizers.NUM_TOKENS + 2
    assert exported.tokens["<two>"] == tokenizers.NUM_TOKENS + 1


def test_sentencepiece_alone(tmp_path, checkpoint):
    (tmp_path / "tokenizer").mkdir()
    tokens = tokenizers.sentencepiece(tmp_path / "tokenizer", pad_id=3)
    edit_arguments(checkpoint, tokenizer_model=str(tmp_path / "tokenizer" / "tokenizer.model"))
    megatron_to_hf(ToHF(checkpoint, tmp_path / "hf"))
    ids = {"vocab_size": tokens, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert read(tmp_path / "hf", "config.json").items() >= ids.items()


def test_tokens_that_a_class_adds_by_itself_count(tmp_path):
    folder = write(tmp_path / "tokenizer", tokenizers.vocabulary_and_merges)
    settings = read(folder, "tokenizer_config.json")
    for name in ("unk_token", "eos_token"):
        settings.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # GPT2Tokenizer's own <|endoftext|>, for both.
    found = read_vocabulary(folder)
    assert len(found.tokens) == tokenizers.NUM_TOKENS + 1
    assert found.ids["eos_token_id"] == tokenizers.NUM_TOKENS


def test_tiktoken_ranks_are_counted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert max(read_vocabulary(tmp_path).tokens.values()) == 2
    (tmp_path / "tokenizer.model").write_bytes(b"neither of the two")
    assert read_vocabulary(tmp_path) == ({}, {})


def test_unknown_padding_is_asked_for(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"64 rows are tokens .*--tokenizer FOLDER, or --vocab"):
        megatron_to_hf(ToHF(checkpoint, tmp_path / "hf"))
    megatron_to_hf(ToHF(checkpoint, tmp_path / "hf", vocab_size=60))
    assert read(tmp_path / "hf", "config.json")["vocab_size"] == 60
    folder = write(tmp_path / "tokenizer", tokenizers.names_as_text)
    content = read(folder, "tokenizer.json")
    like = content["added_tokens"][0]
    more = [{**like, "id": i, "content": f"<more {i}>"} for i in range(tokenizers.NUM_TOKENS, 65)]
    content["added_tokens"] += more
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has 65 tokens, but the embedding .* has 64 rows"):
        megatron_to_hf(ToHF(checkpoint, tmp_path / "no", tokenizer=folder))


def test_where_the_number_of_tokens_comes_from(tmp_path):
    def number(padded=64, given=None, **arguments):
        multiple = {"make_vocab_size_divisible_by": 64, **arguments}
        return number_of_tokens(Namespace(**multiple), given, padded, tmp_path, tmp_path)

    assert number(vocab_size=59) == 59
    assert number(vocab_size=59, given=60) == 60
    assert number(vocab_size=32, tokenizer_vocab_size=59) == 59
    assert number(make_vocab_size_divisible_by=1) == 64
    # Until 0.17 NullTokenizer had a token of its own for the end of a document.
    assert number(vocab_size=59, tokenizer_type="NullTokenizer") == 60
    newer = {"tokenizer_type": "NullTokenizer", "null_tokenizer_eod_id": None}
    assert number(vocab_size=59, **newer) == 59
    with pytest.raises(ValueError, match="--vocab-size"):
        number()


def test_ids_outside_the_vocabulary_and_odd_ones(tmp_path, capsys):
    kept = keep_token_ids(tmp_path, 10, {"eos_token_id": [3, 12], "pad_token_id": -1}, {})
    assert kept == {"eos_token_id": [3]} == read(tmp_path, "generation_config.json")
    assert "pad_token_id=-1 is left out" in capsys.readouterr().err
    edit_json(tmp_path / "generation_config.json", eos_token_id="stop")
    with pytest.raises(ValueError, match="eos_token_id='stop' must be a whole number"):
        keep_token_ids(tmp_path, 10, {}, {})


def test_the_librarys_default_ids_are_kept(tmp_path):
    """A Llama whose config.json says no ids ends texts at token 2 in Transformers."""
    random_folder(tmp_path / "hf", models.architecture(kv_shift=None), "llama")
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "back"))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert read(tmp_path / "back", "config.json").items() >= ids.items()


def test_settings_without_a_place_in_megatron_survive(tmp_path):
    random_folder(tmp_path / "hf", models.architecture())
    settings = {"kv_shift_cache_history": 7, "initializer_range": 0.1, "use_cache": False}
    edit_json(tmp_path / "hf" / "config.json", **settings)
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "back"))
    assert read(tmp_path / "back", "config.json").items() >= settings.items()
    edit_arguments(tmp_path / "megatron", hf_config_fields={"kv_shift_cache_history": -1})
    with pytest.raises(ValueError, match="kv_shift_cache_history=-1 must be"):
        megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "no"))
    edit_arguments(tmp_path / "megatron", hf_config_fields=[1])
    with pytest.raises(ValueError, match="hf_config_fields"):
        megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "no"))
