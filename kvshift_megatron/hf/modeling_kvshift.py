"""A KV-shifting Llama for Transformers, in the manner of the library's guide for custom models.

The keys and values of a KV head are mixed with those of the tokens before (attention_kvshift.py).
Parameters have Llama's names, and Mixtral's where there are experts.

Letters in shapes: b batch, s new tokens, past tokens of the cache, v vocabulary.
"""

from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from .attention_kvshift import KVShiftLlamaAttention
from .cache_kvshift import take_over
from .compatibility_kvshift import (
    CACHE_NAME,
    FORGETS_TIES,
    POSITIONS_ARE_PASSED,
    BaseModelOutputWithPast,
    Cache,
    CausalLMOutputWithPast,
    DynamicCache,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedModel,
    causal_mask,
    init,
    max_length,
)
from .configuration_kvshift import KVShiftLlamaConfig
from .layers_kvshift import (
    KVShiftExperts,
    KVShiftMLP,
    KVShiftRMSNorm,
    KVShiftRotaryEmbedding,
    KVShiftSparseMLP,
)
from .plan_kvshift import make_plan


class KVShiftLlamaDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: KVShiftLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = KVShiftLlamaAttention(config, layer_idx)
        self.mlp = (KVShiftSparseMLP if config.num_local_experts else KVShiftMLP)(config)
        self.input_layernorm = KVShiftRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KVShiftRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[b, s, hidden] -> the same, and the attention weights; kwargs as the attention's."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class KVShiftLlamaPreTrainedModel(PreTrainedModel):
    """What the models share. The attributes are what Transformers reads from a custom model."""

    config: KVShiftLlamaConfig
    config_class = KVShiftLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["KVShiftLlamaDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # Backends with a key-value store of their own have no place for the unshifted ones.
    _supports_attention_backend = False

    @torch.no_grad()
    def _init_weights(self, module):
        """The start of what a checkpoint does not hold, module by module."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            start = torch.empty_like(module.weight).normal_(std=std)
            if module.padding_idx is not None:
                start[module.padding_idx] = 0.0
            init.copy_(module.weight, start)
        elif isinstance(module, KVShiftRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, KVShiftExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, KVShiftLlamaAttention):
            module.draw_taps()


class KVShiftLlamaModel(KVShiftLlamaPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            KVShiftLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = KVShiftRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = KVShiftRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of the new tokens.

        Args:
            input_ids: int64 [b, s]; or inputs_embeds: [b, s, hidden].
            attention_mask: [b, s], with a cache [b, past + s]: 0 for padding. The token before a
                token is the last one that is not masked, so that a real token's key and value are
                those of the sequence without its padding, wherever that stands: left, right, or
                between the turns of a batch that is continued. 4-D masks are refused: which token
                comes before which cannot be told from them.
            position_ids: int64 [1 or b, s]. Several sequences in a row are recognized, as in the
                library's models, by positions that do not go on (no attention_mask,
                use_cache=False), and then the shift stops where a sequence starts.
            past_key_values: DynamicCache or StaticCache, empty or in use by this model.
            cache: the same, by the name that Transformers gives it from 5.24 on.
            use_cache, output_attentions, output_hidden_states, return_dict: the configuration's
                where they are not given.
            kwargs: for the attention implementation; `cache_position`, the places of the new tokens
                in the cache (int64 [s]), where Transformers before 5.4 passes it.

        Raises:
            ValueError: what KV shifting cannot honour; the message names the argument.
        """
        if (input_ids is None) == (inputs_embeds is None):
            how = "both missing" if input_ids is None else "both given"
            raise ValueError(f"input_ids and inputs_embeds are {how}: pass one of them")
        self._refuse(attention_mask, kwargs)
        cache = _one_cache(cache, past_key_values)
        cache_position = kwargs.pop("cache_position", None)
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # A layer that is computed again would append to the cache again.
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "past_key_values holds tokens, which gradient checkpointing would leave out: "
                    "pass the whole sequence, or turn gradient checkpointing off"
                )
            cache, use_cache = None, False
        if cache is None and use_cache:
            cache = DynamicCache()
        take_over(cache, config)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        plan = make_plan(config, hidden_states, attention_mask, position_ids, cache, kwargs)
        if position_ids is None or (POSITIONS_ARE_PASSED and cache_position is None):
            past = 0 if cache is None else cache.get_seq_length()
            places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            cache_position = places + past if cache_position is None else cache_position
            position_ids = cache_position[None] if position_ids is None else position_ids
        mask = causal_mask(
            config, hidden_states, attention_mask, cache, position_ids, cache_position
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        states, weights = [hidden_states], []
        for layer in self.layers:
            hidden_states, layer_weights = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                plan=plan,
                cache=cache,
                cache_position=cache_position,
                position_ids=position_ids,
                **kwargs,
            )
            states.append(hidden_states)
            weights.append(layer_weights)
        states[-1] = hidden_states = self.norm(hidden_states)
        wants_states = _either(output_hidden_states, config, "output_hidden_states")
        wants_weights = _either(output_attentions, config, "output_attentions")
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if wants_states else None,
            attentions=tuple(weights) if wants_weights else None,
            **{CACHE_NAME: cache},
        )
        return output if _either(return_dict, config, "return_dict") else output.to_tuple()

    def _refuse(self, attention_mask, kwargs) -> None:
        if str(self.config._attn_implementation).startswith("paged"):
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


class KVShiftLlamaForCausalLM(KVShiftLlamaPreTrainedModel, GenerationMixin):
    """Token ids to logits, loss and text."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__(config)
        self.model = KVShiftLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def tie_weights(self, *args, **kwargs) -> None:
        """As PreTrainedModel's."""
        super().tie_weights(*args, **kwargs)
        if FORGETS_TIES and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, s, v] of the new tokens.

        Args (besides KVShiftLlamaModel.forward's):
            labels: int64 [b, s]: the loss is that of predicting each from the tokens before; -100
                for places that do not count.
            logits_to_keep: only those of the last so many tokens (0: all), or at these places
                (int64 [n]).

        Raises:
            ValueError: as KVShiftLlamaModel.forward.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, places])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
            **{CACHE_NAME: getattr(hidden, CACHE_NAME)},
        )
        return output if _either(return_dict, self.config, "return_dict") else output.to_tuple()

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The 2-D mask, as long as the cache: generate would make a 4-D one for static caches."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if attention_mask is None or cache is None:
            return attention_mask
        missing = max_length(cache) - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(missing, 0)))

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: see KVShiftLlamaModel."""
        raise ValueError(
            "continuous batching keeps keys and values in pages without the unshifted ones that "
            "KV shifting continues from: use generate()"
        )


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are one argument by two names: pass one")
    return past_key_values if cache is None else cache


def _either(given: bool | None, config: KVShiftLlamaConfig, name: str) -> bool:
    """An argument of a call, or the configuration's setting of that name."""
    return getattr(config, name) if given is None else given


__all__ = ["KVShiftLlamaForCausalLM", "KVShiftLlamaModel", "KVShiftLlamaPreTrainedModel"]
