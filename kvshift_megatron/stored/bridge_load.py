"""Compare a model's taps with those of a checkpoint before Megatron-Bridge loads it.

Bridge keeps its configuration beside the weights instead of Megatron's arguments; the layer spec in
it states the settings. It has a loader of its own, which `at_load` does not see.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.stored.settings import meaning, refuse_others, stored_settings
from kvshift_megatron.upstream import loading_table, substitutions

_PACKAGE = __name__.partition(".")[0]
_model: ContextVar[Sequence[torch.nn.Module] | None] = ContextVar("model", default=None)
_is_watching = False


def compare_bridge_loads() -> None:
    """Have every checkpoint compared that Bridge loads, for training or to convert it.

    Nothing happens before Bridge's loader is imported, which needs all that its training needs.
    """
    global _is_watching
    if not _is_watching and loading_table.BRIDGE in sys.modules:
        _is_watching = True
        substitutions.apply(loading_table.bridge(_of_training, _before_training, _alone))


def _of_training(original: Callable) -> Callable:
    """Wrap what restores a training run, to remember its model."""

    @functools.wraps(original)
    def load(load_dir: Any, state: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        token = _model.set(model)
        try:
            return original(load_dir, state, model, *args, **kwargs)
        finally:
            _model.reset(token)

    return load


def _before_training(original: Callable) -> Callable:
    """Wrap what finds the checkpoint; Bridge first asks it for what rank 0 saved."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        (state, folder), model = answer[:2], _model.get()
        if model is not None and folder:
            _compare(folder, (state or {}).get("args"), model)
        return answer

    return load


def _alone(original: Callable) -> Callable:
    """Wrap what loads only weights."""

    @functools.wraps(original)
    def load(checkpoint_path: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import dist_checkpointing

        common = dist_checkpointing.load_common_state_dict(checkpoint_path) or {}
        _compare(checkpoint_path, common.get("args"), model)
        return original(checkpoint_path, model, *args, **kwargs)

    return load


def _compare(folder: Any, args: Any, model: Sequence[torch.nn.Module]) -> None:
    """Raise ValueError if a checkpoint's taps are not the model's; collective over all ranks."""
    from megatron.bridge.training.checkpointing import (
        get_checkpoint_run_config_filename,
        read_run_config,
    )
    from megatron.core.transformer.attention import SelfAttention

    file = Path(get_checkpoint_run_config_filename(str(folder)))
    if file.exists():
        stored = settings_from_run_config(read_run_config(str(file)), folder)
    else:  # one of Megatron's own
        stored = None if args is None else stored_settings(args, folder)
    layers = [one for chunk in model for one in chunk.modules() if isinstance(one, SelfAttention)]
    if stored is None or not layers:
        return
    for layer in layers:
        kv_shift = getattr(layer, "kv_shift", None)
        if kv_shift is None:
            raise ValueError(
                f"load: the checkpoint {folder} was trained with KV shifting "
                f"({stored.describe()}), and this model would ignore its taps: give it the spec "
                "kvshift_megatron.layer_specs.kv_shift_layer_spec, or load another one"
            )
        remedy = "give the layer spec the checkpoint's kv_shift, or load another one"
        refuse_others(stored, meaning(kv_shift), folder, remedy)


def settings_from_run_config(config: dict[str, Any], folder: Any) -> KVShiftConfig | None:
    """Return the settings that Bridge's configuration states; None if it names no spec of ours.

    Args:
        config: Content of a checkpoint's run_config.yaml.
        folder: The checkpoint's, for the message.

    Raises:
        ValueError: They are impossible.
    """
    spec = (config.get("model") or {}).get("transformer_layer_spec")
    if not isinstance(spec, dict) or not str(spec.get("_target_")).startswith(f"{_PACKAGE}."):
        return None
    given = spec.get("kv_shift")
    try:
        return KVShiftConfig(**given) if isinstance(given, dict) else KVShiftConfig()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"load: run_config.yaml of the checkpoint {folder} states impossible settings of KV "
            f"shifting ({error}): load another one"
        ) from error
