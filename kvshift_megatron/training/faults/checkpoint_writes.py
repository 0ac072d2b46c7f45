"""Note a failure to write part of a checkpoint instead of raising it.

If one rank alone raises (rank 0 writes .metadata, metadata.json and the tracker file), the others
wait in the next collective until it times out. A noted error is raised when the ranks compare
their failures (`saving`). Other errors are raised as before.
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
from kvshift_megatron.checks.integrity import MANIFEST, write_manifest
from kvshift_megatron.training.faults.fallback import write_tracker
from kvshift_megatron.training.faults.processes import die_with_parent
from kvshift_megatron.upstream import faults_table, substitutions

_failures: list[str] | None = None  # this rank's, during a save


class TrackerError(Exception):
    """The tracker file could not be written; the old one is unchanged."""


@contextlib.contextmanager
def noting(failures: list[str]) -> Iterator[None]:
    """Note what cannot be written in this block, one sentence per failure."""
    global _failures
    before, _failures = _failures, failures
    try:
        yield
    finally:
        _failures = before


def sentence(path: object, error: BaseException, wanted: int | None = None) -> str:
    """Return a sentence that says which rank could not write what, and why.

    Args:
        path: Of the file or folder.
        error: What was raised.
        wanted: Bytes that were being written, if known.
    """
    # torch.save hides the operating system's error behind its own.
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
    """Replace the functions that write, once per process."""
    from megatron.training import checkpointing

    if isinstance(checkpointing.maybe_msc, _AtomicTracker):
        return
    substitutions.apply(
        faults_table.writes(
            tracker=_AtomicTracker,
            plan=_noted(lambda self, _: self.checkpoint_dir),
            metadata=_noted(lambda self, *_: f"{self.checkpoint_dir}/.metadata"),
            config=_noted(lambda _, directory: f"{directory}/metadata.json"),
            manifest=lambda _: _noted(lambda directory: f"{directory}/{MANIFEST}")(write_manifest),
        )
    )
    _writer_of_files()
    substitutions.apply(faults_table.all_files(staticmethod(write_files)))


def _noted(where: Callable[..., object]) -> Callable[[Callable], Callable]:
    """Return a decorator that notes an error; `where` returns the path for the call's arguments."""

    def noted(original: Callable) -> Callable:
        @functools.wraps(original)
        def write(*args: Any) -> Any:
            try:
                return original(*args)
            except Exception as error:
                if _failures is None:
                    raise
                _failures.append(sentence(where(*args), error))
                # prepare_local_plan returns the plan it was given; the others return nothing.
                return args[1] if original.__name__ == "prepare_local_plan" else None

        return write

    return noted


_write_files: Callable | None = None  # Megatron's
# Of the last `write_files`: noted in `write_preloaded_data`, read in `write_files`.
_last_failure: list[str] = []


def write_files(transforms: list, use_msc: bool, rank: int, buckets: list, results: Any) -> None:
    """Call Megatron's `write_preloaded_data_multithread` and always put a result into `results`.

    Runs in the rank or in a background process. Megatron's own drops the operating system's error
    message, and with several files per rank it ends the background process on an error without a
    result, for which the ranks then wait for ever.
    """
    if multiprocessing.parent_process() is not None:
        die_with_parent()
    own_results: queue.Queue = queue.Queue()
    _last_failure.clear()
    try:
        _writer_of_files()(transforms, use_msc, rank, buckets, own_results)
        answer = own_results.get_nowait()
    except Exception as error:
        answer = error
    if isinstance(answer, Exception):
        answer = RuntimeError(_last_failure[0] if _last_failure else str(answer))
    results.put(answer)


def _writer_of_files() -> Callable:
    """Return Megatron's function, after making it note each file's failure.

    A spawned process has not called `install`.
    """
    global _write_files
    if _write_files is None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync as writer,
        )

        _write_files = writer.write_preloaded_data_multithread
        substitutions.apply(faults_table.one_file(_described))
    return _write_files


def _described(original: Callable) -> staticmethod:
    @functools.wraps(original)
    def write_preloaded_data(*args: Any, write_bucket: tuple, **kwargs: Any) -> Any:
        answer = original(*args, write_bucket=write_bucket, **kwargs)
        if answer is not None and isinstance(answer[1], BaseException):
            path, _, (_, tensors) = write_bucket
            wanted = sum(tensor.nbytes for _, tensor in tensors)
            _last_failure.append(sentence(path, answer[1], wanted))
            _forget_frames(answer[1])
        return answer

    return staticmethod(write_preloaded_data)


def _forget_frames(error: BaseException) -> None:
    """Remove an exception's references to frames, which in turn refer to the exception.

    The frames hold views of io.BytesIO, and CPython crashes if the garbage collector has to break
    such a cycle (seen with 3.12.1).
    """
    chain: list[BaseException | None] = [error]
    while (last := chain.pop()) is not None:
        traceback.clear_frames(last.__traceback__)
        last.__traceback__ = None
        chain.append(last.__cause__ or last.__context__)


class _AtomicTracker:
    """Megatron's file access, except that the tracker file is replaced atomically."""

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
