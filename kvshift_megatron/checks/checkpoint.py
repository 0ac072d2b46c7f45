"""A checkpoint that does not fit the model, or is not whole, stops the run before it is loaded.

Megatron by itself loads a checkpoint with taps into a model without, and the reverse: keys that
nobody asks for are ignored, and keys that are missing from a state dict only lead to a second,
lenient attempt. What else does not fit stops it too, but as an error from deep inside the load.
"""

from argparse import Namespace
from pathlib import Path

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
    """Compare the checkpoint that Megatron is about to load with the model that was built.

    Collective over all ranks; only rank 0 reads. Does nothing where there is no checkpoint. Looks
    at the files and taps of distributed formats only, and at the other tensors of torch_dist only:
    state dicts of the older format are checked as they are loaded.

    Args:
        model: the built chunks. Where a vanilla checkpoint may be loaded (identity taps), their
            layers leave the taps out of what they ask for, once.
        kv_shift: what was asked for; None for the vanilla twin.

    Raises:
        ValueError: the two do not go together, or the checkpoint is not whole; the message names
            the checkpoint, what is wrong with it and the remedy. Raised on every rank alike.
    """
    for chunk in model:
        if kv_shift is None:
            # Megatron's wrappers hand a state dict straight to the model inside them.
            unwrap_model(chunk).register_load_state_dict_pre_hook(_refuse_taps)
    args = megatron_args()
    directory = checkpoint_to_load(args) if args is not None else None
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
    """`read_checkpoint` of rank 0, its refusal included, on every rank."""
    found = [None]
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
    """Whether Megatron may load a checkpoint that lacks parts of the model.

    By a strictness that the user chose; or because it asks a GPT's checkpoint for the layers of a
    hybrid model under other keys.
    """
    strictness = getattr(args, "dist_ckpt_strictness", "assume_ok_unexpected")
    strict = strictness in ("assume_ok_unexpected", "raise_unexpected", "raise_all")
    hybrid = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return not strict or any(getattr(args, name, None) for name in hybrid)


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The folder that Megatron's arguments make it load; None where there is none."""
    for root in (getattr(args, "load", None), getattr(args, "pretrained_checkpoint", None)):
        named = None if root is None else read_tracker(Path(root))
        if named is not None:
            return iteration_folder(Path(root), getattr(args, "ckpt_step", None) or named)
    return None


def stored_taps(directory: Path) -> set[str] | None:
    """Names of the taps in a distributed checkpoint; None for another format."""
    stored = read_checkpoint(directory)
    return None if stored is None else taps_among(stored.shapes)


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
    taps = [key for key in state_dict if tap_in_key(key)]
    if taps:
        raise ValueError(
            f"the state dict holds taps of KV shifting ({taps[0]} and {len(taps) - 1} more), and "
            "the vanilla twin would drop them: drop --no-kv-shift, or load another checkpoint"
        )
