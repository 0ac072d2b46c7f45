"""The command-line flags that a CPU run of Megatron needs, and those it cannot honour.

``fill_flags`` adds the missing ones whether or not there is a GPU: call it only for runs that
``kvshift_megatron.cpu.enable`` has put on the CPU.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass

# Flag and value (None for a switch).
DEFAULTS: tuple[tuple[str, str | None], ...] = (
    ("--transformer-impl", "local"),
    ("--distributed-backend", "gloo"),
    ("--use-cpu-initialization", None),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-bias-dropout-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-rope-fusion", None),
    ("--no-persist-layer-norm", None),
)


class GPUOnlyFlagError(ValueError):
    """A flag names something that only a GPU has."""


@dataclass(frozen=True)
class Refusal:
    """A flag that a CPU cannot honour.

    Attributes:
        flag: The flag, or a prefix of several flags if it ends in ``*``.
        why: What it needs, to complete the sentence "<flag> needs ...".
        remedy: What to do, in the imperative.
        values: The refused values; empty if any use of the flag is refused.
        unless: Another flag that makes this one harmless.
    """

    flag: str
    why: str
    remedy: str
    values: tuple[str, ...] = ()
    unless: str | None = None

    def matches(self, flag: str, value: str | None) -> bool:
        """Return whether this use of a flag is refused, `unless` aside."""
        if self.flag.endswith("*"):
            return flag.startswith(self.flag[:-1])
        return flag == self.flag and (not self.values or value in self.values)


_DROP = "leave it out on a CPU"
_TE = "Transformer Engine's GPU kernels"
_GRAPHS = "CUDA graphs"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("--transformer-impl", _TE, "use --transformer-impl local",
            ("transformer_engine", "inference_optimized")),
    Refusal("--distributed-backend", "NCCL and GPUs", "use --distributed-backend gloo", ("nccl",)),
    Refusal("--pipeline-model-parallel-comm-backend", "NCCL or UCC and GPUs", _DROP),
    Refusal("--attention-backend", "a GPU attention kernel",
            "use --attention-backend unfused or leave it out", ("flash", "fused")),
    Refusal("--use-flash-attn", "the FlashAttention GPU kernel", _DROP),
    Refusal("--flash-attention-version", "the FlashAttention GPU kernel", _DROP),
    Refusal("--flash-decode", "the FlashAttention GPU kernel", _DROP),
    Refusal("--cross-entropy-fusion-impl", _TE, "use --cross-entropy-fusion-impl native", ("te",)),
    Refusal("--fp8*", "FP8 tensor cores", "leave it out and train in bf16, fp16 or fp32"),
    Refusal("--fp4*", "FP4 tensor cores", "leave it out and train in bf16, fp16 or fp32"),
    Refusal("--te-*", _TE, _DROP),
    Refusal("--use-te-activation-func", _TE, _DROP),
    Refusal("--use-precision-aware-optimizer", _TE, _DROP),
    Refusal("--fused-residual-rmsnorm", _TE, _DROP),
    Refusal("--tp-comm-overlap", _TE, _DROP),
    Refusal("--moe-grouped-gemm", _TE, "leave it out; the experts then run one by one"),
    Refusal("--moe-permute-fusion", _TE, _DROP),
    Refusal("--moe-router-fusion", _TE, _DROP),
    Refusal("--moe-token-dispatcher-type", "DeepEP or HybridEP GPU kernels",
            "use --moe-token-dispatcher-type allgather", ("flex",)),
    Refusal("--moe-enable-deepep", "DeepEP GPU kernels", _DROP),
    Refusal("--cuda-graph-impl", _GRAPHS, "use --cuda-graph-impl none",
            ("local", "transformer_engine", "full_iteration")),
    Refusal("--enable-cuda-graph", _GRAPHS, _DROP),
    Refusal("--external-cuda-graph", _GRAPHS, _DROP),
    Refusal("--optimizer-cuda-graph", _GRAPHS, _DROP),
    Refusal("--use-torch-fsdp2", "a CUDA device mesh", "use --use-distributed-optimizer"),
    Refusal("--use-megatron-fsdp", "CUDA streams and memory pools",
            "use --use-distributed-optimizer"),
    Refusal("--use-nccl-ub", "NCCL user buffers", _DROP),
    Refusal("--use-sharp", "NCCL on InfiniBand switches", _DROP),
    Refusal("--nccl-communicator-config-path", "NCCL", _DROP),
    Refusal("--optimizer-cpu-offload", "a GPU to offload from", _DROP),
    Refusal("--cpu-offloading-num-layers", "a GPU to offload from", _DROP),
    Refusal("--fine-grained-activation-offloading", "a GPU to offload from", _DROP),
    Refusal("--batch-invariant-mode", "Triton GPU kernels", _DROP),
    Refusal("--gpu-sniff-test-interval", "a GPU to test", _DROP),
    Refusal("--log-energy", "NVML", _DROP),
    Refusal("--profile", "the CUDA profiler", "add --use-pytorch-profiler",
            unless="--use-pytorch-profiler"),
    Refusal("--record-memory-history", "the CUDA memory allocator", _DROP),
    Refusal("--dsa-kernel-backend", "GPU kernels", "use --dsa-kernel-backend none",
            ("tilelang", "cudnn")),
)  # fmt: skip


def check_flags(argv: list[str]) -> None:
    """Refuse flags that only a GPU can honour.

    Args:
        argv: The script's arguments, without its name.

    Raises:
        GPUOnlyFlagError: A flag is refused; the message names the first one and the remedy.
    """
    given = list(_given(argv))
    flags = {flag for flag, _ in given}
    for flag, value in given:
        for refusal in REFUSALS:
            if refusal.matches(flag, value) and refusal.unless not in flags:
                shown = f"{flag} {value}" if refusal.values else flag
                raise GPUOnlyFlagError(
                    f"{shown} needs {refusal.why}, and this run is on a CPU: {refusal.remedy}."
                )
    _refuse_unequal_gathers(dict(given))
    _refuse_delta_net_kernels(dict(given))


def _refuse_delta_net_kernels(given: dict[str, str | None]) -> None:
    """Refuse gated delta net outside deterministic mode, which alone computes it in PyTorch."""
    if "G" in (given.get("--hybrid-layer-pattern") or "") and "--deterministic-mode" not in given:
        raise GPUOnlyFlagError(
            "--hybrid-layer-pattern with gated delta net (G) needs FLA's GPU kernels, and this run "
            "is on a CPU: add --deterministic-mode, or leave out G."
        )


def _refuse_unequal_gathers(given: dict[str, str | None]) -> None:
    """Refuse experts that are split over ranks if the dispatcher gathers unequal parts of them."""
    expert_tp = given.get("--expert-tensor-parallel-size")
    ranks = expert_tp or given.get("--tensor-model-parallel-size") or "1"
    if given.get("--moe-token-dispatcher-type") == "alltoall" and ranks != "1":
        raise GPUOnlyFlagError(
            f"--moe-token-dispatcher-type alltoall with experts on {ranks} tensor-parallel ranks "
            "needs NCCL's gathers of unequal sizes, and this run is on a CPU: set "
            "--expert-tensor-parallel-size 1, or use --moe-token-dispatcher-type allgather."
        )


def fill_flags(argv: list[str]) -> list[str]:
    """Add the flags that a CPU needs and that were not given.

    Flags that the installed Megatron does not know are not added. The new ones come first, because
    the last given flag may take any number of values.

    Args:
        argv: The script's arguments, without its name.

    Returns:
        A new list; ``argv`` is not changed.

    Raises:
        GPUOnlyFlagError: See ``check_flags``.
    """
    check_flags(argv)
    given = {flag for flag, _ in _given(argv)}
    known = megatron_flags()
    added: list[str] = []
    for flag, value in DEFAULTS:
        if flag in known and flag not in given:
            added += [flag] if value is None else [flag, value]
    return added + list(argv)


def megatron_flags() -> frozenset[str]:
    """Return every flag that the installed ``megatron.training`` defines."""
    return frozenset(_parser()._option_string_actions)


def megatron_actions() -> dict[str, argparse.Action]:
    """Return what ``megatron.training`` does for a flag, by the argument that it sets."""
    # The first flag of an argument counts: others are older names.
    actions = reversed(list(_parser()._option_string_actions.values()))
    return {action.dest: action for action in actions}


@functools.cache
def _parser() -> argparse.ArgumentParser:
    # Imported late: it takes seconds, and the layer has to be on first.
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def _given(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each flag with its first value, from ``--flag value`` and ``--flag=value``."""
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        if equals:
            yield flag, value
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        yield flag, None if following.startswith("--") else following
