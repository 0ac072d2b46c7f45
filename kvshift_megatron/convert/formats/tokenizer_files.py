"""Copy tokenizer files along with the weights, and keep the ids of special tokens."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kvshift_megatron.convert.formats.safetensors_files import read_json
from kvshift_megatron.convert.formats.tokenizer_vocabulary import read_vocabulary
from kvshift_megatron.convert.library_defaults import stated_token_ids

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
NAMES = (*_VOCABULARIES, _TEMPLATE, "chat_template.json", _GENERATION)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
# In a Megatron checkpoint, for --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER.
SUBFOLDER = "tokenizer"


def has_tokenizer(folder: Path) -> bool:
    """Check whether the folder holds one of the known files with tokens."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the known files; create the target folder if there is something to copy."""
    names = [name for name in NAMES if (source / name).is_file()]
    names += sorted(
        str(file.relative_to(source)) for file in source.glob(f"{_MORE_TEMPLATES}/*.jinja")
    )
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def keep_trained_settings(folder: Path, arguments: Namespace) -> None:
    """Store what Megatron's arguments change in a tokenizer: chat template and special tokens."""
    template = getattr(arguments, "chat_template", None)
    if isinstance(template, str) and template:
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")
    special, file = getattr(arguments, "special_tokens", None), folder / "tokenizer_config.json"
    if special and file.is_file():
        settings = read_json(file)
        field = "extra_special_tokens"  # its name since Transformers 5
        field = field if isinstance(settings.get(field), list) else "additional_special_tokens"
        # Transformers gives ids to those without, in this order, as Megatron does.
        tokens = settings.get(field) or []
        settings[field] = tokens + [token for token in special if token not in tokens]
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def keep_token_ids(
    folder: Path, vocab_size: int, stated: dict[str, Any], otherwise: dict[str, Any]
) -> dict[str, Any]:
    """Store the ids of bos, eos and pad in generation_config.json, so that generation stops.

    Each is what generation_config.json says, or else `stated`, the tokenizer's or `otherwise`.

    Args:
        folder: Holds the tokenizer's files, if any; created if there are ids.
        vocab_size: Ids outside of it are left out, with a note on standard error.
        stated, otherwise: Ids from elsewhere.

    Returns:
        The ids.

    Raises:
        ValueError: A file is damaged, or an id is not a whole number; the message names the file.
    """
    file = folder / _GENERATION
    before = read_json(file) if file.is_file() else {}
    known = {**otherwise, **read_vocabulary(folder).ids, **stated, **stated_token_ids(before)}
    ids = {}
    for name, value in known.items():
        listed = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
            raise ValueError(f"{file}: {name}={value!r} must be a whole number, or a list of them")
        inside = [i for i in listed if 0 <= i < vocab_size]
        if inside != listed:
            print(
                f"kvshift-convert: {name}={value} is left out: the model has the tokens 0 to "
                f"{vocab_size - 1}",
                file=sys.stderr,
            )
        if inside:
            ids[name] = inside if isinstance(value, list) else value
    after = {name: value for name, value in before.items() if name in ids or name not in known}
    after |= ids
    if after != before:
        folder.mkdir(exist_ok=True)
        file.write_text(json.dumps(after, indent=2) + "\n")
    return ids
