"""What `checks` and `stored` replace in Megatron; none of it is undone."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap


def load(wrap: Wrap) -> list[Substitution]:
    """Return the row for the function by which Megatron loads every checkpoint.

    Each part has its own wrap: `checks` around what will be loaded, `stored` after it has read the
    saved arguments, which is before the weights.
    """
    reason = "Only there is it certain which checkpoint is loaded, and there is no hook."
    name = "megatron.training.checkpointing._load_base_checkpoint"
    return [Substitution(name, reason, wrap=wrap)]
