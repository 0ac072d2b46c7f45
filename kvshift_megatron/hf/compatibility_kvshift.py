"""Everything that the model imports from Transformers, and the differences between its releases.

No other file of the model imports Transformers, and all names are public. In addition,
modeling_kvshift.py sets the class attributes and overrides the hook for initial weights that the
library reads from a custom model; their names start with an underscore.

| since | what changed in Transformers                              | here                |
|-------|-----------------------------------------------------------|---------------------|
| 5.2   | create_causal_mask: input_embeds became inputs_embeds     | causal_mask         |
| 5.3   | takes a tied lm_head for a loaded one (until 5.4)         | FORGETS_TIES        |
| 5.4   | caches count tokens, cache_position is no longer passed   | causal_mask, update |
| 5.4   | configurations are dataclasses, unless they have __init__ | (nothing to do)     |
| 5.13  | get_max_cache_shape() became get_max_length()             | max_length          |
| 5.15  | crop(n): tokens to remove, not to keep                    | (cache_kvshift.py)  |
| 5.24  | past_key_values became cache, in arguments and outputs    | CACHE_NAME          |
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

OLDEST, NEWEST = "5.0.0", "5.24.0"  # tested; newer releases are not refused


def _refuse(reason: str) -> NoReturn:
    raise ImportError(
        f"a KV-shifting Llama needs a release of transformers from {OLDEST} on (tested up to "
        f"{NEWEST}), but {transformers.__version__} is installed: {reason}"
    )


if int(transformers.__version__.partition(".")[0]) < 5:
    _refuse(f"pip install 'transformers>={OLDEST}'")

try:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.activations import ACT2FN
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import (
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        SequenceClassifierOutputWithPast,
        TokenClassifierOutput,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    _refuse(f"it lacks a name that the model needs ({error}): pip install 'transformers=={NEWEST}'")

_CACHE_NAMES = [
    field.name
    for field in fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
]
if not _CACHE_NAMES:
    _refuse(f"its outputs have no cache: pip install 'transformers=={NEWEST}'")

# What the cache is called in arguments and outputs.
CACHE_NAME: str = _CACHE_NAMES[0]

_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
# Whether the caller tells the cache where new tokens go.
POSITIONS_ARE_PASSED = "cache_kwargs" in inspect.signature(Cache.update).parameters


# This release leaves the output layer of a tied custom model uninitialized.
FORGETS_TIES = transformers.__version__.startswith("5.3.")


TELLS_EXPORTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def causal_mask(
    config: PreTrainedConfig,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
    cache_position: Tensor | None,
) -> Any:
    """Return the mask in the form that the configured attention implementation takes.

    Args:
        config: The model's configuration.
        embeddings: [b, s, hidden].
        attention_mask: [b, past + s], 0 for padding.
        cache: The model's cache.
        position_ids: int64 [1 or b, s].
        cache_position: int64 [s], places of the new tokens in the cache; None for releases whose
            caches count tokens themselves.
    """
    everything = {
        "input_embeds": embeddings,
        "inputs_embeds": embeddings,
        "cache_position": cache_position,
        "cache": cache,
        "past_key_values": cache,
    }
    return create_causal_mask(
        config=config,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{name: value for name, value in everything.items() if name in _MASK_ARGUMENTS},
    )


def update(
    cache: Cache, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Append [b, g, s, d] to a layer of the cache; return all its keys and values."""
    if POSITIONS_ARE_PASSED:
        return cache.update(key, value, layer, {"cache_position": cache_position})
    return cache.update(key, value, layer)


def max_length(cache: Cache) -> int:
    """Return how many tokens a cache has room for; -1 for any number."""
    if hasattr(cache, "get_max_length"):
        return cache.get_max_length()
    return cache.get_max_cache_shape()


def is_exporting() -> bool:
    """Check for torch.export, which torch.compile is not.

    Releases of PyTorch before 2.14 answer yes under torch.compile, too; there, only exports that do
    not trace with Dynamo (strict=False) are recognized.
    """
    if not getattr(torch.compiler, "is_exporting", bool)():
        return False
    return TELLS_EXPORTS or not torch.compiler.is_dynamo_compiling()


def attention_function(name: str, eager: Callable) -> Callable:
    """Return the attention implementation of that name; `eager` is the model's own.

    Raises:
        KeyError: The name is not registered.
    """
    return eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def shards_sequences(name: str) -> bool:
    """Check whether DeepSpeed has put its sequence parallelism in the place of an implementation.

    It keeps the name; the function is then one of DeepSpeed's module for Ulysses.
    """
    module = getattr(ALL_ATTENTION_FUNCTIONS.get(name), "__module__", None) or ""
    return module.startswith("deepspeed.") and "sequence" in module


__all__ = [
    "ACT2FN",
    "CACHE_NAME",
    "FORGETS_TIES",
    "POSITIONS_ARE_PASSED",
    "BaseModelOutputWithPast",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "DynamicLayer",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "SequenceClassifierOutputWithPast",
    "StaticLayer",
    "TokenClassifierOutput",
    "attention_function",
    "causal_mask",
    "init",
    "is_exporting",
    "max_length",
    "shards_sequences",
    "update",
]
