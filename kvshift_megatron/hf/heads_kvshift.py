"""Scores instead of logits: what the classes for classification add to the model.

modeling_kvshift.py joins them with the model. They compute what the library's heads for Llama do.

Letters in shapes: b batch, s tokens, n labels.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .compatibility_kvshift import (
    CACHE_NAME,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


class Scores:
    """What the classes share: the model's hidden states, then scores and loss of the subclass."""

    config: Any
    model: Any
    score: nn.Linear
    loss_function: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | TokenClassifierOutput | tuple:
        """Compute the scores, [b, n] or [b, s, n].

        Args (besides those of KVShiftLlamaModel.forward):
            labels: For rows: int64 [b]; float [b] for one label, float [b, n] for several at once.
                For tokens: int64 [b, s]; -100 marks tokens that do not count.

        Raises:
            ValueError: The last token of each row is unknown, as pad_token_id is not set; or as
                KVShiftLlamaModel.forward.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        output = self._output(hidden, input_ids, labels)
        output.hidden_states, output.attentions = hidden.hidden_states, hidden.attentions
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def _output(self, hidden: Any, input_ids: Tensor | None, labels: Tensor | None) -> Any:
        raise NotImplementedError


class SequenceScores(Scores):
    """One score per label for each row, at its last token that is not padding."""

    def _output(
        self, hidden: Any, input_ids: Tensor | None, labels: Tensor | None
    ) -> SequenceClassifierOutputWithPast:
        states, padding = hidden.last_hidden_state, self.config.pad_token_id
        if padding is None and len(states) > 1:
            raise ValueError(
                "pad_token_id is not set, so the last token of each row is unknown: set "
                "model.config.pad_token_id, or pass one row at a time"
            )
        if padding is None or input_ids is None:
            last = torch.full((len(states),), states.shape[1] - 1, device=states.device)
        else:
            places = torch.arange(states.shape[1], device=states.device)
            last = (places * (input_ids != padding).to(states.device)).argmax(-1)
        logits = self.score(states[torch.arange(len(states), device=states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        cache = {CACHE_NAME: getattr(hidden, CACHE_NAME)}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **cache)


class TokenScores(Scores):
    """One score per label for each token."""

    dropout: nn.Dropout

    def _output(
        self, hidden: Any, input_ids: Tensor | None, labels: Tensor | None
    ) -> TokenClassifierOutput:
        logits = self.score(self.dropout(hidden.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits)


__all__ = ["SequenceScores", "TokenScores"]
