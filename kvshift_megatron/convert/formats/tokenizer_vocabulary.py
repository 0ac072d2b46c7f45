"""Read the vocabulary and the special tokens of a tokenizer, in any form of files.

Transformers reads what it can, as in training: its tokenizer classes add tokens of their own. The
rest is read from the files alone. No code from the folder is run.
"""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from kvshift_megatron.convert.formats.safetensors_files import read_json

_TOKENS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}
# tokenizer.model of tiktoken: a token in base64 and its rank, per line.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


class Vocabulary(NamedTuple):
    """Token -> id, with added tokens, and the ids of those of bos, eos and pad that there are.

    Tokens are strings, and bytes of a tiktoken model. Both are empty if no known file is there.
    """

    tokens: dict[Any, int]
    ids: dict[str, int]


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the tokenizer's files in a folder.

    Raises:
        ValueError: A file is damaged; the message names it.
    """
    tokens = vocabulary_of_files(folder)
    ids = special_token_ids(folder, tokens)
    if (folder / "tokenizer_config.json").is_file():
        # Any error means that the library cannot read this folder.
        with contextlib.suppress(Exception):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            read = {name: getattr(tokenizer, name) for name in _TOKENS}
            known = {name: i for name, i in read.items() if isinstance(i, int)}
            return Vocabulary({**tokens, **tokenizer.get_vocab()}, known)
    return Vocabulary(tokens, ids)


def vocabulary_of_files(folder: Path) -> dict[Any, int]:
    """Return the tokens without the help of Transformers.

    Raises:
        ValueError: A file is damaged; the message names it.
    """
    tokens: dict[Any, Any] = {}  # ids are checked below
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        tokens.update(_of_fast_model(content.get("model")))
        for added in _objects(content.get("added_tokens")):
            tokens[added.get("content")] = added.get("id")
    elif (folder / "vocab.json").is_file():
        tokens = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        tokens = {line: i for i, line in enumerate(lines)}
    elif (folder / "tokenizer.model").is_file():
        tokens = _of_model_file(folder / "tokenizer.model")
    if not tokens:
        return {}  # added tokens alone are not a vocabulary
    decoder = _settings(folder).get("added_tokens_decoder")
    if isinstance(decoder, dict):  # newer than added_tokens.json
        for i, added in decoder.items():
            if isinstance(added, dict) and i.isdecimal():
                tokens[added.get("content")] = int(i)
    elif (folder / "added_tokens.json").is_file():
        tokens |= read_json(folder / "added_tokens.json")
    for token, i in tokens.items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{folder}: the tokenizer's token {token!r} has the id {i!r}")
    return tokens


def special_token_ids(folder: Path, tokens: dict[Any, int]) -> dict[str, int]:
    """Return the ids of those of bos, eos and pad that the files name.

    Args:
        folder: The tokenizer's files.
        tokens: Its vocabulary.
    """
    map_file = folder / "special_tokens_map.json"
    older = read_json(map_file) if map_file.is_file() else {}
    settings = _settings(folder)
    ids = _of_sentencepiece(folder / "tokenizer.model")
    for name, token_name in _TOKENS.items():
        token = settings.get(token_name) or older.get(token_name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token in tokens:
            ids[name] = tokens[token]
    return ids


def _settings(folder: Path) -> dict:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _objects(values: Any) -> list[dict]:
    return [value for value in values or [] if isinstance(value, dict)]


def _of_fast_model(model: Any) -> dict[Any, int]:
    entries = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(entries, dict):
        return dict(entries)
    if isinstance(entries, list):  # Unigram: token and score, in order
        return {entry[0]: i for i, entry in enumerate(entries) if isinstance(entry, list) and entry}
    return {}


def _of_model_file(file: Path) -> dict[Any, int]:
    content = file.read_bytes()
    lines = content.splitlines()
    if lines and all(_TIKTOKEN.fullmatch(line) for line in lines):
        return {token: int(rank) for token, rank in (line.split(b" ") for line in lines)}
    model = _sentencepiece(content)
    return {} if model is None else {model.id_to_piece(i): i for i in range(model.get_piece_size())}


def _sentencepiece(content: bytes) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return None
    model = SentencePieceProcessor()
    # Its error for a file of another kind is a RuntimeError.
    with contextlib.suppress(RuntimeError):
        if model.LoadFromSerializedProto(content):
            return model
    return None


def _of_sentencepiece(file: Path) -> dict[str, int]:
    """Return the ids that a sentencepiece model has for the special tokens."""
    model = _sentencepiece(file.read_bytes()) if file.is_file() else None
    if model is None:
        return {}
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id()}
    ids["pad_token_id"] = model.pad_id()
    return {name: i for name, i in ids.items() if i >= 0}
