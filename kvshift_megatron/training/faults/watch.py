"""A thread of every rank that notices a hang and names the rank that hangs.

The ranks report through the rendezvous store and not by collective operations, so it works while
their main threads are stuck in one. The collective's own time-out would end the run later, and
without naming a rank.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch.distributed import distributed_c10d as c10d

from kvshift_megatron.training.faults import progress as progress_module
from kvshift_megatron.training.faults.diagnosis import Diagnosis, Report, diagnose
from kvshift_megatron.training.faults.fault_flags import DIAGNOSIS, beat
from kvshift_megatron.training.faults.progress import TIMED, Progress

_PATIENCE = 15.0  # seconds to wait for the store
_VERDICT = "verdict"


class StoreLostError(Exception):
    """The rendezvous store does not answer."""


class Watch(threading.Thread):
    """Report for this rank; started by the main thread, which it watches.

    Args:
        store: The rendezvous store, for this thread alone.
        rank: Of this process.
        world_size: Of the launch.
        timeout: Seconds without a sign of progress that count as a hang.
        progress: Of the main thread.
    """

    def __init__(
        self,
        store: torch.distributed.Store,
        rank: int,
        world_size: int,
        timeout: float,
        progress: Progress,
    ):
        super().__init__(name="hang watch", daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout, self.progress = timeout, progress
        self.beat = beat(timeout)
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._beats = 0
        self._reported = 0.0  # `progress.since` of the last hang that was only a warning

    def stop(self) -> None:
        """Stop watching and report that this rank has ended."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self.progress.mark("ended")
        with contextlib.suppress(StoreLostError):
            self._publish()

    def run(self) -> None:
        """Report and look for a verdict or a hang in every beat, until `stop`."""
        before = time.monotonic()
        while not self._ended.wait(self.beat):
            now = time.monotonic()
            if now - before > 3 * self.beat:
                # This process was stopped and continued, as a scheduler does with all of them.
                self.progress.since = now
            before = now
            # From a thread in C: this one cannot run while another thread holds the GIL.
            faulthandler.dump_traceback_later(self.timeout + self.beat, file=_stderr())
            try:
                self._look()
            except StoreLostError as error:
                if self._still() > self.timeout and self.progress.since != self._reported:
                    self._end_alone(error)
            before = time.monotonic()

    def _look(self) -> None:
        self._publish()
        if self._ask(lambda: self.store.check([_VERDICT])):
            self._obey(json.loads(self._ask(lambda: self.store.get(_VERDICT))))
        elif self._still() > self.timeout and self.progress.since != self._reported:
            self._report()

    def _still(self) -> float:
        return time.monotonic() - self.progress.since

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return an answer of the store, from a thread: a call on a lost store never ends."""
        answer: list[Any] = []

        def ask() -> None:
            try:
                answer.append(question())
            except RuntimeError as error:
                answer.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_PATIENCE)
        if not answer or isinstance(answer[0], RuntimeError):
            raise StoreLostError(str(answer[0]) if answer else "no answer")
        return answer[0]

    def _publish(self) -> None:
        self._beats += 1
        still = self._still()
        report = Report(
            self._beats,
            socket.gethostname(),
            os.getpid(),
            progress_module.iteration(),
            self.progress.phase,
            still,
        )
        if still > self.timeout / 2:
            frame = sys._current_frames().get(self._main)
            report = report._replace(
                is_communicating=progress_module.is_communicating(frame),
                calls=_calls(),
                stack=progress_module.stack(frame),
            )
        text = json.dumps(report)
        self._ask(lambda: self.store.set(f"rank {self.rank}", text))

    def _reports(self) -> dict[int, Report]:
        def read() -> dict[int, Report]:
            keys = {rank: f"rank {rank}" for rank in range(self.world_size)}
            # One request if all have reported: thousands of single ones take too long.
            if self.store.check(list(keys.values())):
                texts = self.store.multi_get(list(keys.values()))
                return {rank: Report(*json.loads(text)) for rank, text in zip(keys, texts)}
            there = {rank: key for rank, key in keys.items() if self.store.check([key])}
            return {rank: Report(*json.loads(self.store.get(key))) for rank, key in there.items()}

        return self._ask(read)

    def _report(self) -> None:
        """Find out which rank hangs; the first rank to get here does so for all."""
        hang_since, phase = self.progress.since, self.progress.phase
        ends = phase in TIMED
        occasion = f"{progress_module.iteration()} {phase}"
        said = _VERDICT if ends else f"warned {occasion}"
        number = self._ask(lambda: self.store.add(f"reporters {occasion}", 1))
        # Two reporters are enough; the others only wait for the result.
        first = self._reports() if number <= 2 else {}
        # Long enough for every rank to report again; the next reporter replaces a silent one.
        for _ in range(3 if number == 1 else DIAGNOSIS):
            if self._ended.wait(self.beat) or self.progress.since != hang_since:
                return
            self._publish()
            if self._ask(lambda: self.store.check([said])):
                self._reported = hang_since
                return
        reports = self._reports()
        ranks = set(range(self.world_size)) - {self.rank}
        silent = {
            rank
            for rank in ranks
            if rank not in reports or (rank in first and first[rank].beat == reports[rank].beat)
        }
        diagnosis = diagnose(reports, silent)
        print(self._describe(diagnosis, reports, silent, ends), file=sys.stderr, flush=True)
        verdict = {"hanging": list(diagnosis.hanging)}
        self._ask(lambda: self.store.set(said, json.dumps(verdict)))
        self._reported = hang_since
        if ends:
            self._obey(verdict)

    def _describe(
        self, diagnosis: Diagnosis, reports: dict[int, Report], silent: set[int], ends: bool
    ) -> str:
        lines = [
            f"kvshift_megatron: {'ERROR' if ends else 'WARNING'}: no progress for "
            f"{self._still():.0f} s on rank {self.rank} ({reports[self.rank].at()}; "
            f"--hang-timeout-seconds {self.timeout:g})"
        ]
        for rank, reason in diagnosis.hanging.items():
            report = reports.get(rank)
            what = "hangs" if ends else "keeps the others waiting"
            if report is None:
                lines.append(f"rank {rank} {what}: it has never reported")
                continue
            process = f"rank {rank} (process {report.pid} on {report.host})"
            lines.append(f"{process} {what}, last seen {report.at()}: {reason}")
            if report.stack and rank not in silent:
                lines += [f"stack of rank {rank}:", report.stack.rstrip()]
        if not diagnosis.hanging:
            lines.append(diagnosis.otherwise)
        if ends:
            done, saved = (progress_module.iteration() or 1) - 1, self.progress.latest_saved()
            lines.append(
                f"the run ends; complete steps lost since iteration {saved}: {done - saved}"
            )
        else:
            lines.append(
                "the run continues: in this phase only Megatron's time-out of a collective "
                "operation ends it"
            )
        return "\n".join(lines)

    def _obey(self, verdict: dict) -> None:
        if self.rank in verdict["hanging"] or not verdict["hanging"]:
            print(f"kvshift_megatron: stacks of rank {self.rank}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        # The launcher ends all ranks as soon as one ends: let every rank see the verdict first.
        time.sleep(2 * self.beat)
        _end()

    def _end_alone(self, error: StoreLostError) -> None:
        server = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"kvshift_megatron: ERROR: rank {self.rank} has made no progress for "
            f"{self._still():.0f} s, and the rendezvous store at {server} does not answer "
            f"({error}): the first node or its launcher is lost or stopped",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        if self.progress.phase in TIMED:
            _end()
        self._reported = self.progress.since


def _stderr() -> TextIO:
    """Return the process's own standard error: faulthandler needs one with a file descriptor."""
    return sys.__stderr__ or sys.stderr


def _calls() -> dict[str, int]:
    """Return the number of collective operations started, by process group."""
    world = c10d._world
    calls: dict[str, int] = {}
    left_out = _point_to_point_groups()
    group: Any  # torch's types lack the counter
    for group, name in list(world.pg_names.items()):
        if group not in left_out:
            try:
                calls[name] = group._get_sequence_number_for_group()
            except RuntimeError:  # a backend that does not count
                continue
    return calls


def _point_to_point_groups() -> list[Any]:
    """Return the groups with point-to-point messages: pipeline and context parallelism."""
    from megatron.core import parallel_state as mpu

    if not mpu.is_initialized():
        return []
    return [
        mpu.get_pipeline_model_parallel_group(check_initialized=False),
        mpu.get_context_parallel_group(check_initialized=False),
    ]


def _end() -> None:
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(1)
