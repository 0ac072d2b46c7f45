"""Megatron's arguments in checkpoints of hybrid models that are GPT models."""

from argparse import Namespace
from pathlib import Path

from kvshift_megatron.checks.model_forms import NAMES, Form, gpt_layers, pattern_in, pattern_of

# What Megatron's hybrid models ignore, and the values for which that changes nothing.
NOT_IN_HYBRID = {"use_rope_scaling": (False, None)}


def hybrid_layers(arguments: Namespace, weights: set[str], checkpoint: Path) -> tuple[int, bool]:
    """Return number of layers of the GPT model that a hybrid one is, and whether they have experts.

    Args:
        arguments: Megatron's, of the checkpoint.
        weights: Stored keys of its weights.
        checkpoint: Its path, for messages.

    Raises:
        ValueError: It is not a GPT model's, or its arguments and tensors contradict each other.
    """
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    pattern = next(filter(None, (getattr(arguments, name, None) for name in names)), None)
    if not isinstance(pattern, str):
        raise ValueError(
            f"{checkpoint} is of {NAMES['hybrid']}, and its arguments do not say which "
            "(hybrid_layer_pattern): save it with Megatron's own training loop"
        )
    try:
        layers = gpt_layers(pattern)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint}: the hybrid layer pattern {pattern} is not that of a GPT model, as it "
            f"has to be: {error}"
        ) from error
    for name, allowed in NOT_IN_HYBRID.items():
        if (value := getattr(arguments, name, None)) not in allowed:
            raise ValueError(
                f"{checkpoint}: its arguments say {name}={value!r}, which Megatron's hybrid models "
                "ignore: what its weights were trained with is not certain"
            )
    if (found := pattern_in(weights)) != pattern_of(*layers):
        raise ValueError(
            f"{checkpoint} holds the layers {found or 'of an unknown kind'}, but its arguments say "
            f"hybrid_layer_pattern={pattern}: they are not of the same model"
        )
    return layers


def take_form(arguments: Namespace, form: Form, num_layers: int, has_experts: bool) -> None:
    """Set in place what a run of that form has in its arguments.

    Args:
        arguments: Megatron's, of a checkpoint of either form.
        form: Of the model.
        num_layers: Of the GPT model.
        has_experts: Whether its layers have experts.
    """
    is_hybrid = form == "hybrid"
    arguments.num_layers = 2 * num_layers if is_hybrid else num_layers
    if hasattr(arguments, "encoder_num_layers"):
        arguments.encoder_num_layers = arguments.num_layers
    if hasattr(arguments, "hybrid_override_pattern"):
        arguments.hybrid_override_pattern = None
    arguments.hybrid_layer_pattern = pattern_of(num_layers, has_experts) if is_hybrid else None
    if not is_hybrid:
        # A pattern says which layers have experts, whatever these say.
        if not has_experts:
            arguments.num_experts = None
        elif hasattr(arguments, "moe_layer_freq"):
            arguments.moe_layer_freq = 1
