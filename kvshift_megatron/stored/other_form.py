"""A checkpoint of the other form, GPT or hybrid model, in Megatron's format before torch_dist.

Megatron has no translation there, and answers missing weights with a second, lenient attempt.
"""

from argparse import Namespace
from typing import Any

_NAMES = {True: "a hybrid model", False: "a GPT model"}
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
_FORMAT = "LEGACY"  # name of the format among Megatron's CheckpointType


def refuse_other_form(saved: Namespace, args: Namespace, kind: Any, checkpoint: Any) -> None:
    """Raise ValueError if a checkpoint in the older format is of the other form.

    Args:
        saved: The checkpoint's arguments.
        args: The run's.
        kind: Megatron's CheckpointType; other formats are compared before the load (checks/).
        checkpoint: Its name, for the message.
    """
    if getattr(kind, "name", None) != _FORMAT:
        return
    theirs, ours = (any(getattr(one, name, None) for name in _PATTERNS) for one in (saved, args))
    if theirs == ours:
        return
    form = "hybrid" if ours else "gpt"
    raise ValueError(
        f"load: the checkpoint {checkpoint} is of {_NAMES[theirs]}, and this run builds "
        f"{_NAMES[ours]}, whose weights have other names: load it with the flags that it was saved "
        "with, save it with --ckpt-format torch_dist, and convert that with kvshift-convert "
        f"change-form CHECKPOINT TARGET --model-form {form}"
    )
