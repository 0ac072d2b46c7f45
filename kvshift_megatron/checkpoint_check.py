"""A checkpoint with taps for a model without, or the reverse, stops the run before it is loaded.

Megatron by itself lets both through: keys that nobody asks for are ignored, and keys that are
missing from a state dict only lead to a second, lenient attempt.
"""

import re
from argparse import Namespace
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.attention import KVShiftSelfAttention
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_names

_TAP_KEY = re.compile(r"\.self_attention\.((?:alpha|beta)_(?:\d+|logit))$")


def check_checkpoint(model: list[torch.nn.Module], kv_shift: KVShiftConfig | None) -> None:
    """Compare the taps of the checkpoint that Megatron is about to load with what was asked for.

    Collective over all ranks; only rank 0 reads. Does nothing where there is no checkpoint, and
    looks at distributed formats only: state dicts of the older ones are checked as they are loaded.

    Args:
        model: the built chunks. Where a vanilla checkpoint may be loaded (identity taps), their
            layers leave the taps out of what they ask for, once.
        kv_shift: what was asked for; None for the vanilla twin.

    Raises:
        ValueError: the two do not go together; the message names the checkpoint and the remedy.
    """
    for chunk in model:
        if kv_shift is None:
            # Megatron's wrappers hand a state dict straight to the model inside them.
            unwrap_model(chunk).register_load_state_dict_pre_hook(_refuse_taps)
    args = megatron_args()
    directory = checkpoint_to_load(args) if args is not None else None
    if directory is None:
        return
    found = [stored_taps(directory) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[0] is None:
        return
    if compare_taps(directory, found[0], kv_shift, args):
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, KVShiftSelfAttention):
                module.load_without_taps()


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The folder that Megatron's arguments make it load; None where there is none."""
    for root in (getattr(args, "load", None), getattr(args, "pretrained_checkpoint", None)):
        tracker = Path(root or "/dev/null") / "latest_checkpointed_iteration.txt"
        if root is None or not tracker.is_file():
            continue
        iteration = getattr(args, "ckpt_step", None) or tracker.read_text().strip()
        name = "release" if iteration == "release" else f"iter_{int(iteration):07d}"
        return Path(root) / name
    return None


def stored_taps(directory: Path) -> set[str] | None:
    """Names of the taps in a distributed checkpoint; None for another format."""
    if not (directory / ".metadata").is_file():
        return None
    keys = torch.distributed.checkpoint.FileSystemReader(directory).read_metadata()
    matches = (_TAP_KEY.search(key) for key in keys.state_dict_metadata if "optimizer" not in key)
    return {match.group(1) for match in matches if match}


def compare_taps(
    directory: Path, stored: set[str], kv_shift: KVShiftConfig | None, args: Namespace
) -> bool:
    """Whether a vanilla checkpoint starts a shifting model, as the user asked for by name.

    Raises:
        ValueError: as `check_checkpoint`.
    """
    shown = ", ".join(sorted(stored))
    if kv_shift is None:
        if stored:
            raise ValueError(
                f"load: the checkpoint {directory} was trained with KV shifting (it holds {shown}),"
                " and the vanilla twin would drop that: drop --no-kv-shift, or load another one"
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
            f"load: the optimizer state of the vanilla checkpoint {directory} knows no taps: add "
            "--finetune (or --no-load-optim) to start KV shifting from its weights alone"
        )
    return True


def _refuse_taps(module, state_dict, prefix, *_):
    taps = [key for key in state_dict if _TAP_KEY.search(key)]
    if taps:
        raise ValueError(
            f"the state dict holds taps of KV shifting ({taps[0]} and {len(taps) - 1} more), and "
            "the vanilla twin would drop them: drop --no-kv-shift, or load another checkpoint"
        )
