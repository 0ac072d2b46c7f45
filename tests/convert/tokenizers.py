"""Small tokenizers in every form of files that a folder may have."""

import io
import json
from pathlib import Path

WORDS = [f"word{i}" for i in range(52)]
BOS, EOS, PAD = "<begin>", "<stop>", "<fill>"
TOKENS = ["<unk>", *WORDS, BOS, EOS, PAD]  # ids 53, 54 and 55
NUM_TOKENS = len(TOKENS)
IDS = {"bos_token_id": 53, "eos_token_id": 54, "pad_token_id": 55}
NAMES = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<stop>{% endfor %}"


def _write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content))


def fast(folder: Path, **settings) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the settings."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(TOKENS[:53])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS, PAD)])
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder, "tokenizer_config.json", {**base, **settings})


def names_as_text(folder: Path) -> None:
    fast(folder, **NAMES, chat_template=TEMPLATE)


def names_as_objects(folder: Path) -> None:
    fast(folder, **{k: {"__type": "AddedToken", "content": v} for k, v in NAMES.items()})
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def names_in_the_older_map(folder: Path) -> None:
    fast(folder)
    _write(folder, "special_tokens_map.json", NAMES)


def unigram(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in TOKENS[:53]], unk_id=0))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS, PAD)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES})


def vocabulary_and_merges(folder: Path) -> None:
    """Write the files of GPT-2's slow tokenizer."""
    _write(folder, "vocab.json", {token: i for i, token in enumerate(TOKENS[:53])})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    decoder = {str(i): {"content": TOKENS[i], "special": True} for i in (53, 54, 55)}
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", **NAMES}
    _write(folder, "tokenizer_config.json", {**settings, "added_tokens_decoder": decoder})


def older_added_tokens(folder: Path) -> None:
    vocabulary_and_merges(folder)
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", **NAMES}
    _write(folder, "tokenizer_config.json", settings)
    _write(folder, "added_tokens.json", {TOKENS[i]: i for i in (53, 54, 55)})


def generation_config(folder: Path) -> None:
    fast(folder)
    _write(folder, "generation_config.json", {**IDS, "temperature": 0.5})


FORMS = [
    names_as_text,
    names_as_objects,
    names_in_the_older_map,
    unigram,
    vocabulary_and_merges,
    older_added_tokens,
    generation_config,
]


def sentencepiece(folder: Path, **ids: int) -> int:
    """Write tokenizer.model alone; return its number of tokens."""
    import sentencepiece as library

    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "four five six seven"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = library.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.get_piece_size()
