"""Refuse weights whose taps mean something else than the model's configuration says."""

import re
from collections.abc import Iterable
from typing import Any

_TAP = re.compile(r"\.self_attn\.((alpha|beta)_(?:\d+|logit))$")
# Settings of KV shifting that change no weight's meaning.
_HARMLESS = {"kv_shift_cache_history"}
# Arguments of from_pretrained that say where config.json is.
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder",
          "token")  # fmt: skip


class StoredTaps:
    """Compare what a folder says and holds with the model that is loaded from it.

    Transformers by itself draws taps that are missing, ignores those of another kind, and lets
    arguments replace what config.json says: `from_pretrained(folder, kv_shift_variant="clamp")`.
    """

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as PreTrainedModel does.

        Raises:
            ValueError: The weights were saved with other settings of KV shifting; the message has
                both values. Or the folder holds other taps than the model has.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        load = super().from_pretrained  # type: ignore[misc]  # of the next class
        model, info = load(folder, *args, **kwargs, output_loading_info=True)
        if folder is not None:
            _compare_settings(model.config, folder, place)
        _compare_taps(model, folder, info)
        return (model, info) if wants_info else model


def _compare_settings(config: Any, folder: Any, place: dict[str, Any]) -> None:
    try:
        stored, _ = type(config).get_config_dict(folder, **place)
    except OSError:
        return  # weights alone, or an adapter
    if stored.get("model_type") != config.model_type:
        return  # a model without taps, from which this one starts
    before = type(config)(**stored)
    names = [name for name in vars(before) if name.startswith("kv_shift_")]
    for name in sorted(set(names) - _HARMLESS):
        theirs, ours = getattr(before, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(
                f"{name}={ours!r}, but the weights in {folder} were saved with {name}={theirs!r} "
                f"(config.json): leave {name} out, or load other weights"
            )


def _compare_taps(model: Any, folder: Any, info: dict[str, Any]) -> None:
    unexpected = _taps(info["unexpected_keys"])
    missing = _taps(info["missing_keys"])
    has = _taps(name for name, _ in model.named_parameters())
    # Taps of which a layer has none yet may be drawn; not some of those that work together.
    kinds = {tap.partition("_")[0] for tap in has - missing}
    torn = {tap for tap in missing if tap.partition("_")[0] in kinds}
    if unexpected or torn:
        stored = (has - missing) | unexpected
        raise ValueError(
            f"{folder} holds the taps {', '.join(sorted(stored))}, but {model.config.model_type} "
            f"with kv_shift_variant={model.config.kv_shift_variant!r}, kv_shift_window="
            f"{model.config.kv_shift_window}, kv_shift_keys={model.config.kv_shift_keys} and "
            f"kv_shift_values={model.config.kv_shift_values} has {', '.join(sorted(has))}: correct "
            "config.json, or load other weights"
        )


def _taps(keys: Iterable[str]) -> set[str]:
    return {match.group(1) for match in (_TAP.search(f".{key}") for key in keys) if match}
