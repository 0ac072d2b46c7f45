"""Choose what a run trains on: Megatron's GPT datasets, or those of a `--task-module`.

A task module may define any of:
    add_args(parser) -> parser
    train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None) -> three datasets
    BATCH_KEYS: names of additional float32 [seq_length] entries of a sample
    validation_metrics(logits, batch) -> {name: float32 [2], a sum and a count}
        logits: [b, s, vocab / TP], batch: tensors [b, s]; called on the last pipeline stage.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from kvshift_megatron.training.datasets import gpt_datasets_provider


@dataclass
class Task:
    """The parts of a task module, with defaults for those that it lacks."""

    add_args: Callable
    datasets_provider: Callable
    batch_keys: tuple[str, ...] = ()
    validation_metrics: Callable | None = None


def load_task(module_name: str | None) -> Task:
    """Import a task module, or return the default task for None.

    Raises:
        ValueError: The module cannot be imported.
    """
    if module_name is None:
        return Task(add_args=lambda parser: parser, datasets_provider=gpt_datasets_provider)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"task_module={module_name!r} cannot be imported ({error}): give a module's dotted "
            "name, importable from the working directory"
        ) from error
    return Task(
        add_args=getattr(module, "add_args", lambda parser: parser),
        datasets_provider=getattr(
            module, "train_valid_test_datasets_provider", gpt_datasets_provider
        ),
        batch_keys=tuple(getattr(module, "BATCH_KEYS", ())),
        validation_metrics=getattr(module, "validation_metrics", None),
    )
