"""Measure what watching costs per step, with watched and unwatched steps alternating in one run.

    torchrun --nproc-per-node 2 -m tests.training.metrics.measure_cost \
        --metrics-file metrics.jsonl --log-interval 1 <other flags of kvshift_megatron.pretrain>

With --log-interval N, N steps are watched and the next N are not, and so on; the first 2 N warm up
and do not count. The last rank, which has the most to do, prints the median step of both kinds, and
the time per watched step inside this package's calls (and Megatron's calls of its writers). That
time is the result: on a busy machine the medians differ by more than watching costs.
"""

import contextlib
import functools
import statistics
import time
from unittest import mock

from kvshift_megatron import pretrain
from kvshift_megatron.training import metrics


class Clock:
    """Adds up the seconds inside the calls that it is given."""

    def __init__(self):
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return call


@contextlib.contextmanager
def watch_turn_about(original, args, config):
    """Turn `metrics.watch` off and on again, and time it."""
    with original(args, config), contextlib.ExitStack() as stack:
        from megatron.training import global_vars, training

        from kvshift_megatron.training.metrics.tap_statistics import TapStatistics
        from kvshift_megatron.training.metrics.watcher import Watcher

        clock, steps, added = Clock(), {True: [], False: []}, []
        state = {"watched": True, "step": None}
        take = TapStatistics.take
        for owner, name in ((Watcher, "after_log"), (TapStatistics, "take")):
            stack.enter_context(mock.patch.object(owner, name, clock.timed(getattr(owner, name))))
        timed_take = TapStatistics.take
        TapStatistics.take = lambda self: timed_take(self) if state["watched"] else None
        stack.callback(setattr, TapStatistics, "take", take)
        writer = global_vars.get_tensorboard_writer()
        if writer is not None:
            writer.add_scalar = clock.timed(writer.add_scalar)
        with_watching = training.training_log
        without = with_watching.__wrapped__

        def log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
            watched = state["watched"]
            hidden = contextlib.nullcontext()
            if not watched:
                hidden = mock.patch.object(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
            with hidden:
                result = (with_watching if watched else without)(
                    loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named
                )
            now = time.perf_counter()
            if iteration > 2 * args.log_interval:
                steps[watched].append(now - state["step"])
                if watched:
                    added.append(clock.seconds)
            clock.seconds, state["step"] = 0.0, now
            state["watched"] = (iteration // args.log_interval) % 2 == 0
            return result

        stack.enter_context(mock.patch.object(training, "training_log", log))
        yield
        if args.rank == args.world_size - 1:
            off, on = (statistics.median(steps[kind]) for kind in (False, True))
            own = statistics.fmean(added)
            print(
                f"log interval {args.log_interval}: {len(steps[True])} watched steps, median "
                f"{on * 1000:.2f} ms; {len(steps[False])} others, median {off * 1000:.2f} ms; "
                f"inside watching {own * 1000:.3f} ms a step (median "
                f"{statistics.median(added) * 1000:.3f}), {100 * own / off:.3f} % of a step",
                flush=True,
            )


def main() -> None:
    with mock.patch.object(metrics, "watch", functools.partial(watch_turn_about, metrics.watch)):
        pretrain.main()


if __name__ == "__main__":
    main()
