"""What `checks` and `stored` replace in Megatron; none of it is undone."""

from kvshift_megatron.upstream.substitutions import Substitution, Wrap

BRIDGE = "megatron.bridge.training.checkpointing"  # Megatron-Bridge's loader


def load(wrap: Wrap) -> list[Substitution]:
    """Return the row for the function by which Megatron loads every checkpoint.

    Each part has its own wrap: `checks` around what will be loaded, `stored` after it has read the
    saved arguments, which is before the weights.
    """
    reason = "Only there is it certain which checkpoint is loaded, and there is no hook."
    name = "megatron.training.checkpointing._load_base_checkpoint"
    return [Substitution(name, reason, wrap=wrap, takes="load_dir args *")]


def bridge(training: Wrap, base: Wrap, weights: Wrap) -> list[Substitution]:
    """Return the rows for Megatron-Bridge's loader.

    Args:
        training: Wraps what restores a training run.
        base: Wraps what it calls to find the checkpoint and to read it.
        weights: Wraps what loads only weights, for inference and conversion.
    """
    reason = "As for Megatron's own loader: there is no hook."
    return [
        Substitution(f"{BRIDGE}._load_checkpoint_from_path", reason, wrap=training),
        Substitution(f"{BRIDGE}._load_base_checkpoint", reason, wrap=base),
        Substitution(f"{BRIDGE}._load_model_weights_from_checkpoint", reason, wrap=weights),
    ]
