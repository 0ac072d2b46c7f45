"""A KV-shifting Llama for Transformers, following the library's guide for custom models.

Each KV head mixes its keys and values with those of the previous tokens (attention_kvshift.py).
Parameters have Llama's names, and those of experts have Mixtral's.

Letters in shapes: b batch, s new tokens, past tokens of the cache, v vocabulary.
"""

from typing import Any, ClassVar, NoReturn

import torch
import torch.nn as nn
from torch import Tensor

from .attention_kvshift import KVShiftLlamaAttention
from .cache_kvshift import take_over
from .callers_kvshift import check_attention
from .compatibility_kvshift import (
    CACHE_NAME,
    FORGETS_TIES,
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
from .documents_kvshift import documents  # noqa: F401  # Transformers 5.0 copies what is named here
from .export_kvshift import holds_raw_states, mask_of_all, whole_length
from .heads_kvshift import SequenceScores, TokenScores
from .layers_kvshift import (
    KVShiftExperts,
    KVShiftMLP,
    KVShiftRMSNorm,
    KVShiftRotaryEmbedding,
    KVShiftSparseMLP,
)
from .plan_kvshift import make_plan, place_tokens
from .stored_kvshift import StoredTaps


class KVShiftLlamaDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: KVShiftLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = KVShiftLlamaAttention(config, layer_idx)
        self.mlp = (KVShiftSparseMLP if config.num_local_experts else KVShiftMLP)(config)
        self.input_layernorm = KVShiftRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KVShiftRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer on [b, s, hidden]; return its output and the attention weights.

        Args:
            hidden_states: [b, s, hidden].
            **kwargs: Arguments of KVShiftLlamaAttention.forward.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class KVShiftLlamaPreTrainedModel(StoredTaps, PreTrainedModel):
    """What the models share, such as the attributes that Transformers reads from custom models."""

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
    # Backends with their own key-value store have no place for unshifted keys and values, and
    # sharded sequences no previous token at the start of a shard.
    _supports_attention_backend = False
    _supports_context_parallel = False

    def __init__(self, config: KVShiftLlamaConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        check_attention(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module whose weights are not in the checkpoint."""
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
        starts_anywhere: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Compute the hidden states of the new tokens.

        Args:
            input_ids: int64 [b, s]; or pass inputs_embeds.
            attention_mask: [b, s], or [b, past + s] with a cache; 0 for padding. The shift skips
                padding: the previous token is the last one that is not masked. So real tokens get
                the same keys and values as without padding, be it on the left, on the right, or
                between the turns of a continued batch. 4-D masks are refused, as they do not tell
                which token is the previous one.
            position_ids: int64 [1 or b, s]. As in the library's models, packed sequences are
                recognized by positions that do not increase by one (without attention_mask, with
                use_cache=False); the shift stops at the start of each sequence. If only
                `cu_seq_lens_q` is passed, positions are counted from it.
            past_key_values: DynamicCache or StaticCache, empty or in use by this model.
            inputs_embeds: [b, s, hidden]; or pass input_ids.
            cache: The same as past_key_values, by its name since Transformers 5.24.
            use_cache, output_attentions, output_hidden_states, return_dict: By default the
                configuration's.
            starts_anywhere: Sequences may start at positions above 0: the caller says that there
                are no tokens before. Otherwise they are missing, and the call is refused.
            **kwargs: For the attention implementation. Transformers before 5.4 also passes
                `cache_position`, the places of the new tokens in the cache (int64 [s]).

        Raises:
            ValueError: KV shifting cannot honour an argument; the message names it.
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
            # A recomputed layer would append to the cache a second time.
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "past_key_values holds tokens, which gradient checkpointing would ignore: pass "
                    "the whole sequence, or turn gradient checkpointing off"
                )
            cache, use_cache = None, False
        if cache is None and use_cache:
            cache = DynamicCache()
        raw = holds_raw_states(cache)
        if not raw:
            take_over(cache, config)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given, position_ids, cache_position = place_tokens(
            hidden_states, position_ids, cache_position, cache, kwargs
        )
        mask = causal_mask(
            config, hidden_states, attention_mask, cache, position_ids, cache_position
        )
        if mask is None and "flash" in str(config._attn_implementation):
            # Flash attention drops a mask without padding, and sees packed sequences then.
            attention_mask = None
        key_embeddings = None
        if raw:
            total = whole_length(cache, hidden_states.shape[1])
            places = torch.arange(total, device=hidden_states.device)[None]
            key_embeddings = self.rotary_emb(hidden_states, places)
            real = mask_of_all(attention_mask, position_ids if given else None, total)
            everything = places.expand(len(hidden_states), -1)
            plan = make_plan(config, everything, real, None, None, kwargs)
        else:
            plan = make_plan(
                config,
                hidden_states,
                attention_mask,
                position_ids if given else None,
                cache,
                kwargs,
                starts_anywhere,
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
                key_embeddings=key_embeddings,
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

    def _refuse(self, attention_mask: Any, kwargs: dict[str, Any]) -> None:
        check_attention(self.config)
        # Causal is the default. A layer that finds the word got it from a hook of accelerate.
        if kwargs.pop("is_causal", None) is False:
            raise ValueError("is_causal=False: KV shifting is defined for causal attention only")
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2
        ):
            raise ValueError(
                "attention_mask must be 2-D [batch, past and new tokens], 0 for padding: other "
                "masks do not tell which token is the previous one; separate packed sequences by "
                "position_ids"
            )


class _Joined(KVShiftLlamaPreTrainedModel):
    """A model with something on top of it."""

    model: KVShiftLlamaModel

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value


class KVShiftLlamaForCausalLM(_Joined, GenerationMixin):
    """Token ids to logits, loss and text."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__(config)
        self.model = KVShiftLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """See PreTrainedModel.tie_weights."""
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
        starts_anywhere: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute the logits [b, s, v] of the new tokens.

        Args (besides those of KVShiftLlamaModel.forward):
            labels: int64 [b, s]. The loss is that of predicting each label from the tokens before
                it; -100 marks places that do not count.
            logits_to_keep: Compute only the logits of so many last tokens (0: all), or of these
                places (int64 [n]).

        Raises:
            ValueError: As KVShiftLlamaModel.forward.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            starts_anywhere=starts_anywhere,
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
    def create_masks_for_generate(
        attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Return a 2-D mask as long as the cache: by default, static caches get a 4-D one."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if attention_mask is None or cache is None:
            return attention_mask
        missing = max_length(cache) - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(missing, 0)))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the library's pages have no place for unshifted keys and values.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching keeps keys and values in pages, which have no place for the "
            "unshifted ones that KV shifting needs: use generate()"
        )


class KVShiftLlamaForSequenceClassification(SequenceScores, _Joined):
    """Token ids to one score per label, as reward models need them."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KVShiftLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class KVShiftLlamaForTokenClassification(TokenScores, _Joined):
    """Token ids to one score per label and token."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KVShiftLlamaModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "cache and past_key_values are two names for one argument: pass only one of them"
        )
    return past_key_values if cache is None else cache


def _either(given: bool | None, config: KVShiftLlamaConfig, name: str) -> bool:
    """Return an argument of a call if given, or else the configuration's setting of that name."""
    return getattr(config, name) if given is None else given


__all__ = [
    "KVShiftLlamaForCausalLM",
    "KVShiftLlamaForSequenceClassification",
    "KVShiftLlamaForTokenClassification",
    "KVShiftLlamaModel",
    "KVShiftLlamaPreTrainedModel",
]
