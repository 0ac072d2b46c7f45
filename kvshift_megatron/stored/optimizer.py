"""What a checkpoint's optimizer state was trained with, against what a run would load it into.

Megatron compares the schedule after it has loaded the weights, with the scheduler's own names for
the values, and finds another kind of optimizer by a missing key. Here the flags are compared first.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

# Value of Megatron's OptimizerParamScheduler -> the arguments that it comes from.
_SOURCES = {
    "max_lr": ("lr",),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    "lr_decay_steps": ("lr_decay_iters", "lr_decay_samples"),
    "lr_decay_style": ("lr_decay_style",),
    "start_wd": ("weight_decay", "start_weight_decay"),
    "end_wd": ("weight_decay", "end_weight_decay"),
    "wd_incr_steps": ("train_iters", "train_samples"),
    "wd_incr_style": ("weight_decay_incr_style",),
}
# They change the steps of a schedule, which counts samples.
_LENGTHS = ("train_iters", "train_samples", "global_batch_size")
_SETTLED = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
_NEEDED = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
_RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
_SWITCHES = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")


def refuse_other_optimizer(saved: Namespace, state: Mapping, args: Namespace, folder: Any) -> None:
    """Raise ValueError if Megatron would load an optimizer state that is not this run's.

    Args:
        saved: The checkpoint's arguments.
        state: What else Megatron has read of it.
        args: The run's, after Megatron has made its schedule.
        folder: The checkpoint's, for the message.
    """
    ours = schedule(args)
    if not ours or not _loads_optimizer(saved, args):
        return
    kinds = list(_other_kind(saved, args))
    if kinds:
        raise ValueError(
            f"load: the optimizer state of the checkpoint {folder} cannot be loaded, because "
            f"{'; '.join(kinds)}: use the same flags, or add --no-load-optim to go on at its step "
            "with a new optimizer state and schedule, or --finetune to start over from its weights"
        )
    if any(getattr(args, name, False) for name in _SETTLED):
        return
    theirs = state.get("opt_param_scheduler") or schedule(saved)
    names = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if names:
        raise ValueError(
            f"load: the checkpoint {folder} was trained with another schedule: "
            f"{'; '.join(_differences(names, saved, args, theirs, ours))}: give the "
            "checkpoint's values, or add --override-opt_param-scheduler to go on with this run's, "
            "--use-checkpoint-opt_param-scheduler to go on with the checkpoint's, or --finetune to "
            "start over from its weights"
        )


def schedule(args: Namespace) -> dict[str, Any]:
    """Return the values that Megatron's scheduler compares; empty if `args` state no schedule.

    Those of a script without training state none.
    """
    if any(not hasattr(args, name) for name in _NEEDED) or args.lr is None:
        return {}
    batch = getattr(args, "global_batch_size", None)
    if getattr(args, "train_iters", None) and batch:
        total = args.train_iters * batch
        decay = (args.lr_decay_iters or args.train_iters) * batch
        warmup = args.lr_warmup_iters * batch
    elif getattr(args, "train_samples", None):
        total = args.train_samples
        decay, warmup = args.lr_decay_samples or args.train_samples, args.lr_warmup_samples
    else:
        return {}
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "max_lr": float(args.lr),
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
    }


def _loads_optimizer(saved: Namespace, args: Namespace) -> bool:
    leaves = ("finetune", "no_load_optim", "skip_train", "perform_rl_step")
    return not (
        any(getattr(args, name, False) for name in leaves) or getattr(saved, "no_save_optim", False)
    )


def _other_kind(saved: Namespace, args: Namespace) -> Iterator[str]:
    """Yield why Megatron would not find this run's state in the checkpoint."""
    theirs, ours = getattr(saved, "optimizer", None), getattr(args, "optimizer", None)
    if theirs is not None and ours is not None and theirs != ours:
        yield f"--optimizer was {theirs} and is {ours}"
        return
    for name in _SWITCHES:
        theirs, ours = getattr(saved, name, None), getattr(args, name, None)
        if theirs is not None and ours is not None and bool(theirs) != bool(ours):
            had, has = ("with", "without") if theirs else ("without", "with")
            yield f"it was saved {had} --use-distributed-optimizer, and this run is {has} it"
            return
    if getattr(args, "use_megatron_fsdp", False):
        return
    theirs, ours = _precision(saved), _precision(args)
    is_distributed = any(getattr(args, name, False) for name in _SWITCHES)
    keeps_copies = {theirs, ours} & {"fp32"} and not is_distributed
    is_by_precision = is_distributed and not getattr(
        saved, "dist_ckpt_optim_fully_reshardable", False
    )
    if theirs != ours and (keeps_copies or is_by_precision):
        yield f"its precision was {theirs} and is {ours}"
    if _finds_by_rate():
        for name in _RATES:
            theirs, ours = getattr(saved, name, None), getattr(args, name, None)
            if hasattr(saved, name) and theirs != ours:
                yield (
                    f"{_flag(name)} was {_value(theirs)} and is {_value(ours)}, by which this "
                    "release of Megatron finds the state of a parameter, even with "
                    "--override-opt_param-scheduler"
                )


def _precision(args: Namespace) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")


def _finds_by_rate() -> bool:
    """Return whether Megatron tells groups of parameters apart by their rates, as 0.19 does."""
    from megatron.core.optimizer import optimizer

    return "max_lr" in getattr(optimizer, "param_group_identifier_keys", ())


def _differences(
    names: list[str],
    saved: Namespace,
    args: Namespace,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> Iterator[str]:
    """Yield each difference: the flag with both values, or the scheduler's value if none differs.

    Megatron fills in --lr-decay-iters from --train-iters, so the latter explains both.
    """
    told: list[str] = []
    for name in names:
        steps = name.endswith("_steps")
        sources = [*(_LENGTHS if steps else ()), *_SOURCES[name]]
        flags = [one for one in sources if getattr(saved, one, None) != getattr(args, one, None)]
        if steps and any(one in _LENGTHS for one in flags):
            flags = [one for one in flags if one in _LENGTHS or one.startswith("lr_warmup")]
        # What Megatron derives from another flag is left out.
        if "weight_decay" in flags:
            flags = ["weight_decay"]
        if "train_samples" in flags or getattr(args, "train_samples", None):
            flags = [one for one in flags if one != "train_iters"]
        for one in flags:
            flag = _flag(one)
            if flag not in told:
                told.append(flag)
                yield (
                    f"{flag} was {_value(getattr(saved, one, None))} and is "
                    f"{_value(getattr(args, one, None))}"
                )
        if not flags:
            yield f"the scheduler's {name} was {theirs[name]} and is {ours[name]}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)
