"""What `kvshift_megatron.training.metrics` replaces in Megatron and in its TensorBoard writer."""

from typing import Any

from kvshift_megatron.upstream.substitutions import Substitution, Wrap

_TRAINING = "megatron.training.training"
_SUMMARY_WRITER = "torch.utils.tensorboard.SummaryWriter"


def without_tensorboard(writer: Any, writer_class: type) -> list[Substitution]:
    """Return the rows that make Megatron write its numbers to `writer` without TensorBoard."""
    return [
        Substitution(
            "megatron.training.global_vars._GLOBAL_TENSORBOARD_WRITER",
            "Without TensorBoard nothing would receive the metrics, and there is no setter.",
            value=writer,
        ),
        Substitution(
            "megatron.core.timers.SummaryWriter",
            "Timers are written only to writers of this class, which is None without TensorBoard.",
            value=writer_class,
        ),
    ]


def loop(*, log: Wrap, evaluate: Wrap) -> list[Substitution]:
    """Return the rows for what Megatron's loop logs."""
    return [
        Substitution(
            f"{_TRAINING}.training_log",
            "The loop has no hook after its log.",
            wrap=log,
            takes="loss_dict total_loss_dict learning_rate iteration *",
        ),
        Substitution(
            f"{_TRAINING}.evaluate_and_print_results",
            "The loop has no hook after an evaluation.",
            wrap=evaluate,
            takes="prefix *",
        ),
    ]


def tensorboard_writer(
    writer: Any, *, add_scalar: Wrap, add_text: Wrap, flush: Wrap, close: Wrap
) -> list[Substitution]:
    """Return the rows for one SummaryWriter, which keeps the class that Megatron looks for."""
    methods = {"add_scalar": add_scalar, "add_text": add_text, "flush": flush, "close": close}
    reason = "Megatron's writer has no hook, and a full disk would end the run."
    return [
        Substitution(f"{_SUMMARY_WRITER}.{name}", reason, wrap=wrap, owner=writer)
        for name, wrap in methods.items()
    ]
