"""KVShiftSelfAttention: Megatron-Core's self-attention with shifted keys and values."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor

from kvshift_megatron.attention.context_parallel import (
    context_parallel_group,
    shift_across_boundaries,
)
from kvshift_megatron.attention.implementation import check_forced
from kvshift_megatron.attention.packed_sequences import physical_cu_seqlens
from kvshift_megatron.attention.rope import RopeFusion, shift_and_rotate
from kvshift_megatron.attention.spec_check import LayerSpec, check_norms
from kvshift_megatron.attention.validation import check_at_start, refuse_call
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.stored.at_load import watch
from kvshift_megatron.taps import initial_values, resolve_seed, tap_names, taps_by_kind

_FORWARD = inspect.signature(SelfAttention.forward)


@dataclass(slots=True)
class _Call:
    """What `forward` passes to its hook; not on the module, whose attributes are slow to set."""

    cu_seqlens: Tensor | None = None
    freqs: Tensor | None = None


class KVShiftSelfAttention(SelfAttention):
    """Mix keys and values with those of the previous tokens, then attend as Megatron does.

    The shift comes after the QKV projection and k_layernorm and before the rotary embedding
    (arXiv 2411.19574, Eq. 4-6 and Appendix F).

    Args:
        config, submodules, layer_number, **kwargs: As for SelfAttention.
        kv_shift: The taps; see KVShiftConfig.
        layer_spec: The spec that this attention stands in, to compare it with the configuration.

    Raises:
        ValueError: KV shifting cannot honour the configuration; the message names the setting and
            what to do instead.

    Parallelism: Taps are 1-D parameters with one element per query group.
        num_query_groups >= TP: [num_query_groups / TP] each, sharded with the query groups.
        num_query_groups < TP: [num_query_groups] each, replicated. TP / num_query_groups ranks
        share one group, and each has only some of its query heads, so the gradient is summed over
        the tensor-parallel group (one all-reduce of a few scalars per layer).
        Sequence parallelism needs nothing: linear_qkv gathers the sequence first.
        Context parallelism: see context_parallel.py. The taps' gradients are reduced over the
        data- and context-parallel group with all others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        kv_shift: KVShiftConfig = KVShiftConfig(),
        layer_spec: LayerSpec = LayerSpec(),
        **kwargs: Any,
    ) -> None:
        check_at_start(config)
        watch(kv_shift)
        layer_spec.check(config, layer_number)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        check_norms(config, (self.q_layernorm, self.k_layernorm))
        self.kv_shift = kv_shift
        # A GPT layer is two layers of a hybrid stack, and starts with the same taps in both.
        self._attention_number = layer_spec.attention_number(layer_number)
        self._tap_names = tap_names(kv_shift)
        self._call = _Call()
        self._cp_group = context_parallel_group(config, self.pg_collection)
        window = kv_shift.window if kv_shift.shift_keys else 1
        self.rope = RopeFusion(config, layer_number, self._cp_group is not None, window)
        self._loads_without_taps = False
        self.taps_are_sharded = config.num_query_groups >= self.world_size
        tp_rank = self.pg_collection.tp.rank()
        if self.taps_are_sharded:
            per_rank = self.num_query_groups_per_partition
            self.stored_groups = slice(tp_rank * per_rank, (tp_rank + 1) * per_rank)
        else:
            self.stored_groups = slice(0, config.num_query_groups)
            self._own_group = tp_rank // (self.world_size // config.num_query_groups)
        self._register_taps()
        check_forced(self, self.any_tap())

    def _register_taps(self) -> None:
        # None leaves the choice to an enclosing `torch.device`, as in Megatron's own layers.
        device: int | str | None = None
        if not self.config.use_cpu_initialization:
            device = torch.cuda.current_device()
        if self.config.init_model_with_meta_device:
            device = "meta"
        shape = (self.stored_groups.stop - self.stored_groups.start,)
        for names in self._tap_names.values():
            for name in names:
                tap = torch.nn.Parameter(
                    torch.empty(shape, device=device, dtype=self.config.params_dtype)
                )
                if self.taps_are_sharded:
                    set_tensor_model_parallel_attributes(tap, True, 0, 1)
                self.register_parameter(name, tap)
        # Always initialise, even with perform_initialization off: unset taps hold garbage.
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the taps in place; called again when a meta-device model gets its storage."""
        for name, value in self._initial_values().items():
            tap = getattr(self, name)
            if not tap.is_meta:
                tap.copy_(value[self.stored_groups])

    def draw_taps_of(self, number: int) -> None:
        """Draw the taps anew, as those of attention `number` (1-based) of the model."""
        self._attention_number = number
        self.reset_parameters()

    def _initial_values(self) -> dict[str, Tensor]:
        return initial_values(
            self.kv_shift,
            resolve_seed(self.kv_shift),
            self._attention_number,
            self.config.num_query_groups,
        )

    def any_tap(self) -> Tensor:
        """Return one of the taps: they are on the device and in the dtype of keys and values."""
        return getattr(self, next(iter(self._tap_names.values()))[0])

    def load_without_taps(self) -> None:
        """Leave the taps out of the next checkpoint load, which reads a vanilla model."""
        self._loads_without_taps = True

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Load as Module does, but refuse attention weights without their taps, strict or not.

        Raises:
            ValueError: The taps are missing, and they do not start as identity or no longer are.
        """
        taps = [prefix + name for names in self._tap_names.values() for name in names]
        missing = [key for key in taps if key not in state_dict]
        # A state dict may be partial, for example adapters only.
        has_weights = any(key.startswith(f"{prefix}linear_qkv.") for key in state_dict)
        starts_from_vanilla = missing == taps and self.kv_shift.init == "identity"
        if missing and has_weights and not starts_from_vanilla:
            raise ValueError(
                f"the state dict holds the attention {prefix!r} without its taps {missing}: to "
                "start KV shifting from vanilla weights, set init='identity' "
                "(--kv-shift-init identity); otherwise load a checkpoint with these taps"
            )
        if has_weights and starts_from_vanilla and not self._taps_are_initial():
            raise ValueError(
                f"the state dict holds the attention {prefix!r} without its taps, which have been "
                "trained here: add the taps to the state dict, or call reset_parameters() of the "
                "attention first to start KV shifting from these weights"
            )
        self._loads_without_taps = False
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if has_weights and starts_from_vanilla:
            missing_keys[:] = [key for key in missing_keys if key not in taps]

    def _taps_are_initial(self) -> bool:
        """Return whether no tap differs from what this layer started with."""
        return all(
            tap.is_meta or torch.equal(tap, value[self.stored_groups].to(tap))
            for name, value in self._initial_values().items()
            for tap in (getattr(self, name),)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run SelfAttention.forward; refuse calls that the shift does not support yet.

        Args:
            hidden_states: [s, b, h], with sequence parallelism [s / TP, b, h].
            attention_mask: As for SelfAttention.
            *args, **kwargs: As for SelfAttention.

        Returns:
            SelfAttention's (output, in the shape and dtype of hidden_states; bias or None).

        Raises:
            ValueError: There is an inference context, or a context-parallel group of the batch.
        """
        if args:
            # By name, as what follows reads them; a wrong number raises Python's TypeError.
            bound = _FORWARD.bind(self, hidden_states, attention_mask, *args, **kwargs)
            kwargs = dict(list(bound.arguments.items())[3:])
        refuse_call(**kwargs)
        if self._loads_without_taps:
            self._loads_without_taps = False
        # The hook below does not receive packed_seq_params. Keep them for this call only:
        # recompute enters here again.
        call = self._call
        call.cu_seqlens = physical_cu_seqlens(kwargs.get("packed_seq_params"))
        call.freqs, kwargs["rotary_pos_emb"] = self.rope.take(
            kwargs.get("rotary_pos_emb"), hidden_states
        )
        try:
            return super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            call.cu_seqlens = call.freqs = None

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """Return SelfAttention's query, key and value, with key and value [s, b, ng, hn] shifted.

        If `forward` has taken the rotary angles, also rotate the key (rope.py).
        """
        output = super().get_query_key_value_tensors(
            hidden_states, key_value_states, *args, **kwargs
        )
        if len(output) not in (3, 4):
            raise ValueError(
                "fused_single_qkv_rope leaves query, key and value unsplit, so KV shifting cannot "
                "reach them: turn it off (drop --fused-single-qkv-rope)"
            )
        query, key, value, *gate = output
        taps, call = self.taps(), self._call
        shifted = key, value, taps.get("alpha"), taps.get("beta")
        if call.freqs is not None:
            interleaved = self.config.rotary_interleaved
            key, value = shift_and_rotate(*shifted, call.freqs, call.cu_seqlens, interleaved)
        else:
            key, value = shift_across_boundaries(*shifted, call.cu_seqlens, self._cp_group)
        return (query, key, value, *gate)

    def taps(self) -> dict[str, Tensor]:
        """Return this rank's taps, {"alpha": fp32 [window, ng], "beta": ...}, differentiable."""
        # Stack before the cast: one kernel instead of one per tap.
        flat = torch.stack(
            [getattr(self, name) for names in self._tap_names.values() for name in names]
        ).float()
        if not self.taps_are_sharded:
            # Reduce all taps at once, in fp32 whatever the parameters' dtype.
            flat = copy_to_tensor_model_parallel_region(flat, group=self.pg_collection.tp)
            flat = flat[:, self._own_group : self._own_group + 1]
        return taps_by_kind(self.kv_shift, flat)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return taps as global [num_query_groups] tensors, under the same key at every TP size.

        Megatron's default declares a module's own parameters replicated over TP, and would save one
        rank's query groups for all.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own_parameters: dict[str, Tensor] = {}
        self._save_to_state_dict(own_parameters, "", keep_vars=True)
        taps = [name for names in self._tap_names.values() for name in names]
        if self._loads_without_taps:
            own_parameters = {k: v for k, v in own_parameters.items() if k not in taps}
        sharded = make_sharded_tensors_for_checkpoint(
            own_parameters,
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(taps, 0) if self.taps_are_sharded else {},
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return sharded
