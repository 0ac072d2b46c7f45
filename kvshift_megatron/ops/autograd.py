"""The shift as one node of autograd and one registered operator, whichever kernels compute it."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvshift_megatron.ops.dispatch import MODULES, implementation, kernels


class ShiftOperator:
    """A differentiable shift of keys and values together, or of one of them.

    Eagerly it is an autograd.Function over the chosen kernels, as calling a registered operator
    costs the host several times as much in every layer of every pass. Under torch.compile it is
    the registered operator, which also stands in for the kernels of tensors without data. The
    backward pass saves the raw inputs, the taps and the settings, nothing else.

    Args:
        name: the operator in torch.ops.kvshift_megatron and its key in `dispatch.MODULES`; its
            gradient is ``name``_backward.
        tensors, constants: the schema of the settings, the arguments after inputs and taps.

    Attributes:
        forward, backward: the registered operators, with the signatures of the kernels' functions.
    """

    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor]]

    def __init__(self, name: str, tensors: str, constants: str = ""):
        self._name = name
        self._tensor_count = len(tensors.split(","))
        registered = getattr(torch.ops.kvshift_megatron, name, None)
        if registered is not None:
            # The package is imported again. A second registration would free the operators that
            # the first import still calls.
            self.forward = registered.default
            self.backward = getattr(torch.ops.kvshift_megatron, f"{name}_backward").default
            return
        settings = f"{tensors}, {constants}" if constants else tensors
        arguments = f"Tensor[] inputs, Tensor[] taps, {settings}"
        forward = torch.library.custom_op(
            f"kvshift_megatron::{name}",
            self._forward,
            mutates_args=(),
            schema=f"({arguments}) -> Tensor[]",
        )
        backward = torch.library.custom_op(
            f"kvshift_megatron::{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({arguments}, Tensor[] output_grads) -> Tensor[]",
        )
        forward.register_fake(lambda inputs, *_: [empty(x) for x in inputs])
        backward.register_fake(lambda inputs, taps, *_: [empty(x) for x in (*inputs, *taps)])
        forward.register_autograd(self._differentiate, setup_context=self._save)
        self.forward, self.backward = forward, backward

    def __call__(
        self,
        inputs: Sequence[Tensor],
        taps: Sequence[Tensor],
        tensors: tuple[Tensor | None, ...],
        constants: tuple[bool | float, ...] = (),
        chosen: str | None = None,
    ) -> list[Tensor]:
        """Return as many new, contiguous tensors as there are inputs.

        Args:
            inputs: one or two [s, b, ng, hn] of the same shape, dtype and device; any strides.
            taps: as many [window, ng], fp32 (float64 for float64 inputs).
            tensors, constants: the settings.
            chosen: the implementation, if the caller has already asked for it.
        """
        chosen_kernels, inputs = self.prepare(inputs, len(taps[0]), chosen)
        if chosen_kernels is self and torch.compiler.is_compiling():
            return self.forward(inputs, list(taps), *tensors, *constants)
        return list(_Shift.apply(chosen_kernels, tensors, constants, *inputs, *taps))

    def prepare(
        self, inputs: Sequence[Tensor], window: int, chosen: str | None = None
    ) -> tuple["ModuleType | ShiftOperator", list[Tensor]]:
        """Choose the kernels for a forward pass and its backward pass.

        Returns:
            (kernels, inputs): an object with the functions ``forward`` and ``backward``, and the
            inputs, or copies of them, as the backward pass should save them.
        """
        x = inputs[0]
        is_compiling, on_cpu = torch.compiler.is_compiling(), x.device.type == "cpu"
        if is_compiling and on_cpu:
            # The operator chooses when it runs. Tracing the choice here would trace the build of
            # the C kernel.
            return self, list(inputs)
        chosen = chosen or implementation(x, window)
        if chosen == "triton" and not on_cpu:
            # With few query groups, keys and values are a small part of mixed_qkv, which they would
            # keep alive alone: copies of them cost less memory. On a CPU the queries may still be
            # views of it.
            inputs = [x.clone() if _is_small_part(x, len(inputs)) else x for x in inputs]
        if is_compiling or (chosen != "eager" and _has_no_data(x)):
            return self, list(inputs)
        return kernels(self._name, chosen), list(inputs)

    def _kernels_now(self, x: Tensor, taps: list[Tensor]) -> ModuleType:
        """Choose the kernels while the registered operator runs."""
        chosen = implementation(x, len(taps[0]), self._name)
        if chosen in MODULES[self._name]:
            return kernels(self._name, chosen)
        # torch.compile chose while it traced, before the trial of the kernels could run.
        raise RuntimeError(
            "the Triton kernels compiled into this graph fail their trial on this device (see the "
            "log): set KVSHIFT_IMPLEMENTATION=eager and start again"
        )

    def _forward(self, inputs: list[Tensor], taps: list[Tensor], *settings: Any) -> list[Tensor]:
        outputs = self._kernels_now(inputs[0], taps).forward(inputs, taps, *settings)
        return [x.contiguous() for x in outputs]

    def _backward(
        self, inputs: list[Tensor], taps: list[Tensor], *settings_and_grads: Any
    ) -> list[Tensor]:
        grads = self._kernels_now(inputs[0], taps).backward(inputs, taps, *settings_and_grads)
        grads = [x.contiguous() for x in grads]
        # An operator's results may not share memory, and the taps' gradients may.
        return grads[: len(inputs)] + [grad.clone() for grad in grads[len(inputs) :]]

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        xs, taps, *settings = inputs
        tensors, ctx.constants = settings[: self._tensor_count], settings[self._tensor_count :]
        ctx.save_for_backward(*tensors, *xs, *taps)

    def _differentiate(self, ctx: Any, output_grads: list[Tensor]) -> tuple[Any, ...]:
        grads = _gradients(self, ctx, output_grads)
        count = len(output_grads)
        no_grads = [None] * (self._tensor_count + len(ctx.constants))
        return grads[:count], grads[count:], *no_grads


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chosen_kernels: ModuleType | ShiftOperator,
        tensors: tuple[Tensor | None, ...],
        constants: tuple[bool | float, ...],
        *inputs_and_taps: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(inputs_and_taps) // 2
        ctx.save_for_backward(*tensors, *inputs_and_taps)
        ctx.kernels, ctx.constants = chosen_kernels, constants
        inputs, taps = inputs_and_taps[:count], inputs_and_taps[count:]
        return tuple(chosen_kernels.forward(inputs, taps, *tensors, *constants))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gradients(ctx.kernels, ctx, output_grads)


def _gradients(
    chosen_kernels: ModuleType | ShiftOperator, ctx: Any, output_grads: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the inputs, then those of the taps."""
    count = len(output_grads)
    saved = ctx.saved_tensors
    tensors, inputs, taps = saved[: -2 * count], saved[-2 * count : -count], saved[-count:]
    return chosen_kernels.backward(inputs, taps, *tensors, *ctx.constants, output_grads)


def empty(x: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor of x's shape, dtype and device."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _has_no_data(x: Tensor) -> bool:
    """Whether there is nothing that kernels could read."""
    return x.is_meta or isinstance(x, FakeTensor)


def _is_small_part(x: Tensor, count: int) -> bool:
    """Whether more than half of the memory that x is a view of belongs to none of the inputs."""
    return x.untyped_storage().size() > 2 * count * x.numel() * x.element_size()


SHIFT = ShiftOperator("shift", "Tensor? position")
ROPE_SHIFT = ShiftOperator(
    "rope_shift",
    "Tensor? position, Tensor freqs, Tensor? freq_index",
    "bool interleaved, float mscale",
)
