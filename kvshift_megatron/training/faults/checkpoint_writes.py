"""Where Megatron writes a checkpoint, a failure is noted instead of raised.

An error that one rank raises by itself (.metadata, metadata.json and the tracker file are rank 0's)
leaves the others in the collective that follows, for ever or until it times out. Noted, it waits
until the ranks compare notes (`saving`). What else goes wrong is raised as ever.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import queue
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.training.faults.fallback import write_tracker
from kvshift_megatron.training.faults.processes import die_with_parent

_noting: list[str] | None = None  # this rank's failures, while a save is under way


class TrackerError(Exception):
    """The tracker file could not be written; the old one is as it was."""


@contextlib.contextmanager
def noting(failures: list[str]) -> Iterator[None]:
    """Note what fails to be written in this block, one sentence each."""
    global _noting
    before, _noting = _noting, failures
    try:
        yield
    finally:
        _noting = before


def sentence(path: object, error: BaseException, wanted: int | None = None) -> str:
    """What could not be written, and where.

    Args:
        wanted: bytes of what was being written.
    """
    # torch.save buries the operating system's words under its own.
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    size = "" if wanted is None else f" of {wanted} bytes"
    rank = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    return f"{rank} could not write {path}{size} ({found or error}; {_free(Path(str(path)))})"


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free} bytes are free there"
    except OSError as error:
        return f"free space unknown: {error}"


def install() -> None:
    """Replace what writes, in this process, once."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing

    if isinstance(checkpointing.maybe_msc, _AtomicTracker):
        return
    checkpointing.maybe_msc = _AtomicTracker(checkpointing.maybe_msc)
    FileSystemWriterAsync.prepare_local_plan = _noted(
        FileSystemWriterAsync.prepare_local_plan, lambda self, _: self.checkpoint_dir
    )
    FileSystemWriterAsync.finish = _noted(
        FileSystemWriterAsync.finish, lambda self, *_: f"{self.checkpoint_dir}/.metadata"
    )
    serialization.save_config = _noted(
        serialization.save_config, lambda _, directory: f"{directory}/metadata.json"
    )
    serialization.save_integrity_manifest = _noted(
        serialization.save_integrity_manifest, lambda directory: f"{directory}/integrity.json"
    )
    _writer_of_files()
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(write_files)


def _noted(original: Callable, where: Callable[..., object]) -> Callable:
    @functools.wraps(original)
    def write(*args: Any) -> Any:
        try:
            return original(*args)
        except Exception as error:
            if _noting is None:
                raise
            _noting.append(sentence(where(*args), error))
            # prepare_local_plan hands on the plan that it was given; the others return nothing.
            return args[1] if original.__name__ == "prepare_local_plan" else None

    return write


_write_files: Callable | None = None  # Megatron's
# Of the last call below: it fails in one function and is asked about it in another.
_last_failure: list[str] = []


def write_files(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any) -> None:
    """Megatron's `write_preloaded_data_multithread`, which always puts an answer into `results`.

    Runs in the rank or in a background process. Megatron's own forgets the operating system's
    words, and with several files a rank it ends the background process on an error without an
    answer, so that the ranks wait for one for ever.
    """
    if multiprocessing.parent_process() is not None:
        die_with_parent()
    answers: queue.Queue = queue.Queue()
    _last_failure.clear()
    try:
        _writer_of_files()(transforms, use_msc, rank, buckets, answers)
        answer = answers.get_nowait()
    except Exception as error:
        answer = error
    if isinstance(answer, Exception):
        answer = RuntimeError(_last_failure[0] if _last_failure else str(answer))
    results.put(answer)


def _writer_of_files() -> Callable:
    """Megatron's, with each file's failure kept in words. A spawned process starts without."""
    global _write_files
    if _write_files is None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync as writer,
        )

        _write_files = writer.write_preloaded_data_multithread
        writer.write_preloaded_data = staticmethod(_described(writer.write_preloaded_data))
    return _write_files


def _described(original: Callable) -> Callable:
    @functools.wraps(original)
    def write_preloaded_data(*args: Any, write_bucket: tuple, **kwargs: Any) -> Any:
        answer = original(*args, write_bucket=write_bucket, **kwargs)
        if answer is not None and isinstance(answer[1], BaseException):
            path, _, (_, tensors) = write_bucket
            wanted = sum(tensor.nbytes for _, tensor in tensors)
            _last_failure.append(sentence(path, answer[1], wanted))
            _forget_frames(answer[1])
        return answer

    return write_preloaded_data


def _forget_frames(error: BaseException) -> None:
    """Cut what an exception holds on to, which is itself among it.

    In the frames are views of io.BytesIO, and CPython crashes where the garbage collector is what
    takes such a cycle apart (seen with 3.12.1).
    """
    chain: list[BaseException | None] = [error]
    while (last := chain.pop()) is not None:
        traceback.clear_frames(last.__traceback__)
        last.__traceback__ = None
        chain.append(last.__cause__ or last.__context__)


class _AtomicTracker:
    """Megatron's file access, with a tracker file that is replaced at once."""

    def __init__(self, access: Any):
        self._access = access

    def __getattr__(self, name: str) -> Any:
        return getattr(self._access, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = Path(str(path))
        if mode != "w" or file.name != TRACKER or "://" in str(path):
            return self._access.open(path, mode, *args, **kwargs)
        return self._replacing(file)

    @contextlib.contextmanager
    def _replacing(self, tracker: Path) -> Iterator[io.StringIO]:
        content = io.StringIO()
        yield content
        try:
            write_tracker(tracker, content.getvalue())
        except OSError as error:
            raise TrackerError(sentence(tracker, error)) from error
