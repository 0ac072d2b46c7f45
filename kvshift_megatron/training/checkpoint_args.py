"""`--use-checkpoint-args`: the arguments as they will be once Megatron has read the checkpoint.

Megatron takes some of its own model arguments from a checkpoint and leaves others at what the
command line says, whatever the weights were trained with. Those, and KV shifting's, are taken here.
"""

from argparse import Namespace

from kvshift_megatron.arguments import set_arguments
from kvshift_megatron.stored.saved_arguments import folder_to_load, take_arguments
from kvshift_megatron.stored.settings import is_own_spec, stored_settings, take_settings

# What changes the function of the weights and Megatron (0.19) does not take.
LEFT_BY_MEGATRON = (
    "norm_epsilon",
    "layernorm_epsilon",
    "qk_layernorm",
    "qk_l2_norm",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "no_rope_freq",
    "attention_output_gate",
    "softmax_type",
    "softmax_scale",
    "window_size",
    "window_attn_skip_freq",
    "apply_residual_connection_post_layernorm",
    "layernorm_zero_centered_gamma",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "moe_apply_probs_on_input",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "use_mup",
)


def finished(args: Namespace) -> tuple[Namespace, Namespace | None]:
    """Return the arguments as Megatron will have them, for checks before it has.

    Args:
        args: As parsed; not changed.

    Returns:
        A copy, and the arguments that the checkpoint holds; None unless `--use-checkpoint-args` is
        given and there is a checkpoint.

    Raises:
        ValueError: The checkpoint cannot be read, or a flag contradicts it.
    """
    copy = Namespace(**vars(args))
    if not args.use_checkpoint_args:
        return copy, None
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError(
            "use_checkpoint_args: no checkpoint is named: add --load or --pretrained-checkpoint"
        )
    if args.non_persistent_ckpt_type == "local":
        raise ValueError(
            "use_checkpoint_args with non_persistent_ckpt_type=local: Megatron finds such a "
            "checkpoint only after it has built the model: give the model's flags instead of "
            "--use-checkpoint-args"
        )
    saved = None
    # In Megatron's order: --load has the last word.
    for flag in ("pretrained_checkpoint", "load"):
        saved = take_arguments(copy, flag) or saved
    take_the_rest(copy, saved)
    return copy, saved


def take_the_rest(args: Namespace, saved: Namespace | None) -> None:
    """Set what Megatron does not take from a checkpoint, in place.

    Args:
        args: Megatron's, which has taken what it takes.
        saved: What `finished` returned; None does nothing.

    Raises:
        ValueError: The checkpoint is of a layer spec that this entry point cannot build, or a flag
            contradicts it.
    """
    if saved is None:
        return
    names = [name for name in LEFT_BY_MEGATRON if name in vars(saved) and name in vars(args)]
    set_arguments(args, {name: getattr(saved, name) for name in names})
    if args.spec is not None:
        if not is_own_spec(args.spec):
            raise ValueError(
                f"use_checkpoint_args: the checkpoint in {folder_to_load(args)} was trained with "
                f"--spec {' '.join(map(str, args.spec))}, and this entry point chooses the layer "
                "itself: train it with Megatron's own script"
            )
        args.spec = None  # this entry point builds the same layers
    stored = stored_settings(saved, f"in {folder_to_load(args)}")
    if stored is not None:
        take_settings(args, stored)
