"""The arguments of each command of kvshift-convert."""

import argparse
import re
from pathlib import Path

from kvshift_megatron.arguments import add_kv_shift_args
from kvshift_megatron.checks.model_forms import FORMS
from kvshift_megatron.convert.layouts import LAYOUTS

# Name of a dtype in the arguments -> in torch.
DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _add_common(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help=target)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="dtype of the output (default: keep, as stored)",
    )
    _add_overwrite(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits of source and target before the target gets its name (builds both "
        "models, one at a time)",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")


def _add_no_verify_integrity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="do not compare the checkpoint's files with the hashes that were written when they "
        "were saved",
    )


def add_to_hf(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megatron-to-hf`."""
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
    _add_no_verify_integrity(parser)


def add_to_megatron(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hf-to-megatron`."""
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
    parser.add_argument(
        "--model-form",
        choices=FORMS,
        default="gpt",
        help="the model to load it with: Megatron's GPT model (--num-layers), or its hybrid model "
        "with the same layers (--hybrid-layer-pattern) (default: gpt)",
    )


def add_change_form(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `change-form`."""
    parser.add_argument(
        "source", type=Path, help="Megatron's --save folder, or one iteration in it"
    )
    parser.add_argument("target", type=Path, help="the folder to create, for Megatron's --load")
    parser.add_argument(
        "--model-form",
        choices=FORMS,
        required=True,
        help="of the target: gpt (--num-layers), or hybrid (--hybrid-layer-pattern)",
    )
    _add_overwrite(parser)
    _add_no_verify_integrity(parser)


def add_refresh(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `refresh-code`."""
    parser.add_argument(
        "folder", type=Path, help="the exported folder; its weights and settings stay"
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B?)", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: use, for example, 5GB, 500MB or a number of bytes"
        )
    unit = match[2].upper().removesuffix("B")
    return int(match[1]) * 1000 ** " KMGT".index(unit or " ")
