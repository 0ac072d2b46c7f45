"""What `kvshift_megatron.training.faults` replaces in Megatron; none of it is undone."""

from typing import Any

from kvshift_megatron.upstream.substitutions import Substitution, Wrap, resolve

_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_SERIALIZATION = "megatron.core.dist_checkpointing.serialization"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_WRITER = f"{_STRATEGIES}.filesystem_async.FileSystemWriterAsync"


def step(checked: Wrap) -> list[Substitution]:
    """Return the row for Megatron's training step."""
    reason = "Megatron does not check the first step of a process, and the loop has no hook."
    return [Substitution(f"{_TRAINING}.train_step", reason, wrap=checked)]


def saves(
    *, save_checkpoint: Wrap, save: Wrap, clean: Wrap, schedule: Wrap, finalize: Wrap
) -> list[Substitution]:
    """Return the rows for a save as a whole, in the foreground and in the background."""
    unhooked = "A save that fails on one rank leaves the others waiting, and there is no hook."
    return [
        Substitution(
            f"{_CHECKPOINTING}.save_checkpoint",
            unhooked,
            wrap=save_checkpoint,
            takes="iteration * non_persistent_ckpt * release *",
        ),
        Substitution(
            f"{_TRAINING}.save_checkpoint",
            "The loop has imported the function of the row above.",
            wrap=lambda _: resolve(_CHECKPOINTING).save_checkpoint,
        ),
        Substitution("megatron.core.dist_checkpointing.save", unhooked, wrap=save),
        Substitution(
            f"{_CHECKPOINTING}.cleanup_old_non_persistent_checkpoint",
            "It would count the folder that is being written.",
            wrap=clean,
            takes="save_dir leave_ckpt_num do_async",
        ),
        Substitution(
            f"{_CHECKPOINTING}.schedule_async_save",
            unhooked,
            wrap=schedule,
            takes="async_request",
        ),
        Substitution(f"{_TRAINING}.maybe_finalize_async_save", unhooked, wrap=finalize),
    ]


def writes(
    *, tracker: Wrap, plan: Wrap, metadata: Wrap, config: Wrap, manifest: Wrap
) -> list[Substitution]:
    """Return the rows for what a rank writes on its own."""
    alone = "An error there leaves the other ranks in the collective that follows."
    return [
        Substitution(
            f"{_CHECKPOINTING}.maybe_msc",
            "The tracker file is written in place, so a crash could leave half of it.",
            wrap=tracker,
            releases=">=0.19",
        ),
        Substitution(f"{_WRITER}.prepare_local_plan", alone, wrap=plan, takes="plan"),
        Substitution(f"{_WRITER}.finish", alone, wrap=metadata, takes="metadata results"),
        Substitution(
            f"{_SERIALIZATION}.save_config", alone, wrap=config, takes="config checkpoint_dir"
        ),
        Substitution(
            f"{_SERIALIZATION}.save_integrity_manifest",
            alone,
            wrap=manifest,
            takes="checkpoint_dir",
        ),
    ]


def comparison(compare: Wrap) -> list[Substitution]:
    """Return the row for the comparison of a checkpoint's hashes before it is loaded."""
    reason = "It refuses a checkpoint that was saved without hashes, and hashes in one thread."
    return [
        Substitution(
            f"{_SERIALIZATION}.verify_integrity_manifest",
            reason,
            wrap=compare,
            takes="checkpoint_dir",
        )
    ]


def one_file(described: Wrap) -> list[Substitution]:
    """Return the row for the writer of one file; `described` makes a static method."""
    reason = "It drops the operating system's error message."
    takes = "* write_bucket *"
    return [Substitution(f"{_WRITER}.write_preloaded_data", reason, wrap=described, takes=takes)]


def all_files(write: staticmethod) -> list[Substitution]:
    """Return the row for the writer of all of a rank's files."""
    reason = "With several files per rank, it may end on an error without reporting a result."
    target = f"{_WRITER}.write_preloaded_data_multithread"
    takes = "transform_list use_msc rank write_buckets global_results_queue"
    return [Substitution(target, reason, value=write, takes=takes)]


def processes(*, async_loop: staticmethod, results_queue: Any) -> list[Substitution]:
    """Return the rows for the processes that a save starts.

    Args:
        async_loop: What the writing process runs.
        results_queue: The function that starts the queue's process.
    """
    return [
        Substitution(
            f"{_STRATEGIES}.async_utils.PersistentAsyncCaller.async_loop",
            "The writing process would outlive a rank that is killed.",
            value=async_loop,
        ),
        Substitution(
            f"{_STRATEGIES}.filesystem_async.get_write_results_queue",
            "The queue's process would outlive a rank that is killed.",
            value=results_queue,
            takes="mp_mode",
        ),
    ]


def results(queue: Any) -> list[Substitution]:
    """Return the row for the queue itself, which Megatron's own function would set."""
    reason = "Megatron looks up this process's queue there."
    return [Substitution(f"{_STRATEGIES}.filesystem_async._results_queue", reason, value=queue)]
