"""Run Megatron's loop so that it takes its steps when it is told to.

    torchrun ... -m tools.benchmarks.step_worker SOCKET <flags of pretrain>

Each rank connects to SOCKET and sends ("ready", rank). It then receives numbers of steps, takes
that many and answers ("window", seconds); to 0 it answers ("end", figures) and the run ends. When
the other end closes the socket, the rank ends at once.
"""

import os
import resource
import sys
import time
from multiprocessing.connection import Client, Connection
from unittest import mock

import torch

from kvshift_megatron import pretrain
from kvshift_megatron.planning.memory import SavedTensors


class Stepper:
    """Wraps Megatron's `train_step` and waits before the first step of each window."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._left = 0
        self._start = None
        self.saved_bytes: int | None = None

    def __call__(self, step, forward_step, data_iterator, model, *rest, **named):
        """Take one step; the first also counts what a layer keeps for its backward pass."""
        if self._left == 0 and not self._next_window():
            return self._finish(step, forward_step, data_iterator, model, rest, named)
        if self.saved_bytes is None:
            with _SavedByLayer(model[0]) as saved:
                result = step(forward_step, data_iterator, model, *rest, **named)
            self.saved_bytes = saved.most
        else:
            result = step(forward_step, data_iterator, model, *rest, **named)
        self._left -= 1
        if self._left == 0:
            _settle()
            self._connection.send(("window", time.perf_counter() - self._start))
        return result

    def _next_window(self) -> bool:
        try:
            self._left = self._connection.recv()
        except EOFError:
            os._exit(1)  # the benchmark is gone
        self._start = time.perf_counter()
        return self._left > 0

    def _finish(self, step, forward_step, data_iterator, model, rest, named):
        from megatron.training import get_args

        figures = {"peak_bytes": _peak_bytes(), "saved_bytes_a_layer": self.saved_bytes}
        self._connection.send(("end", figures))
        result = step(forward_step, data_iterator, model, *rest, **named)
        get_args().train_iters = 0  # the loop checks it after every step
        return result


class _SavedByLayer:
    """Measures the most bytes that one transformer layer keeps for its backward pass."""

    def __init__(self, model: torch.nn.Module):
        from megatron.core.utils import unwrap_model

        self._layer = unwrap_model(model).decoder.layers[0]
        self._parameters = list(model.parameters())
        self.most = 0

    def __enter__(self):
        forward = self._layer.forward

        def counted(*args, **kwargs):
            saved = SavedTensors(self._parameters)
            with saved:
                output = forward(*args, **kwargs)
            self.most = max(self.most, saved.peak)
            return output

        self._patch = mock.patch.object(self._layer, "forward", counted)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def main() -> None:
    """Run `kvshift_megatron.pretrain` with the training step replaced."""
    from kvshift_megatron import cpu

    cpu.enable()
    from megatron.training import training

    connection = Client(sys.argv.pop(1))
    connection.send(("ready", int(os.environ["RANK"])))
    stepper, step = Stepper(connection), training.train_step

    def train_step(*args, **named):
        return stepper(step, *args, **named)

    with mock.patch.object(training, "train_step", train_step):
        pretrain.main()


if __name__ == "__main__":
    main()
