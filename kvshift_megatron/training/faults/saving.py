"""Stop or continue on all ranks together if a checkpoint cannot be written.

`Saves` wraps Megatron's `save_checkpoint`. Each save starts with an empty folder, and is complete
once every rank has written its part and rank 0 the tracker file; until then the previous checkpoint
is the latest.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from kvshift_megatron.training.faults import checkpoint_folder, checkpoint_writes, processes
from kvshift_megatron.training.faults.agreement import any_failed
from kvshift_megatron.training.faults.progress import Progress
from kvshift_megatron.upstream import faults_table, substitutions


class SaveFailedError(RuntimeError):
    """A save has failed; raised on every rank."""

    def __init__(self, save: "Save", failures: list[str]):
        super().__init__("; ".join(failures))
        self.save = save


class Save:
    """A checkpoint that is being saved.

    Args:
        iteration: As Megatron counts.
        folder: Of the checkpoint; only rank 0 changes it.
    """

    def __init__(self, iteration: int, folder: checkpoint_folder.Folder):
        self.iteration = iteration
        self.folder = folder
        self.failures: list[str] = []  # of this rank
        self.shared = 0  # how many final steps of a background save every rank takes

    def compare(self) -> None:
        """Raise SaveFailedError if any rank has failed. Collective over all ranks."""
        failures = any_failed("; ".join(self.failures) or None)
        if failures:
            raise SaveFailedError(self, failures)

    def note(self, error: CheckpointException) -> None:
        """Note the failures that Megatron gathered and raised on every rank."""
        words = [str(failure) for failure, _ in error.failures.values()]
        self.failures += [text.removeprefix("Worker failure: ") for text in words]


class Saves:
    """All saves of this process.

    Args:
        goes_on: Whether training continues after a save has failed.
        progress: Gets the phase and the result of every save.
    """

    def __init__(self, goes_on: bool, progress: Progress):
        self.goes_on, self.progress = goes_on, progress
        self.unsaved: str | None = None  # a sentence about the last save, if it has failed
        self._current: Save | None = None

    def install(self) -> None:
        """Replace Megatron's functions, once per process."""
        checkpoint_writes.install()
        processes.install()
        substitutions.apply(
            faults_table.saves(
                save_checkpoint=self._save_checkpoint,
                save=self._save,
                clean=self._clean,
                schedule=self._schedule,
                finalize=self._finalize,
            )
        )

    def _save_checkpoint(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
            from megatron.training import get_args

            save_dir = checkpoint_folder.save_dir(
                get_args(), kwargs.get("non_persistent_ckpt", False)
            )
            phase = f"saving the checkpoint of iteration {iteration}"
            if save_dir is None:
                with self.progress.entering(phase):
                    original(iteration, *args, **kwargs)
                return
            folder = checkpoint_folder.Folder(save_dir, iteration, kwargs.get("release", False))
            self._current = save = Save(iteration, folder)
            try:
                with self.progress.entering(phase):
                    self._run(save, functools.partial(original, iteration, *args, **kwargs))
            except SaveFailedError as error:
                self._failed(error)
            finally:
                self._current = None

        return save_checkpoint

    def _run(self, save: Save, original: Callable[[], None]) -> None:
        """Run Megatron's save, and complete it unless the rest happens in the background."""
        from megatron.training import get_args

        if torch.distributed.get_rank() == 0:
            try:
                save.folder.begin()
            except OSError as error:
                save.failures.append(checkpoint_writes.sentence(save.folder.path, error))
        save.compare()
        try:
            with checkpoint_writes.noting(save.failures):
                original()
        except checkpoint_writes.TrackerError as error:
            save.failures.append(str(error))
            # The other ranks wait in this barrier of Megatron's.
            torch.distributed.barrier()
        if not get_args().async_save:
            self._complete(save)

    def _save(self, original: Callable) -> Callable:
        """Wrap `dist_checkpointing.save`: compare failures before the tracker file is written."""

        @functools.wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            current = self._current
            if current is None:
                return original(*args, **kwargs)
            request = None
            try:
                request = original(*args, **kwargs)
            except CheckpointException as error:
                current.note(error)
            if request is None:
                current.compare()
            else:
                current.shared = len(request.finalize_fns)
            return request

        return save

    def _clean(self, original: Callable) -> Callable:
        """Wrap the clean-up so that it does not count the folder of a save that has begun."""

        @functools.wraps(original)
        def clean(save_dir: Any, leave_ckpt_num: int = 1, do_async: bool = False) -> Any:
            begun = self._current is not None
            return original(save_dir, leave_ckpt_num + begun, do_async)

        return clean

    def _schedule(self, original: Callable) -> Callable:
        """Wrap the scheduling of a background save: `_finish` takes its final steps."""

        @functools.wraps(original)
        def schedule_async_save(request: Any) -> None:
            steps = list(request.finalize_fns)
            if self._current is not None and steps:
                finish = functools.partial(self._finish, self._current, steps)
                request.finalize_fns[:] = [finish]
            original(request)

        return schedule_async_save

    def _finish(self, save: Save, steps: list[Callable[[], None]]) -> None:
        """Complete a background save after it has written its files, on all ranks."""
        with checkpoint_writes.noting(save.failures):
            try:
                for step in steps[: save.shared]:
                    step()
            except CheckpointException as error:
                save.note(error)
            save.compare()
            try:
                for step in steps[save.shared :]:
                    step()
            except checkpoint_writes.TrackerError as error:
                save.failures.append(str(error))
        self._complete(save)

    def _finalize(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> None:
            while True:
                try:
                    with self.progress.entering("waiting for a save in the background"):
                        return original(*args, **kwargs)
                except SaveFailedError as error:
                    # Megatron has removed this save from its queue; there may be others.
                    self._failed(error)

        return maybe_finalize_async_save

    def _complete(self, save: Save) -> None:
        save.compare()
        self.unsaved = None
        self.progress.saved = save.iteration
        if torch.distributed.get_rank() == 0:
            save.folder.complete()

    def _failed(self, error: SaveFailedError) -> None:
        """Clean up and print an error; end this rank unless training continues. Collective."""
        save = error.save
        before = None
        if torch.distributed.get_rank() == 0:
            folder_state = save.folder.give_up()
            before = save.folder.latest()
            print(
                f"kvshift_megatron: ERROR: the checkpoint of iteration {save.iteration} was not "
                f"saved: {error}. {folder_state} {self._consequence(save.iteration, before)}",
                file=sys.stderr,
                flush=True,
            )
        # Otherwise a rank that ends first would have the launcher end rank 0 before it is done.
        found = [before]
        torch.distributed.broadcast_object_list(found, src=0)
        if not self.goes_on:
            sys.exit(1)
        latest = "none" if found[0] is None else f"that of iteration {found[0]}"
        self.unsaved = (
            f"the last checkpoint, of iteration {save.iteration}, was not saved; the latest that "
            f"was: {latest}"
        )

    def _consequence(self, iteration: int, before: int | None) -> str:
        lost = f"{iteration - (before or 0)} steps"
        if self.goes_on:
            return f"Training continues; {lost} would be lost if it ended now."
        return f"The run ends and {lost} are lost (--on-save-failure stop)."
