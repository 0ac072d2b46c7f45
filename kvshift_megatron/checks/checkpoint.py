"""Stop the run before it loads a checkpoint that is damaged or does not fit the model.

Megatron alone loads a checkpoint with taps into a model without, and the reverse: it ignores
unexpected keys, and answers missing keys of a state dict with a second, lenient attempt. Any other
misfit stops Megatron too, but with an error from deep inside the load.
"""

import functools
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.checkpoint_paths import RELEASE
from kvshift_megatron.checks.compare_forms import Fitted, compare_forms
from kvshift_megatron.checks.every_load import check_at_load
from kvshift_megatron.checks.shapes import compare_shapes
from kvshift_megatron.checks.stored_files import read_checkpoint
from kvshift_megatron.checks.to_load import ToLoad, checkpoint_to_load
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_in_key, tap_names, taps_among
from kvshift_megatron.utils.ranks import on_rank_0


def check_checkpoint(model: list[torch.nn.Module], kv_shift: KVShiftConfig | None) -> None:
    """Compare the checkpoint that Megatron is about to load with the built model.

    Collective over all ranks; only rank 0 reads. Do nothing if there is no checkpoint. Check files
    and taps in distributed formats only, and the other tensors in torch_dist only; state dicts of
    the older format are checked as they are loaded.

    Args:
        model: The built chunks. If they may start from a vanilla checkpoint (identity taps), their
            layers leave the taps out of the next load.
        kv_shift: What was asked for; None for the baseline model.

    Raises:
        ValueError: The checkpoint is damaged or does not fit the model; the message names it, says
            what is wrong and what to do. Raised on every rank.
    """
    for chunk in model:
        if kv_shift is None:
            # On the model itself: Megatron's wrappers pass a state dict straight to it.
            unwrap_model(chunk).register_load_state_dict_pre_hook(_refuse_taps)
    args = megatron_args()
    if args is None or _is_upcycled(args):
        return
    found = on_rank_0(lambda: checkpoint_to_load(args))
    check = functools.partial(_check_found, kv_shift=kv_shift, args=args)
    if found is not None:
        check(found, model)
    check_at_load(model, check, None if found is None else found.directory)


def _is_upcycled(args: Namespace) -> bool:
    """Return whether the model gets its weights from a dense one, into which Megatron loads.

    Megatron builds the dense model afterwards, and takes num_experts away for the time.
    """
    return bool(getattr(args, "moe_use_upcycling", False) and getattr(args, "num_experts", None))


def _check_found(
    found: ToLoad, model: list[torch.nn.Module], kv_shift: KVShiftConfig | None, args: Namespace
) -> None:
    """Compare one checkpoint with the model. Collective over all ranks; rank 0 reads."""
    directory = found.directory
    stored = on_rank_0(lambda: read_checkpoint(directory))
    if stored is None:
        return
    fitted = compare_forms(directory, stored, model, args)
    if compare_taps(directory, taps_among(stored.shapes), kv_shift, args, fitted.is_translated):
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, KVShiftSelfAttention):
                module.load_without_taps()
    if stored.content is not None:
        fits = stored._replace(shapes=fitted.shapes)
        compare_shapes(directory, fits, model, _may_be_missing(fitted, args))


def _may_be_missing(fitted: Fitted, args: Namespace) -> tuple[str, ...]:
    """Return the beginnings of the keys that Megatron may not find and keep as they are.

    All of them if the user chose such a strictness.
    """
    strictness = getattr(args, "dist_ckpt_strictness", "assume_ok_unexpected")
    strict = strictness in ("assume_ok_unexpected", "raise_unexpected", "raise_all")
    return fitted.fresh if strict else ("",)


def stored_taps(directory: Path) -> set[str] | None:
    """Return the names of the taps in a distributed checkpoint; None for another format."""
    stored = read_checkpoint(directory)
    return None if stored is None else taps_among(stored.shapes)


def compare_taps(
    directory: Path,
    stored: set[str],
    kv_shift: KVShiftConfig | None,
    args: Namespace,
    is_translated: bool = False,
) -> bool:
    """Compare a checkpoint's taps with those that were asked for.

    Args:
        directory: The checkpoint's folder.
        stored: Names of its taps.
        kv_shift: What was asked for; None for the baseline model.
        args: Megatron's.
        is_translated: Whether Megatron loads a GPT model's checkpoint into a hybrid model. It then
            loads the optimizer state even to fine-tune.

    Returns:
        Whether the checkpoint is vanilla and, as the user asked, KV shifting starts from it.

    Raises:
        ValueError: The taps differ; the message says what to do.
    """
    shown = ", ".join(sorted(stored))
    if kv_shift is None:
        if stored:
            raise ValueError(
                f"load: the checkpoint {directory} was trained with KV shifting (it holds {shown}),"
                " and the baseline model would ignore that: drop --no-kv-shift, or load another one"
            )
        return False
    wanted = {name for names in tap_names(kv_shift).values() for name in names}
    if stored == wanted:
        return False
    if stored:
        raise ValueError(
            f"load: the checkpoint {directory} holds the taps {shown}, but {kv_shift.describe()} "
            f"has {', '.join(sorted(wanted))}: set the --kv-shift-* flags that it was trained with"
        )
    if kv_shift.init != "identity":
        raise ValueError(
            f"load: the checkpoint {directory} holds no taps: to start KV shifting from vanilla "
            "weights, add --kv-shift-init identity; otherwise load a checkpoint with taps"
        )
    starts_anew = directory.name == RELEASE if is_translated else _only_weights(directory, args)
    if not (starts_anew or args.no_load_optim):
        flags = "--no-load-optim" if is_translated else "--finetune (or --no-load-optim)"
        raise ValueError(
            f"load: the optimizer state of the vanilla checkpoint {directory} has no taps: add "
            f"{flags} to start KV shifting from its weights alone"
        )
    return True


def _only_weights(directory: Path, args: Namespace) -> bool:
    """Return whether Megatron loads no optimizer state: to fine-tune, or as pretrained."""
    pretrained = getattr(args, "pretrained_checkpoint", None)
    is_pretrained = pretrained is not None and directory.is_relative_to(pretrained)
    return args.finetune or (is_pretrained and directory.parent != Path(args.load or ""))


def _refuse_taps(
    module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    taps = [key for key in state_dict if tap_in_key(key)]
    if taps:
        raise ValueError(
            f"the state dict holds taps of KV shifting ({taps[0]} and {len(taps) - 1} more), and "
            "the baseline model would ignore them: drop --no-kv-shift, or load another checkpoint"
        )
