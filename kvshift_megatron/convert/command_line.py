"""The command line of kvshift-convert.

    kvshift-convert megatron-to-hf CHECKPOINT FOLDER
    kvshift-convert hf-to-megatron FOLDER CHECKPOINT
    kvshift-convert refresh-code FOLDER

Conversion runs on a CPU, in one process, with one tensor in memory at a time, whatever parallel
layout saved the checkpoint. The output appears under its name only when it is complete. If
something cannot be converted, the exit code is 1 and standard error gets one sentence.

torch is imported only to convert, so that help and usage errors appear at once.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvshift_megatron.arguments import add_kv_shift_args, kv_shift_config_from_args
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.layouts import LAYOUTS, LAYOUTS_WITH_TAPS

if TYPE_CHECKING:
    import torch

# Choice -> name in torch.
_DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
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
    commands = parser.add_subparsers(
        required=True, metavar="megatron-to-hf | hf-to-megatron | refresh-code"
    )
    _add_to_hf(
        commands.add_parser("megatron-to-hf", help="convert Megatron's torch_dist to safetensors")
    )
    _add_to_megatron(
        commands.add_parser("hf-to-megatron", help="convert safetensors to Megatron's torch_dist")
    )
    _add_refresh(
        commands.add_parser(
            "refresh-code",
            help="update the model code in a folder that an older version exported",
        )
    )
    return parser


def _add_common(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help=target)
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="keep",
        help="dtype of the output (default: keep, as stored)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits of source and target before the target gets its name (builds both "
        "models, one at a time)",
    )


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "Megatron's --save folder, or one iteration in it", "the folder to create")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="layout of the folder (default: kvshift; for a model without taps, the one that fits)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="number of tokens that exist; padding rows of the embedding are removed (default: the "
        "checkpoint's, or the tokenizer's)",
    )
    parser.add_argument(
        "--kv-shift-variant",
        choices=("free", "gate", "clamp"),
        help="what the taps mean, for checkpoints that do not say it",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        help="largest size of one safetensors file (default: 5GB)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with the tokenizer's files (default: those in the checkpoint, or those that "
        "the model was trained with)",
    )
    parser.add_argument(
        "--norm-head",
        choices=("fold", "pad"),
        default="fold",
        help="for baichuan_m1, whose clients scale the rows of lm_head to length one. fold: refuse "
        "if that would change the logits. pad: widen the model so that the logits stay (default: "
        "fold)",
    )
    parser.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="do not compare the checkpoint's files with the hashes that were written when they "
        "were saved",
    )
    parser.set_defaults(convert=_to_hf)


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    _add_common(
        parser,
        "folder with config.json and safetensors",
        "the folder to create, for Megatron's --load",
    )
    add_kv_shift_args(parser)
    parser.epilog = (
        "The flags of KV-shifting attention are for models without taps. Here the default of "
        "--kv-shift-init is identity: the model computes what it did before."
    )
    parser.add_argument(
        "--no-kv-shift", action="store_true", help="add no taps to a model without taps"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="the same as Megatron's flag (default: 128)",
    )
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="the vocabulary is padded to a multiple of the flag above times this, as Megatron "
        "does; Megatron can load the weights at any size (default: 1)",
    )
    parser.set_defaults(convert=_to_megatron)


def _add_refresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="the exported folder; its weights and settings stay"
    )
    parser.set_defaults(convert=_refresh)


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
        overwrite=options.overwrite,
        progress=True,
    )
    hf_to_megatron(job, _verifier(options, None, options.source))
    print(f"wrote {options.target}")


def _dtype(choice: str) -> "torch.dtype | None":
    import torch

    name = _DTYPES[choice]
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


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B?)", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: use, for example, 5GB, 500MB or a number of bytes"
        )
    unit = match[2].upper().removesuffix("B")
    return int(match[1]) * 1000 ** " KMGT".index(unit or " ")
