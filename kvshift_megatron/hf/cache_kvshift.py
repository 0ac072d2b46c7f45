"""Decoding state of KV shifting: cache layers that also hold keys and values before the shift.

A dynamic or static cache of Transformers stays in use; only its layers, while they are empty, are
replaced by the two classes here. So the state follows whatever generation does to the cache:
reordering, selecting, cropping, resetting, returning it.

Letters in shapes: b batch, g KV heads, w window, s new tokens, n remembered tokens, d head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compatibility_kvshift import Cache, DynamicLayer, StaticLayer
from .configuration_kvshift import KVShiftLlamaConfig
from .plan_kvshift import ShiftPlan, last_tokens, pick


class _History:
    """Keys or values before the shift, of enough past tokens to crop the cache.

    Args:
        carry: [b, g, w - 1, d], the last real tokens before those in `states`; zeros before the
            first token of a sequence.
        states: [b, g, n, d], the last tokens of the cache, padding included.
        real: bool [b, n], which of them are not padding.
    """

    def __init__(self, carry: Tensor, states: Tensor, real: Tensor):
        self.carry, self.states, self.real = carry, states, real
        # Appended since then. Joined only when needed, which is not at every token of decoding.
        self._new: list[tuple[Tensor, Tensor | None]] = []
        self._length = states.shape[2]

    def __len__(self) -> int:
        return self._length

    def _join(self) -> None:
        if self._new:
            states = [x for x, _ in self._new]
            real = [
                x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if given is None else given
                for x, given in self._new
            ]
            self.states = torch.cat([self.states, *states], 2)
            self.real = torch.cat([self.real, *real], 1)
            self._new = []

    def last_before(self, end: int) -> Tensor:
        """Return the last w - 1 real tokens among `carry` and the first `end` of `states`."""
        self._join()
        window = self.carry.shape[2]
        real = torch.cat([self.real.new_ones(len(self.real), window), self.real[:, :end]], 1)
        states = torch.cat([self.carry, self.states[:, :, :end]], 2)
        return pick(states, last_tokens(real, window))

    def append(self, states: Tensor, real: Tensor | None) -> None:
        self._new.append((states, real))
        self._length += states.shape[2]

    def forget(self, keep: int) -> None:
        """Forget all but the last `keep` tokens."""
        start = len(self) - keep
        if start > 0:
            self.carry = self.last_before(start)
            # Clone: a view would keep the memory of forgotten tokens.
            self.states, self.real = self.states[:, :, start:].clone(), self.real[:, start:].clone()
            self._length = keep

    def drop_last(self, tokens: int) -> None:
        self._length = end = len(self) - tokens
        self._join()
        self.states, self.real = self.states[:, :, :end], self.real[:, :end]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self._join()
        self.carry, self.states, self.real = map(function, (self.carry, self.states, self.real))


class DynamicKVShiftLayer(DynamicLayer):
    """A DynamicLayer that also holds the keys and values before the shift.

    It can always be cropped by up to `history` tokens, and by those of the last step. It can be
    cropped by any number of tokens while there are no more than `history`, and after
    `activate_past_recording()` until the next crop, which forgets all but `history` tokens.

    Args:
        window: Taps per key or value.
        history: Number of tokens; None for no limit.
    """

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool

    def __init__(self, window: int, history: int | None):
        super().__init__()
        self.kv_shift_window = window
        self.history = history
        self.record_past = False
        self._last: dict[str, Tensor] = {}
        self._histories: dict[str, _History] = {}

    def extend(self, new: dict[str, Tensor], plan: ShiftPlan) -> dict[str, Tensor]:
        """Remember the new tokens and prepend the last ones before them.

        Args:
            new: "key" and/or "value" -> [b, g, s, d], before the shift.
            plan: The plan of this forward pass.

        Returns:
            The same names -> [b, g, w - 1 + s, d].
        """
        carried = self.kv_shift_window - 1
        extended = {}
        for kind, states in new.items():
            if kind not in self._last:
                if self.get_seq_length():
                    raise ValueError(
                        "past_key_values was filled by a model without KV shifting: start with an "
                        "empty cache"
                    )
                zeros = states.new_zeros(*states.shape[:2], carried, states.shape[3])
                real = torch.ones(len(states), 0, dtype=torch.bool, device=states.device)
                self._last[kind] = zeros
                self._histories[kind] = _History(zeros, states[:, :, :0], real)
            extended[kind] = torch.cat([self._last[kind], states], 2)
            self._last[kind] = last_of(extended[kind], plan, carried)
            history = self._histories[kind]
            history.append(states, plan.real)
            if self.history is not None and not self.record_past:
                # Assisted generation crops what the last step got wrong.
                keep = max(self.history, states.shape[2])
                # Not at every token, as forgetting copies.
                if len(history) > 2 * keep:
                    history.forget(keep)
        return extended

    def activate_past_recording(self) -> None:
        """Forget nothing until the next crop."""
        self.record_past = True

    def crop(self, tokens: int) -> None:
        """Crop as the installed release does: a negative number is a number of tokens to remove.

        Raises:
            ValueError: The layer does not remember that many tokens; nothing is cropped.
        """
        before, keys, values = self.get_seq_length(), self.keys, self.values
        super().crop(tokens)
        removed = before - self.get_seq_length()
        if self.is_initialized and self.get_seq_length() == 0:
            self._clear()
            return
        for history in self._histories.values():
            if removed > len(history):
                self.keys, self.values = keys, values
                raise ValueError(
                    f"crop({tokens}): the cache holds the unshifted keys and values of only its "
                    f"last {len(history)} tokens: set kv_shift_cache_history in the model's "
                    f"configuration to {removed} or more, or to None"
                )
        for kind, history in self._histories.items():
            if removed:
                history.drop_last(removed)
                self._last[kind] = history.last_before(len(history))
            if self.history is not None:
                history.forget(self.history)

    def reset(self) -> None:
        super().reset()
        # Reset these explicitly: some releases keep the length and fill it with zeros.
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices, ...])

    def _clear(self) -> None:
        self._last, self._histories = {}, {}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self._last = {kind: function(states) for kind, states in self._last.items()}
        for history in self._histories.values():
            history.map(function)


class StaticKVShiftLayer(StaticLayer):
    """A StaticLayer that also holds the last w - 1 keys and values before the shift.

    Their addresses stay fixed. It cannot be cropped.

    Args:
        max_cache_len: Number of tokens.
        window: Taps per key or value.
    """

    is_croppable = False

    def __init__(self, max_cache_len: int, window: int):
        super().__init__(max_cache_len)
        self.kv_shift_window = window
        self._last: dict[str, Tensor] = {}
        self._length = torch.tensor(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for kind, states in (("key", key_states), ("value", value_states)):
            b, g, _, d = states.shape
            self._last[kind] = states.new_zeros(b, g, self.kv_shift_window - 1, d)
        self._length = self._length.to(key_states.device)
        # As StaticLayer does, for CUDA graphs.
        if not torch.compiler.is_compiling():
            for tensor in (*self._last.values(), self._length):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See StaticLayer.update."""
        everything = super().update(key_states, value_states, *args, **kwargs)
        self._length.add_(key_states.shape[2])
        return everything

    def get_seq_length(self) -> Tensor | int:
        # Releases before 5.4 would count the keys that are not zero, but shifted keys may be zero.
        return self._length if self.is_initialized else 0

    def extend(self, new: dict[str, Tensor], plan: ShiftPlan) -> dict[str, Tensor]:
        """See DynamicKVShiftLayer.extend."""
        if not self.is_initialized:
            some = next(iter(new.values()))
            self.lazy_initialization(new.get("key", some), new.get("value", some))
        extended = {}
        for kind, states in new.items():
            extended[kind] = torch.cat([self._last[kind], states], 2)
            self._last[kind].copy_(last_of(extended[kind], plan, self.kv_shift_window - 1))
        return extended

    def crop(self, tokens: int) -> None:
        """Refuse: the layer holds the unshifted keys and values of only the last tokens.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"crop({tokens}): a static cache of a KV-shifting model cannot be cropped: use a "
            "DynamicCache"
        )

    def reset(self) -> None:
        super().reset()
        for tensor in (*self._last.values(), self._length):
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._last = {k: x.index_select(0, beam_idx.to(x.device)) for k, x in self._last.items()}


def last_of(extended: Tensor, plan: ShiftPlan, how_many: int) -> Tensor:
    """Return a copy of the last real tokens of [b, g, w - 1 + s, d]: [b, g, how_many, d]."""
    if plan.last is None:
        return extended[:, :, extended.shape[2] - how_many :].clone()
    return pick(extended, plan.last)


def take_over(cache: Cache | None, config: KVShiftLlamaConfig) -> None:
    """Replace the empty layers of a cache by those that KV shifting needs, in place.

    Args:
        cache: DynamicCache or StaticCache, in use by this model or still empty.
        config: The model's configuration.

    Raises:
        ValueError: The cache is of another kind, or another model has filled it.
    """
    if cache is None:
        return
    if not isinstance(getattr(cache, "layers", None), list):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold the unshifted keys "
            "and values that KV shifting needs: pass a DynamicCache or a StaticCache"
        )
    window = config.kv_shift_window
    replicated: Any = getattr(cache, "layer_class_to_replicate", None)
    if not cache.layers and replicated is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(config.num_hidden_layers))
    if len(cache.layers) < config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, but the model has "
            f"{config.num_hidden_layers}: create the cache with this model's configuration"
        )
    for index, layer in enumerate(cache.layers):
        # By attribute, as an exported folder has its own classes.
        if hasattr(layer, "kv_shift_window"):
            if layer.kv_shift_window != window:
                raise ValueError(
                    f"past_key_values is from a model with kv_shift_window={layer.kv_shift_window},"
                    f" but this model has {window}: start with an empty cache"
                )
        elif type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            cache.layers[index] = DynamicKVShiftLayer(window, config.kv_shift_cache_history)
        elif type(layer) is StaticLayer and int(layer.get_seq_length()) == 0:
            cache.layers[index] = StaticKVShiftLayer(layer.max_cache_len, window)
            if layer.is_initialized:
                cache.layers[index].lazy_initialization(layer.keys, layer.values)
        elif type(layer) in (DynamicLayer, StaticLayer):
            raise ValueError(
                "past_key_values was filled without the unshifted keys and values that KV shifting "
                "needs (by another model, or from a tuple): start with an empty cache, or continue "
                "from one that this model returned"
            )
        else:
            raise ValueError(
                f"past_key_values has layers of {type(layer).__name__}, which cannot hold the "
                "unshifted keys and values that KV shifting needs: use a DynamicCache or a "
                "StaticCache (cache_implementation 'dynamic', 'offloaded', 'static' or "
                "'offloaded_static')"
            )
