"""End the run, or go on, on all ranks alike when a checkpoint cannot be written.

`Saves` stands between Megatron's loop and its `save_checkpoint`. Each save begins with an empty
folder and counts once every rank has written its part and rank 0 the tracker file; until then the
previous checkpoint is the newest.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from kvshift_megatron.training.faults import checkpoint_writes, folders, processes
from kvshift_megatron.training.faults.agreement import any_failed
from kvshift_megatron.training.faults.progress import Progress
from kvshift_megatron.upstream import faults_table, substitutions


class SaveFailedError(RuntimeError):
    """A save has failed; raised on every rank alike."""

    def __init__(self, save: "Save", failures: list[str]):
        super().__init__("; ".join(failures))
        self.save = save


class Save:
    """One checkpoint on its way.

    Args:
        iteration: as Megatron counts.
        folder: where it goes; only rank 0 changes it.
    """

    def __init__(self, iteration: int, folder: folders.Folder):
        self.iteration = iteration
        self.folder = folder
        self.failures: list[str] = []  # of this rank
        self.shared = 0  # number of a background save's last steps that every rank takes

    def compare(self) -> None:
        """Raise SaveFailedError if any rank has failed. Collective over all ranks."""
        failures = any_failed("; ".join(self.failures) or None)
        if failures:
            raise SaveFailedError(self, failures)

    def note(self, error: CheckpointException) -> None:
        """Note what Megatron's coordinator gathered and raised on every rank alike."""
        words = [str(failure) for failure, _ in error.failures.values()]
        self.failures += [text.removeprefix("Worker failure: ") for text in words]


class Saves:
    """Every save of this process.

    Args:
        goes_on: whether training goes on after one has failed.
        progress: told of every save.
    """

    def __init__(self, goes_on: bool, progress: Progress):
        self.goes_on, self.progress = goes_on, progress
        self.unsaved: str | None = None  # a sentence about the newest one, if it has failed
        self._current: Save | None = None

    def install(self) -> None:
        """Replace Megatron's functions in this process, once."""
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

            save_dir = folders.save_dir(get_args(), kwargs.get("non_persistent_ckpt", False))
            phase = f"saving the checkpoint of iteration {iteration}"
            if save_dir is None:
                with self.progress.entering(phase):
                    original(iteration, *args, **kwargs)
                return
            folder = folders.Folder(save_dir, iteration, kwargs.get("release", False))
            self._current = save = Save(iteration, folder)
            try:
                with self.progress.entering(phase):
                    self._through(save, functools.partial(original, iteration, *args, **kwargs))
            except SaveFailedError as error:
                self._failed(error)
            finally:
                self._current = None

        return save_checkpoint

    def _through(self, save: Save, megatrons: Callable[[], None]) -> None:
        from megatron.training import get_args

        if torch.distributed.get_rank() == 0:
            try:
                save.folder.begin()
            except OSError as error:
                save.failures.append(checkpoint_writes.sentence(save.folder.path, error))
        save.compare()
        try:
            with checkpoint_writes.noting(save.failures):
                megatrons()
        except checkpoint_writes.TrackerError as error:
            save.failures.append(str(error))
            # The other ranks are in it.
            torch.distributed.barrier()
        if not get_args().async_save:
            self._complete(save)

    def _save(self, original: Callable) -> Callable:
        """Wrap `dist_checkpointing.save`: no tracker file before all ranks have written."""

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
        """Wrap the clean-up: keep as many as asked besides the folder that a save has begun."""

        @functools.wraps(original)
        def clean(save_dir: Any, leave_ckpt_num: int = 1, do_async: bool = False) -> Any:
            begun = self._current is not None
            return original(save_dir, leave_ckpt_num + begun, do_async)

        return clean

    def _schedule(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def schedule_async_save(request: Any) -> None:
            steps = list(request.finalize_fns)
            if self._current is not None and steps:
                finish = functools.partial(self._finish, self._current, steps)
                request.finalize_fns[:] = [finish]
            original(request)

        return schedule_async_save

    def _finish(self, save: Save, steps: list[Callable[[], None]]) -> None:
        """Do what is left when a background save has written its files, on all ranks."""
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
                    # Megatron has taken it off its queue; there may be others.
                    self._failed(error)

        return maybe_finalize_async_save

    def _complete(self, save: Save) -> None:
        save.compare()
        self.unsaved = None
        self.progress.saved = save.iteration
        if torch.distributed.get_rank() == 0:
            save.folder.complete()

    def _failed(self, error: SaveFailedError) -> None:
        """Tidy up and print an error; end this rank, unless training goes on. Collective."""
        save = error.save
        before = None
        if torch.distributed.get_rank() == 0:
            what_is_left = save.folder.give_up()
            before = save.folder.newest()
            print(
                f"kvshift_megatron: ERROR: the checkpoint of iteration {save.iteration} was not "
                f"saved: {error}. {what_is_left} {self._consequence(save.iteration, before)}",
                file=sys.stderr,
                flush=True,
            )
        # No rank ends, and has the launcher end the others, before rank 0 is done.
        found = [before]
        torch.distributed.broadcast_object_list(found, src=0)
        if not self.goes_on:
            sys.exit(1)
        newest = "none" if found[0] is None else f"that of iteration {found[0]}"
        self.unsaved = (
            f"the newest checkpoint, of iteration {save.iteration}, was not saved; the newest that "
            f"is there: {newest}"
        )

    def _consequence(self, iteration: int, before: int | None) -> str:
        lost = f"{iteration - (before or 0)} steps"
        if self.goes_on:
            return f"Training goes on; {lost} would be lost if it ended now."
        return f"The run ends, and {lost} are lost (--on-save-failure stop)."
