"""The command line of kvshift-convert.

    kvshift-convert megatron-to-hf CHECKPOINT FOLDER
    kvshift-convert hf-to-megatron FOLDER CHECKPOINT
    kvshift-convert change-form CHECKPOINT CHECKPOINT --model-form hybrid
    kvshift-convert refresh-code FOLDER

Conversion runs on a CPU, in one process, with one tensor in memory at a time, whatever parallel
layout saved the checkpoint. The output appears under its name only when it is complete. If
something cannot be converted, the exit code is 1 and standard error gets one sentence.

torch is imported only to convert, so that help and usage errors appear at once.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvshift_megatron.arguments import kv_shift_config_from_args
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.command_flags import (
    DTYPES,
    add_change_form,
    add_refresh,
    add_to_hf,
    add_to_megatron,
)
from kvshift_megatron.convert.layouts import LAYOUTS_WITH_TAPS

if TYPE_CHECKING:
    import torch

_LARGEST_MULTIPLE = 10**6  # rows that the vocabulary is padded to


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(argv)
    try:
        options.convert(options)
    except (ValueError, OSError, ImportError) as error:
        # One line that any stream can print, whatever the names are that it quotes.
        line = " ".join(str(error).splitlines()).encode(errors="backslashreplace").decode()
        print(f"kvshift-convert: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kvshift-convert: interrupted; nothing was written", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvshift-convert",
        description="Convert checkpoints of KV-shifting models between Megatron and Hugging Face, "
        "on a CPU, one tensor in memory at a time.",
    )
    kinds = {
        "megatron-to-hf": (add_to_hf, _to_hf, "convert Megatron's torch_dist to safetensors"),
        "hf-to-megatron": (
            add_to_megatron,
            _to_megatron,
            "convert safetensors to Megatron's torch_dist",
        ),
        "change-form": (
            add_change_form,
            _change_form,
            "convert a training checkpoint between Megatron's GPT model and its hybrid model",
        ),
        "refresh-code": (
            add_refresh,
            _refresh,
            "update the model code in a folder that an older version exported",
        ),
    }
    commands = parser.add_subparsers(required=True, metavar=" | ".join(kinds))
    for name, (add_flags, convert, about) in kinds.items():
        command = commands.add_parser(name, help=about)
        add_flags(command)
        command.set_defaults(convert=convert)
    return parser


def _change_form(options: argparse.Namespace) -> None:
    from kvshift_megatron.convert.change_form import ChangeForm, change_form

    job = ChangeForm(
        source=options.source,
        target=options.target,
        form=options.model_form,
        overwrite=options.overwrite,
        progress=True,
        verify_integrity=options.verify_integrity,
    )
    pattern = change_form(job)
    flags = {"gpt": f"--num-layers {len(pattern) // 2}"}
    flags["hybrid"] = f"--hybrid-layer-pattern '{pattern}'"
    print(f"wrote {options.target}: go on with {flags[options.model_form]}")


def _refresh(options: argparse.Namespace) -> None:
    from kvshift_megatron.convert.refresh_code import refresh_code

    for path in refresh_code(options.folder):
        print(f"wrote {path}")


def _to_hf(options: argparse.Namespace) -> None:
    from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf

    job = ToHF(
        source=options.source,
        target=options.target,
        layout=options.layout,
        dtype=_dtype(options.dtype),
        vocab_size=options.vocab_size,
        variant=options.kv_shift_variant,
        max_shard_size=options.max_shard_size,
        tokenizer=options.tokenizer,
        norm_head=options.norm_head,
        overwrite=options.overwrite,
        progress=True,
        verify_integrity=options.verify_integrity,
    )
    megatron_to_hf(job, _verifier(options, options.source, None))
    print(f"wrote {options.target}")


def _to_megatron(options: argparse.Namespace) -> None:
    from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron

    for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"):
        if not 1 <= getattr(options, name) <= _LARGEST_MULTIPLE:
            raise ValueError(f"--{name.replace('_', '-')} must be from 1 to {_LARGEST_MULTIPLE}")
    job = ToMegatron(
        source=options.source,
        target=options.target,
        dtype=_dtype(options.dtype),
        kv_shift=_taps(options),
        divisible_by=options.make_vocab_size_divisible_by * options.tensor_model_parallel_size,
        form=options.model_form,
        overwrite=options.overwrite,
        progress=True,
    )
    hf_to_megatron(job, _verifier(options, None, options.source))
    print(f"wrote {options.target}")


def _dtype(choice: str) -> "torch.dtype | None":
    import torch

    name = DTYPES[choice]
    return None if name is None else getattr(torch, name)


def _taps(options: argparse.Namespace) -> KVShiftConfig | None:
    """Return the taps for a model without taps: identity, unless the flags say otherwise."""
    from kvshift_megatron.convert.formats.safetensors_files import read_json
    from kvshift_megatron.convert.from_hf_config import layout_of

    names = [name for name in vars(options) if "kv_shift" in name]
    given = [name for name in names if getattr(options, name) not in (None, False)]
    file = options.source / "config.json"
    if given and file.is_file() and layout_of(read_json(file), file) in LAYOUTS_WITH_TAPS:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is for models without taps, but {options.source} has "
            "taps: drop the flag"
        )
    if not options.no_kv_shift and options.kv_shift_init is None:
        options.kv_shift_init = "identity"
    return kv_shift_config_from_args(options)


def _verifier(
    options: argparse.Namespace, megatron: Path | None, hf: Path | None
) -> Callable[[Path], None] | None:
    """Return the check for `--verify`, or None; the side that is None is the one written."""
    if not options.verify:
        return None
    from kvshift_megatron.convert.verify import verify

    def check(written: Path) -> None:
        verify(
            megatron or written,
            hf or written,
            vocab_size=getattr(options, "vocab_size", None),
            variant=getattr(options, "kv_shift_variant", None) if megatron else None,
            tokenizer=getattr(options, "tokenizer", None),
        )

    return check
