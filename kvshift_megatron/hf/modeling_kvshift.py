"""A KV-shifting Llama for Transformers: Llama's classes, with the shift in the attention.

The keys and values of a KV head are mixed with those of the tokens before, after their projection
(and normalization) and before the rotary embedding (arXiv 2411.19574, Eq. 4-6 and Appendix F).

Letters in shapes: b batch, g KV heads, w window, s new tokens, d head_dim.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralExperts,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)
from transformers.utils.generic import merge_with_config_defaults

from .cache_kvshift import ShiftPlan, last_tokens, pick, real_places, take_over
from .configuration_kvshift import KVShiftLlamaConfig


class KVShiftLlamaAttention(LlamaAttention):
    """LlamaAttention with shifted keys and values.

    K^_i = sum_j alpha_j K_{i-j+1}, V^_i = sum_j beta_j V_{i-j+1}, with nothing before the first
    token of a sequence. The arithmetic is in fp32 (float64 for float64). Each tap is a parameter
    [g] of its own; see KVShiftLlamaConfig for their names.
    """

    def __init__(self, config: KVShiftLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qkv_bias and not config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                old = getattr(self, name)
                setattr(self, name, nn.Linear(old.in_features, old.out_features, bias=True))
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.tap_names = config.tap_names()
        for names in self.tap_names.values():
            for name in names:
                tap = nn.Parameter(torch.empty(config.num_key_value_heads))
                self.register_parameter(name, tap)

    @torch.no_grad()
    def draw_taps(self) -> None:
        """The paper's start: all taps but the last ~ U(0, 1), the last one minus their sum.

        ``clamp`` with a window above 2 starts as identity instead: there most last taps would
        start below 0, where the clamp gives them no gradient.
        """
        for names in self.tap_names.values():
            parameters = [getattr(self, name) for name in names]
            first = torch.rand(self.config.kv_shift_window - 1, *parameters[0].shape)
            if self.config.kv_shift_variant == "clamp" and len(first) > 1:
                first = torch.eye(*first.shape)[:, :1].expand_as(first)
            values = [*first, 1.0 - first.sum(0)]
            if self.config.kv_shift_variant == "gate":
                values = [torch.logit(first[0], eps=1e-6)]
            for parameter, value in zip(parameters, values):
                init.copy_(parameter, value.to(parameter))

    def taps(self, kind: str, dtype: torch.dtype) -> Tensor:
        """The taps that are applied to "key" or "value": [w, g], current token first."""
        parameters = torch.stack([getattr(self, name) for name in self.tap_names[kind]]).to(dtype)
        if self.config.kv_shift_variant == "gate":
            gate = torch.sigmoid(parameters[0])
            return torch.stack((gate, 1.0 - gate))
        if self.config.kv_shift_variant == "clamp":
            # Not torch's clamp: a tap exactly at 0 or 1 keeps its gradient.
            inside = (parameters >= 0.0) & (parameters <= 1.0)
            return torch.where(inside, parameters, parameters.detach().clamp(0.0, 1.0))
        return parameters

    def shift(self, kind: str, extended: Tensor, plan: ShiftPlan) -> Tensor:
        """[b, g, w - 1 + s, d], the tokens before included -> shifted [b, g, s, d]."""
        wide = extended.double() if extended.element_size() > 4 else extended.float()
        taps = self.taps(kind, wide.dtype)[:, :, None, None]
        before = len(taps) - 1
        length = extended.shape[2] - before
        shifted = taps[0] * wide[:, :, before:]
        for j in range(1, len(taps)):
            if plan.earlier is None:
                earlier = wide[:, :, before - j : before - j + length]
            else:
                earlier = pick(wide, plan.earlier[:, :, j - 1])
            shifted = shifted + taps[j] * earlier
        return shifted.to(extended.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        kv_shift_plan: ShiftPlan,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention.forward; `kv_shift_plan` comes from KVShiftLlamaModel.forward."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))

        states = {"key": key, "value": value}
        new = {kind: states[kind] for kind in self.tap_names}
        if past_key_values is not None:
            extended = past_key_values.layers[self.layer_idx].extend(new, kv_shift_plan)
        else:
            before = self.config.kv_shift_window - 1
            extended = {k: nn.functional.pad(x, (0, 0, before, 0)) for k, x in new.items()}
        states |= {kind: self.shift(kind, x, kv_shift_plan) for kind, x in extended.items()}

        query, key = apply_rotary_pos_emb(query, states["key"], *position_embeddings)
        value = states["value"]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class KVShiftLlamaDecoderLayer(LlamaDecoderLayer):
    """LlamaDecoderLayer with a shifting attention and, where asked for, Mixtral's experts."""

    def __init__(self, config: KVShiftLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = KVShiftLlamaAttention(config, layer_idx)
        if config.num_local_experts:
            self.mlp = MixtralSparseMoeBlock(config)


class KVShiftLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the two models share; see LlamaPreTrainedModel."""

    config: KVShiftLlamaConfig
    config_class = KVShiftLlamaConfig
    _no_split_modules: ClassVar = ["KVShiftLlamaDecoderLayer"]
    _can_record_outputs: ClassVar = {
        "hidden_states": KVShiftLlamaDecoderLayer,
        "attentions": KVShiftLlamaAttention,
    }
    # Backends with a key-value store of their own have no place for the unshifted ones.
    _supports_attention_backend = False
    # The library's plans split the KV heads and would leave the taps whole.
    _tp_plan = None
    _pp_plan = None

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, KVShiftLlamaAttention):
            module.draw_taps()
        elif isinstance(module, MixtralExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, MixtralTopKRouter):
            init.normal_(module.weight, std=std)


class KVShiftLlamaModel(KVShiftLlamaPreTrainedModel, LlamaModel):
    """LlamaModel with KV shifting."""

    def __init__(self, config: KVShiftLlamaConfig):
        # Not LlamaModel's, which would build Llama's layers.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            KVShiftLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As LlamaModel.forward.

        Args:
            attention_mask: [b, s], with a cache [b, past + s]: 0 for padding. The token before a
                token is the last one that is not masked, so that a real token's key and value are
                those of the sequence without its padding, wherever that stands: left, right, or
                between the turns of a batch that is continued. 4-D masks are refused: which token
                comes before which cannot be told from them.
            position_ids: several sequences in a row are recognized as Llama does, by positions
                that do not go on (no attention_mask, use_cache=False), and then the shift stops
                where a sequence starts.
            past_key_values: DynamicCache or StaticCache, empty or in use by this model.

        Raises:
            ValueError: what KV shifting cannot honour; the message names the argument.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise ValueError("input_ids and inputs_embeds are both missing: pass one of them")
        self._refuse(attention_mask, kwargs)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        take_over(past_key_values, self.config)
        plan = self._plan(inputs, attention_mask, position_ids, past_key_values, kwargs)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            kv_shift_plan=plan,
            **kwargs,
        )

    def _refuse(self, attention_mask, kwargs) -> None:
        if str(self.config._attn_implementation).startswith("paged") or "cache" in kwargs:
            raise ValueError(
                "paged attention (continuous batching) has no place for the unshifted keys and "
                "values that KV shifting continues from: use generate() with a dynamic or static "
                "cache"
            )
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal=False: KV shifting is defined for causal attention only")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
        ):
            raise ValueError(
                "attention_mask must be 2-D [batch, past and new tokens], 0 for padding: which "
                "token comes before which cannot be told from another mask; separate packed "
                "sequences by position_ids"
            )

    def _plan(self, inputs, attention_mask, position_ids, cache, kwargs) -> ShiftPlan:
        batch, length = inputs.shape[:2]
        before = self.config.kv_shift_window - 1
        if attention_mask is not None:
            real = _mask_of_new_tokens(attention_mask, length, cache).to(inputs.device).bool()
            # The places before the new tokens hold real ones, or zeros where there are none.
            everything = torch.cat([real.new_ones(batch, before), real], 1)
            places, count = real_places(everything)
            rank = count[:, before:, None] - 2 - torch.arange(before, device=inputs.device)
            # Below 0 for masked tokens only.
            earlier = places.gather(1, rank.clamp(min=0).flatten(1)).view(batch, length, before)
            return ShiftPlan(earlier, last_tokens(everything, before), real)
        document = self._documents(batch, length, position_ids, cache, kwargs)
        if document is None:
            return ShiftPlan()
        # One place more: what a token after the last one would see is what a cache keeps.
        place = torch.arange(before, before + length + 1, device=inputs.device)
        back = torch.arange(1, before + 1, device=inputs.device)
        earlier = (place[:, None] - back).expand(batch, -1, -1)
        padded = nn.functional.pad(document, (before, 0), value=-1)
        same = padded.gather(1, earlier.flatten(1)).view_as(earlier) == torch.cat(
            [document, document[:, -1:]], 1
        ).unsqueeze(-1)
        # Place 0 holds zeros: the cache, if there is one, is empty.
        earlier = earlier.where(same, 0)
        return ShiftPlan(earlier[:, :-1], earlier[:, -1].flip(-1))

    def _documents(self, batch, length, position_ids, cache, kwargs) -> Tensor | None:
        """Numbers of the sequences that the tokens belong to, [b, s]; None where there is one."""
        starts = kwargs.get("cu_seq_lens_q")
        if position_ids is None:
            if starts is not None:
                raise ValueError(
                    "cu_seq_lens_q comes without position_ids, from which the shift knows where "
                    "sequences start: pass both (DataCollatorWithFlattening does)"
                )
            return None
        compiling = torch.compiler.is_compiling()
        if length == 1 or (compiling and cache is not None):
            return None
        documents = find_packed_sequence_indices(position_ids.expand(batch, -1))
        if documents is None or compiling:
            return documents
        flash = "flash" in str(self.config._attn_implementation)
        if cache is not None and not (flash and cache.get_seq_length() == 0):
            raise ValueError(
                "position_ids do not go on by one: packed sequences need use_cache=False (and no "
                "past_key_values), and padding needs an attention_mask"
            )
        if flash and batch > 1:
            raise ValueError(
                "position_ids hold packed sequences in a batch of several rows, which flash "
                "attention would take for one sequence a row: pack them into one row"
            )
        if flash or starts is not None:
            ours = (documents.diff(dim=-1)[0] > 0).nonzero().flatten() + 1
            if starts is None:
                starts = (position_ids[0] == position_ids.min()).nonzero().flatten()
            if not torch.equal(ours, starts[(starts > 0) & (starts < length)].to(ours)):
                raise ValueError(
                    "position_ids do not go on by one, but attention would not take every jump for "
                    "the start of a sequence: let the positions start at 0 in each one, in step "
                    "with cu_seq_lens_q"
                )
        return documents


# GenerationMixin by name: the library looks for it among a model's own bases.
class KVShiftLlamaForCausalLM(KVShiftLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """LlamaForCausalLM with KV shifting."""

    def __init__(self, config: KVShiftLlamaConfig):
        PreTrainedModel.__init__(self, config)
        self.model = KVShiftLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Before the first forward pass, which may be compiled, and before past recording starts.
        take_over(model_kwargs.get("past_key_values"), self.config)

    @staticmethod
    def create_masks_for_generate(attention_mask=None, past_key_values=None, **kwargs):
        """The 2-D mask, as long as the cache: generate would make a 4-D one for static caches."""
        if attention_mask is None or past_key_values is None:
            return attention_mask
        missing = past_key_values.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(missing, 0)))

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: see KVShiftLlamaModel."""
        raise ValueError(
            "continuous batching keeps keys and values in pages without the unshifted ones that "
            "KV shifting continues from: use generate()"
        )


def _mask_of_new_tokens(attention_mask: Tensor, length: int, cache: Cache | None) -> Tensor:
    """The last columns [b, s] of a mask [b, past + s]."""
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):
        # A static cache: its mask may be as long as itself, and its length is on the device.
        columns = torch.arange(length, device=attention_mask.device) + past.to(
            attention_mask.device
        )
        return attention_mask.index_select(1, columns)
    width = attention_mask.shape[1]
    if width != past + length and not (cache is not None and width == cache.get_max_length()):
        raise ValueError(
            f"attention_mask has {width} columns for {past} past and {length} new tokens: it needs "
            "one for each of them"
        )
    return attention_mask[:, past : past + length]


__all__ = ["KVShiftLlamaForCausalLM", "KVShiftLlamaModel", "KVShiftLlamaPreTrainedModel"]
