"""What `kvshift_megatron.checks` replaces in Megatron; none of it is undone."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap


def load(checked: Wrap) -> list[Substitution]:
    """Return the row for the function by which Megatron loads every checkpoint."""
    reason = "Only there is it certain which checkpoint is loaded, and there is no hook."
    name = "megatron.training.checkpointing._load_base_checkpoint"
    return [Substitution(name, reason, wrap=checked)]
