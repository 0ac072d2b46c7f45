"""Make the command line of a dry run: the user's, less what only a GPU can do."""

from argparse import Namespace
from itertools import pairwise

# Flags that change nothing that is counted. Flag -> how many values it takes; -1: any number.
_LEFT_OUT = {
    "--transformer-impl": 1,
    "--distributed-backend": 1,
    "--attention-backend": 1,
    "--use-flash-attn": 0,
    "--cross-entropy-fusion-impl": 1,
    "--tp-comm-overlap": 0,
    "--use-sharp": 0,
    "--use-nccl-ub": 0,
    "--nccl-communicator-config-path": 1,
    "--log-energy": 0,
    "--mock-data": 0,
    "--data-path": -1,
    "--split": 1,
    "--save": 1,
    "--load": 1,
    "--tensorboard-dir": 1,
    "--dataloader-type": 1,
    "--rerun-mode": 1,
    "--log-interval": 1,
    "--fake-process-group": 0,
    "--disable-jit-fuser": 0,
}

_ADDED = (
    "--fake-process-group",
    # Compile nothing: what a function keeps for the backward pass is the same either way.
    "--disable-jit-fuser",
    # Batches come from meta_device.samples.
    "--dataloader-type", "external",
    # Megatron would validate values, and meta tensors have none.
    "--rerun-mode", "disabled",
    "--log-interval", "1000000",
)  # fmt: skip

# What can be counted: attention and MLP, in pipeline stages, with multi-token prediction.
_COUNTED_LAYERS = "*-|/"

_REFUSED = {
    "--sft": "only the data tells where packed documents end; plan without packing",
    "--dataloader-inter-document-masking": "only the data tells where packed documents end; plan "
    "without packing",
    "--num-experts": "only the data tells how many tokens each expert gets; plan a dense model",
    "--use-tp-pp-dp-mapping": "only Megatron's default order of ranks can be planned; drop it",
    "--rampup-batch-size": "plan the final batch size, with --global-batch-size",
    "--use-precision-aware-optimizer": "it needs Transformer Engine's optimizer, which cannot be "
    "built here; plan without it for an upper bound",
}


def dry_run_flags(words: tuple[str, ...]) -> list[str]:
    """Return the command line that a dry run parses.

    Args:
        words: Command line of kvshift_megatron.pretrain.

    Raises:
        ValueError: The cost of a flag cannot be counted without a GPU or data.
    """
    for flag in ("--hybrid-layer-pattern", "--hybrid-override-pattern"):
        _check_pattern(flag, _value_of(flag, words))
    kept, skip = [], 0
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            if flag in _REFUSED:
                raise ValueError(f"{flag} cannot be planned: {_REFUSED[flag]}")
            skip = 0
            if flag in _LEFT_OUT:
                skip = _LEFT_OUT[flag] if "=" not in word else 0
                continue
        elif skip:
            skip -= 1
            continue
        kept.append(word)
    return [*kept, *_ADDED]


def _value_of(flag: str, words: tuple[str, ...]) -> str:
    """Return the last value of a flag that takes one; empty without it."""
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return ([value for name, value in pairwise(words) if name == flag] + joined or [""])[-1]


def _check_pattern(flag: str, pattern: str) -> None:
    kinds = sorted(set(pattern) - set(_COUNTED_LAYERS))
    if "E" in kinds:
        raise ValueError(
            f"{flag} {pattern} cannot be planned: only the data tells how many tokens each expert "
            "(E) gets; plan a dense model, with an MLP (-) in its place"
        )
    if kinds:
        raise ValueError(
            f"{flag} {pattern} cannot be planned: what layers {', '.join(kinds)} keep and compute "
            "is up to a GPU's kernels; only attention (*) and MLP (-) are counted here"
        )


def undo_cpu_choices(args: Namespace, words: tuple[str, ...], kernels: str) -> None:
    """Undo what the CPU layer chose for a CPU.

    Args:
        args: Megatron's validated arguments.
        words: The user's command line, whose choices stay.
        kernels: "gpu" or "cpu".
    """
    # Create the weights on the "GPU": on the host they would take memory.
    args.use_cpu_initialization = False
    # Megatron turns the check off for a fake process group, but it adds a message to each step.
    args.check_for_nan_in_loss_and_grad = "--no-check-for-nan-in-loss-and-grad" not in words
    if kernels == "gpu" and "--no-bias-swiglu-fusion" not in words:
        args.bias_swiglu_fusion = True
