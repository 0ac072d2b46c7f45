"""What `kvshift_megatron.planning` replaces to count a step, and to run one without storage.

Some rows of a dry run have targets in this package, whose modules have captured functions and
devices.
"""

from collections.abc import Callable
from typing import Any

from kvshift_megatron.upstream.substitutions import Substitution, Wrap

_TRAINING = "megatron.training.training"
_TE_FREE = "kvshift_megatron.specs.te_free"


def steps(train_step: Wrap) -> list[Substitution]:
    """Return the row for counting the steps of Megatron's loop."""
    reason = "The loop has no hook around a step."
    takes = "forward_step_func data_iterator model optimizer *"
    return [Substitution(f"{_TRAINING}.train_step", reason, wrap=train_step, takes=takes)]


def micro_batches(count: int) -> list[Substitution]:
    """Return the row that fixes the number of micro-batches of the next step."""
    reason = "Megatron's loop reads the number of micro-batches of a step there."
    return [Substitution(f"{_TRAINING}.get_num_microbatches", reason, value=lambda: count)]


def optimizer_step(optimizer: Any, step: Wrap) -> list[Substitution]:
    """Return the row for one optimizer's step."""
    reason = "The optimizer has no hook before its step."
    target = "megatron.core.optimizer.optimizer.MegatronOptimizer.step"
    return [Substitution(target, reason, wrap=step, owner=optimizer)]


def resizes(resize: Wrap) -> list[Substitution]:
    """Return the row for changes of a storage's size."""
    reason = "Nothing reports that a storage is resized."
    return [Substitution("torch.UntypedStorage.resize_", reason, wrap=resize)]


def kernels_of_a_cpu(attention: Wrap) -> list[Substitution]:
    """Return the row for torch's kernels on a CPU."""
    return [
        Substitution(
            f"{_TE_FREE}.sdpa.scaled_dot_product_attention",
            "On meta torch uses a decomposition, which keeps more than a CPU's kernel does.",
            wrap=attention,
        )
    ]


def kernels_of_a_gpu(
    *, attention: Callable, whole_attention: Callable, rms_norm: Wrap
) -> list[Substitution]:
    """Return the rows for the kernels of Transformer Engine and of this package."""
    return [
        Substitution(
            f"{_TE_FREE}.sdpa.scaled_dot_product_attention",
            "On meta torch uses a decomposition, which keeps more than a GPU's kernel does.",
            value=attention,
        ),
        Substitution(
            f"{_TE_FREE}.core_attention.blockwise_attention",
            "A GPU's kernel needs no blocks, because it holds no mask in memory.",
            value=whole_attention,
        ),
        Substitution(
            "torch.nn.functional.rms_norm",
            "On meta torch uses a decomposition, which keeps more than a GPU's kernel does.",
            wrap=rms_norm,
        ),
    ]


def meta_device(
    device: Any, *, norm: Callable, tensor_type: Wrap, build_model: Wrap
) -> list[Substitution]:
    """Return the rows that send a GPU's tensors to the meta device.

    Args:
        device: The meta device.
        norm: Stands in for the norm of a list of gradients.
        tensor_type, build_model: Wrap `Tensor.type` and the builders' `build_model`.
    """
    layer = "The CPU layer puts there what Megatron puts on a GPU."
    return [
        Substitution("kvshift_megatron.cpu.devices.CPU", layer, value=device),
        Substitution("kvshift_megatron.cpu.stand_ins.CPU", layer, value=device),
        Substitution(
            "megatron.core.optimizer.clip_grads.l2_norm_impl",
            "It reads every gradient's norm back to the host, and a GPU's kernel does not.",
            value=norm,
        ),
        Substitution(
            "torch.Tensor.type",
            "The optimizer sorts parameters by the type names of a GPU's tensors.",
            wrap=tensor_type,
        ),
        *(
            Substitution(
                f"kvshift_megatron.training.{builder}.build_model",
                "Moving a built module to meta would make parameters without Megatron's "
                "attributes.",
                wrap=build_model,
                releases=">=0.19",
            )
            for builder in (
                "gpt_builder.KVShiftGPTModelBuilder",
                "hybrid_builder.KVShiftHybridModelBuilder",
            )
        ),
    ]


def loop_without_values(*, compile_nothing: Callable, agree: Wrap) -> list[Substitution]:
    """Return the rows for Megatron's loop on the meta device."""
    return [
        Substitution(
            f"{_TRAINING}.set_jit_fusion_options",
            "It warms up compiled functions, and a dry run compiles nothing.",
            value=compile_nothing,
        ),
        Substitution(
            f"{_TRAINING}.logical_and_across_model_parallel_group",
            "It reads a value back, and a meta tensor has none.",
            wrap=agree,
            takes="input *",
        ),
        Substitution(
            "kvshift_megatron.checks.model.assert_kv_shift",
            "It asks the other pipeline stages for their layers, and a dry run has one rank.",
            value=lambda model, kv_shift: "attention: not checked",
        ),
    ]
