"""What this package's model builders replace while Megatron builds a model."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap

_GPT = "megatron.training.models.gpt"


def converted_specs(*, layers: Wrap, mtp: Wrap) -> list[Substitution]:
    """Return the rows for the layer specs and for those of multi-token prediction."""
    reason = (
        "Megatron makes the MTP spec from its own layer specs, whatever the configuration names, "
        "and offers no hook."
    )
    return [
        Substitution(
            f"{_GPT}.default_layer_spec",
            reason,
            wrap=layers,
            takes="config vp_stage",
            releases=">=0.19",
        ),
        Substitution(
            f"{_GPT}.mtp_block_spec",
            reason,
            wrap=mtp,
            takes="config transformer_layer_spec vp_stage",
            releases=">=0.19",
        ),
    ]


def local_final_norm(norm: type) -> list[Substitution]:
    """Return the row for the norm after the last layer of a hybrid stack without TE."""
    reason = "A hybrid stack ends with Transformer Engine's norm, whatever its spec names."
    places = {
        "megatron.core.models.hybrid.hybrid_block": ">=0.18",
        "megatron.core.ssm.mamba_block": "<0.18",
    }
    return [
        Substitution(f"{module}.TENorm", reason, value=norm, releases=releases)
        for module, releases in places.items()
    ]
