"""Which files and folders a run reads, by the names of Megatron's flags."""

import os
from argparse import Namespace
from pathlib import Path

# Megatron adds these endings to a data path.
_OF_DATA = ("", ".bin", ".idx")
_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_FILES = ("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path")
_TOKENIZER = ("tokenizer_model", "vocab_file", "merge_file", "heterogeneous_layers_config_path")


def files_read(args: Namespace) -> list[Path]:
    """Return what a run reads and must not write into; not all of it need exist.

    A --load folder counts with --finetune only: otherwise a run goes on in it.

    Args:
        args: Megatron's. Settings that it lacks count as not given.
    """
    folders = ["pretrained_checkpoint", *(["load"] if getattr(args, "finetune", False) else [])]
    paths = [*_given(args, *folders, *_FILES, *_TOKENIZER)]
    # Weights of a blend, such as 0.3, are between the paths.
    paths += [path + ending for path in _given(args, *_DATA) for ending in _OF_DATA]
    return [Path(path) for path in paths]


def _given(args: Namespace, *names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        value = getattr(args, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        found += [os.fspath(one) for one in values if isinstance(one, str | os.PathLike) and one]
    return found
