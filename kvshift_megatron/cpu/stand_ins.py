"""Stand-ins for CUDA streams, events, generators and queries on a CPU.

CPU work is done when the call returns, so it is already in the order that streams would enforce:
there is nothing to wait for, and an event has happened as soon as it is recorded.
"""

import contextlib
import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


class Event:
    """``torch.cuda.Event``: a point in time on the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once: the recorded work is done."""

    def synchronize(self) -> None:
        """Return at once: the recorded work is done."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds from this event to ``end_event``."""
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event._seconds - self._seconds) * 1e3


class Stream:
    """``torch.cuda.Stream``: a CPU's only queue, which is always empty."""

    device = CPU
    device_index = 0
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *args: Any, priority: int = 0, **kwargs: Any) -> None:
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: Any) -> None:
        """Return at once: the other stream's work is done."""

    def wait_event(self, event: Any) -> None:
        """Return at once: the recorded work is done."""

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Return at once: nothing is queued."""

    def query(self) -> bool:
        return True


CURRENT_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    return CURRENT_STREAM


def stream_context(stream: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext(stream)


class DeviceContext(contextlib.nullcontext):
    """``torch.cuda.device``: a context that selects a device."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(device)


class _Generators(tuple):
    """``torch.cuda.default_generators``: every index is the CPU's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:  # type: ignore[override]  # no slices
        return torch.default_generator


DEFAULT_GENERATORS = _Generators((torch.default_generator,))


def current_device() -> torch.device:
    return CPU


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which seeds CUDA too and so would call this function again.
    torch.default_generator.manual_seed(int(seed))


def initial_seed() -> int:
    return torch.default_generator.initial_seed()


def own_random_numbers(original: Callable) -> Callable:
    """Wrap ``DataLoader.__iter__``, which draws a seed from the CPU generator.

    On a GPU that does not affect dropout. Here both share a generator, and a resumed run builds its
    loader after the checkpoint has set the random state, so without this its dropout would differ
    from that of the run it continues.
    """
    host = torch.Generator()

    @functools.wraps(original)
    def iterate(self: Any) -> Any:
        device_state = torch.default_generator.get_state()
        torch.default_generator.set_state(host.get_state())
        try:
            return original(self)
        finally:
            host.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(device_state)

    return iterate


def keep_random_state(original: Callable) -> Callable:
    """Wrap a function to restore the random state: on a GPU its draws leave the CPU's alone."""

    @functools.wraps(original)
    def keep(*args: Any, **kwargs: Any) -> Any:
        state = torch.default_generator.get_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.default_generator.set_state(state)

    return keep


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: on a CPU there is nothing to do."""


def compile_at_first_call(original: Callable) -> Callable:
    """Wrap torch.compile so that a function is compiled when it is first called."""

    @functools.wraps(original)
    def compile(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile, **options)
        if not inspect.isfunction(model):
            return original(model, **options)
        compiled: list[Callable] = []

        @functools.wraps(model)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return model(*args, **kwargs)
            if not compiled:
                compiled.append(original(model, **options))
            return compiled[0](*args, **kwargs)

        return run

    return compile


def not_compiled(function: Callable) -> Callable:
    """Stand in for torch.compile as a decorator: return the function itself."""
    return function


def zero(*args: Any, **kwargs: Any) -> int:
    return 0


def no(*args: Any, **kwargs: Any) -> bool:
    return False


def call_now(function: Any, **kwargs: Any) -> None:
    """Stand in for ``torch.cuda._lazy_call``: CUDA never starts, so its queue would never run."""
    function()


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Stand in for FLA's kernel: scale the last dimension to length one, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def memory_stats(device: Any = None) -> defaultdict:
    return defaultdict(int)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return (0, 0)


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return (0, 0)


def get_device_name(device: Any = None) -> str:
    return "cpu"


def get_device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0, warp_size=0
    )


def same_tensor(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor
