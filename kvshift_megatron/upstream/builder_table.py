"""What `kvshift_megatron.training.gpt_builder` replaces while Megatron builds a model."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap

_GPT = "megatron.training.models.gpt"


def converted_specs(*, layers: Wrap, mtp: Wrap) -> list[Substitution]:
    """Return the rows for the layer specs and for those of multi-token prediction."""
    reason = (
        "Megatron makes the MTP spec from its own layer specs, whatever the configuration names, "
        "and offers no hook."
    )
    return [
        Substitution(f"{_GPT}.default_layer_spec", reason, wrap=layers, releases=">=0.19"),
        Substitution(f"{_GPT}.mtp_block_spec", reason, wrap=mtp, releases=">=0.19"),
    ]
