"""Which implementation of the shift runs, and why."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# auto, or the name of an implementation.
VARIABLE = "KVSHIFT_IMPLEMENTATION"
# Operator -> implementation -> the module with its `forward` and `backward`. Imported late, as
# Triton may not be installed.
MODULES = {
    "shift": {"eager": "eager", "cpu": "cpu.kernel", "triton": "triton.launch"},
    "rope_shift": {"triton": "triton.rope_launch"},
}

HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Shift(NamedTuple):
    """What an implementation is chosen for.

    Args:
        device, dtype: Those of keys and values.
        window: Taps per key or value.
        operator: A key of MODULES.
    """

    device: torch.device
    dtype: torch.dtype
    window: int = 2
    operator: str = "shift"


class Choice(NamedTuple):
    """An implementation, and a clause that says why it is not the best one (None if it is)."""

    name: str
    obstacle: str | None


_choices: dict[tuple[str, Shift], Choice] = {}
# Chosen while a CUDA graph was captured, when no trial can run.
_untried: set[Shift] = set()
# What another rank cannot run: Shift without the device's index -> why.
_given_up: dict[Shift, str] = {}


def requested() -> str:
    """Return the value of KVSHIFT_IMPLEMENTATION; auto if it is not set."""
    wanted = os.environ.get(VARIABLE, "auto")
    return "eager" if wanted == "reference" else wanted  # its old name


def implementation(x: Tensor, window: int = 2, operator: str = "shift") -> str:
    """Return the implementation for keys or values like x; log it the first time.

    For "rope_shift", any other than triton means that keys are rotated after the shift.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION names one that does not exist or cannot take them.
        RuntimeError: Kernels that a CUDA graph has captured fail their trial.
    """
    return choose(Shift(x.device, x.dtype, window, operator)).name


def choose(shift: Shift) -> Choice:
    """Do what `implementation` does, without a tensor."""
    wanted = requested()
    if torch.compiler.is_compiling():
        return _decide(wanted, shift)
    # Every layer asks in every pass.
    choice = _choices.get((wanted, shift))
    if choice is None:
        choice = _decide(wanted, shift)
        if _is_final(choice, shift):
            _choices[wanted, shift] = choice
    return choice


def give_up(shift: Shift, reason: str) -> None:
    """Take plain PyTorch instead (for "rope_shift": rotate after the shift), as other ranks must.

    Args:
        shift: On any device of its type.
        reason: A clause for the log.
    """
    _given_up[_on_any(shift)] = reason
    _choices.clear()


@functools.cache
def kernels(operator: str, name: str) -> ModuleType:
    """Return the module of an implementation's `forward` and `backward` for this operator."""
    return importlib.import_module(f"{__package__}.{MODULES[operator][name]}")


def _decide(wanted: str, shift: Shift) -> Choice:
    choices = MODULES["shift"]
    if wanted not in ("auto", *choices):
        raise ValueError(f"{VARIABLE} must be auto or one of {', '.join(choices)}, not {wanted!r}")
    if wanted == "eager":
        return _log(logging.INFO, "eager", f"{VARIABLE}=eager")
    if shift.operator != "shift":
        return _decide_rotation(wanted, shift)
    best = wanted if wanted != "auto" else "cpu" if shift.device.type == "cpu" else "triton"
    obstacle = None if _is_interpreted(wanted) else _why_not(best, shift)
    if obstacle and wanted != "auto":
        raise ValueError(f"{VARIABLE}={wanted}: {obstacle}: set it to auto or eager")
    if obstacle:
        return _log(logging.WARNING, "eager", obstacle)
    why = f"{shift.dtype} on the {shift.device.type} device"
    return _log(logging.INFO, best, why if wanted == "auto" else f"{VARIABLE}={wanted}")


def _decide_rotation(wanted: str, shift: Shift) -> Choice:
    plain = choose(shift._replace(operator="shift"))
    if plain.name != "triton" or _is_interpreted(wanted):
        return plain
    # The plain kernels may be right all the same, also if they are asked for by name.
    obstacle = _why_not("triton", shift)
    if obstacle and not torch.compiler.is_compiling():
        _warn_once(f"kvshift_megatron: keys are rotated after the shift: {obstacle}")
    return Choice("eager", obstacle) if obstacle else plain


def _is_interpreted(wanted: str) -> bool:
    # Triton's interpreter is for tests, which ask for it by name.
    return wanted == "triton" and HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def _is_final(choice: Choice, shift: Shift) -> bool:
    """Whether no trial is left to run; without data there will never be one."""
    if choice.name != "triton" or shift.device.type != "cuda" or _is_interpreted(requested()):
        return True
    from kvshift_megatron.ops.triton.self_check import can_try

    if can_try(shift.device):
        return True
    if torch.cuda.is_available():
        _untried.add(shift)
    return False


def why_not(name: str, device: torch.device, dtype: torch.dtype, window: int = 2) -> str | None:
    """Return a clause that says why kernels cannot shift such tensors; None if they can.

    Args:
        name: cpu or triton.
    """
    return _why_not(name, Shift(device, dtype, window))


def _why_not(name: str, shift: Shift) -> str | None:
    reason = (_why_not_cpu if name == "cpu" else _why_not_triton)(shift)
    if reason or not _given_up:
        return reason
    return _given_up.get(_on_any(shift))


def _on_any(shift: Shift) -> Shift:
    return shift._replace(device=torch.device(shift.device.type))


def _why_not_cpu(shift: Shift) -> str | None:
    if shift.device.type != "cpu":
        return f"the tensors are on the {shift.device.type} device, not on a CPU"
    from kvshift_megatron.ops.cpu import kernel

    if not kernel.supports(shift.dtype):
        return f"the compiled shift does not support {shift.dtype}"
    if shift.window > kernel.MAX_WINDOW:
        return f"the compiled shift supports windows up to {kernel.MAX_WINDOW}, not {shift.window}"
    if reason := kernel.why_not():
        return reason
    from kvshift_megatron.ops.cpu.self_check import self_check

    return self_check(shift.dtype)


def _why_not_triton(shift: Shift) -> str | None:
    # Tensors without data (meta) stand for a GPU's: a dry run asks for their memory.
    if shift.device.type not in ("cuda", "meta"):
        return f"the tensors are on the {shift.device.type} device, not on a GPU"
    if shift.dtype not in _TRITON_DTYPES:
        return f"the kernels support bf16, fp16 and fp32, not {shift.dtype}"
    if not HAS_TRITON:
        return "triton is not installed"
    # A plain import: Dynamo cannot trace importlib.
    from kvshift_megatron.ops.triton.self_check import self_check

    reason = self_check(shift.device, shift.dtype, shift.operator)
    if reason and shift in _untried:
        raise RuntimeError(
            "a CUDA graph has captured the Triton kernels before their trial on this device, and "
            f"now they fail it ({reason}): set {VARIABLE}=eager and start again"
        )
    return reason


def _log(level: int, name: str, reason: str) -> Choice:
    if not torch.compiler.is_compiling():
        _log_once(level, f"kvshift_megatron: implementation of the shift: {name} ({reason})")
    return Choice(name, reason if level == logging.WARNING else None)


def _warn_once(message: str) -> None:
    _log_once(logging.WARNING, message)


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)
