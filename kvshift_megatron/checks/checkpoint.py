"""Stop the run before it loads a checkpoint that is damaged or does not fit the model.

Megatron alone loads a checkpoint with taps into a model without, and the reverse: it ignores
unexpected keys, and answers missing keys of a state dict with a second, lenient attempt. Any other
misfit stops Megatron too, but with an error from deep inside the load.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.checkpoint_paths import iteration_folder, read_tracker
from kvshift_megatron.checks.shapes import compare_shapes
from kvshift_megatron.checks.stored_files import StoredModel, read_checkpoint
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_in_key, tap_names, taps_among


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
    if args is None:
        return
    directory = checkpoint_to_load(args)
    if directory is None:
        return
    stored = _read_on_rank_0(directory)
    if stored is None:
        return
    if compare_taps(directory, taps_among(stored.shapes), kv_shift, args):
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, KVShiftSelfAttention):
                module.load_without_taps()
    if stored.content is not None:
        compare_shapes(directory, stored, model, _may_lack_keys(args))


def _read_on_rank_0(directory: Path) -> StoredModel | None:
    """Run `read_checkpoint` on rank 0, and return or raise its outcome on every rank."""
    found: list[StoredModel | str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [read_checkpoint(directory)]
        except ValueError as error:
            found = [str(error)]
    torch.distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


def _may_lack_keys(args: Namespace) -> bool:
    """Return whether Megatron may load a checkpoint that lacks parts of the model.

    It may if the user chose such a strictness, or if the model is hybrid: Megatron can load that
    from a GPT checkpoint, whose layers have other keys.
    """
    strictness = getattr(args, "dist_ckpt_strictness", "assume_ok_unexpected")
    strict = strictness in ("assume_ok_unexpected", "raise_unexpected", "raise_all")
    hybrid = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return not strict or any(getattr(args, name, None) for name in hybrid)


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Return the folder that Megatron's arguments make it load, or None."""
    roots = (getattr(args, "load", None), getattr(args, "pretrained_checkpoint", None))
    for root in (Path(root) for root in roots if root is not None):
        latest = read_tracker(root)
        if latest is not None:
            return iteration_folder(root, getattr(args, "ckpt_step", None) or latest)
    return None


def stored_taps(directory: Path) -> set[str] | None:
    """Return the names of the taps in a distributed checkpoint; None for another format."""
    stored = read_checkpoint(directory)
    return None if stored is None else taps_among(stored.shapes)


def compare_taps(
    directory: Path, stored: set[str], kv_shift: KVShiftConfig | None, args: Namespace
) -> bool:
    """Compare a checkpoint's taps with those that were asked for.

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
    is_load = args.load is not None and Path(args.load) == directory.parent
    if is_load and not (args.finetune or args.no_load_optim):
        raise ValueError(
            f"load: the optimizer state of the vanilla checkpoint {directory} has no taps: add "
            "--finetune (or --no-load-optim) to start KV shifting from its weights alone"
        )
    return True


def _refuse_taps(
    module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    taps = [key for key in state_dict if tap_in_key(key)]
    if taps:
        raise ValueError(
            f"the state dict holds taps of KV shifting ({taps[0]} and {len(taps) - 1} more), and "
            "the baseline model would ignore them: drop --no-kv-shift, or load another checkpoint"
        )
