"""Give a folder that an older version exported this version's model code."""

import json
from pathlib import Path

from kvshift_megatron.convert.config_fields import check_config
from kvshift_megatron.convert.formats.safetensors_files import read_json
from kvshift_megatron.utils import atomic_files


def refresh_code(folder: Path) -> list[Path]:
    """Replace the model's code in an exported folder; keep its weights and settings.

    Args:
        folder: Holds the config.json of a KV-shifting Llama.

    Returns:
        The files written.

    Raises:
        ValueError: It is not such a folder, or this version does not support one of its settings;
            nothing is written.
    """
    from kvshift_megatron.hf import AUTO_MAP, KVShiftLlamaConfig, write_code

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported folder: it has no config.json")
    fields = read_json(file)
    model_type = fields.get("model_type")
    if model_type != KVShiftLlamaConfig.model_type:
        raise ValueError(
            f"{file}: model_type={model_type!r} has no code in this package: expected "
            f"{KVShiftLlamaConfig.model_type!r}"
        )
    check_config(fields, file)
    try:
        KVShiftLlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    written = write_code(folder)
    if fields.get("auto_map") != AUTO_MAP:
        text = json.dumps(fields | {"auto_map": AUTO_MAP}, indent=2) + "\n"
        atomic_files.replace(file, lambda path: path.write_text(text))
        written.append(file)
    return written
