"""Copy tokenizer files along with the weights, and keep the ids of special tokens."""

import json
import shutil
from pathlib import Path

from kvshift_megatron.convert.formats.safetensors_files import read_json

NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# In a Megatron checkpoint, for --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER.
SUBFOLDER = "tokenizer"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_tokenizer(folder: Path) -> bool:
    """Check whether the folder holds one of the known files."""
    return any((folder / name).is_file() for name in NAMES)


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the known files; create the target folder if there is something to copy."""
    for name in NAMES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def carry_token_ids(config: dict, folder: Path) -> None:
    """Store the special tokens' ids of a config.json, unless generation_config.json exists."""
    file = folder / "generation_config.json"
    ids = {name: config[name] for name in _IDS if config.get(name) is not None}
    if ids and not file.is_file():
        folder.mkdir(exist_ok=True)
        file.write_text(json.dumps(ids, indent=2) + "\n")


def token_ids(folder: Path) -> dict:
    """Read the ids for a config.json; None for unknown ones (Llama's defaults would be guesses)."""
    file = folder / "generation_config.json"
    known = read_json(file) if file.is_file() else {}
    return {name: known.get(name) for name in _IDS}
