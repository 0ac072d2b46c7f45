"""What `kvshift_megatron.stored` replaces in Megatron; not undone."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap


def load(compared: Wrap) -> list[Substitution]:
    """Return the row for the function by which Megatron reads every checkpoint."""
    reason = "It reads the saved arguments before the weights, and there is no hook after it."
    name = "megatron.training.checkpointing._load_base_checkpoint"
    return [Substitution(name, reason, wrap=compared)]
