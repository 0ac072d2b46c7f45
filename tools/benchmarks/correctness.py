"""Check results against the definition: a wrong implementation is not measured."""

import torch
from torch import Tensor

from kvshift_megatron.ops.reference import shift_ref
from tools.benchmarks.candidates import Candidate
from tools.benchmarks.inputs import Inputs

_NAMES = ("key", "value", "alpha", "beta")

# Limits of relative errors by dtype: (outputs and inputs' gradients, taps' gradients). Other
# implementations sum and round the latter in their own dtype.
_OWN = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 1e-5)}
_OTHERS = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 5e-2)}


class WrongResult(Exception):
    """An implementation's result differs from the definition's; the message names the tensor."""


class Expected:
    """The outputs and gradients of the definition, in float64."""

    def __init__(self, inputs: Inputs):
        self.tensors: dict[str, Tensor] = {}
        for i, kind in enumerate(_NAMES[:2]):
            x, taps = (
                leaf.detach().double().requires_grad_()
                for leaf in (inputs.leaves[i], inputs.leaves[i + 2])
            )
            output = shift_ref(x, taps)
            gradients = torch.autograd.grad(output, (x, taps), inputs.grads[i].double())
            self.tensors[f"shifted {kind}"] = output.detach()
            self.tensors[f"gradient of {kind}"] = gradients[0]
            self.tensors[f"gradient of {_NAMES[i + 2]}"] = gradients[1]

    def check(self, candidate: Candidate, inputs: Inputs) -> dict[str, float]:
        """Return the candidate's relative errors, by tensor.

        Raises:
            WrongResult: An error is too large, or a result has a wrong shape or dtype.
        """
        outputs = candidate.forward(inputs)
        gradients = torch.autograd.grad(outputs, inputs.leaves, inputs.grads)
        actual = {f"shifted {name}": x for name, x in zip(_NAMES, outputs)}
        actual |= {f"gradient of {name}": x for name, x in zip(_NAMES, gradients)}
        dtype = inputs.grads[0].dtype
        wide, narrow = (_OWN if candidate.own else _OTHERS)[dtype]
        errors = {}
        for name, expected in self.tensors.items():
            of_taps = name.endswith(("alpha", "beta"))
            wanted = torch.float32 if of_taps else dtype
            got = actual[name]
            if got.shape != expected.shape or got.dtype != wanted:
                raise WrongResult(
                    f"{candidate.label}: {name} is {got.dtype} {list(got.shape)}, not {wanted} "
                    f"{list(expected.shape)}"
                )
            error = float((got.detach().double() - expected).norm() / expected.norm())
            errors[name] = error
            limit = narrow if of_taps else wide
            # A comparison with NaN is False, so that NaN is refused.
            if not error <= limit:
                raise WrongResult(
                    f"{candidate.label}: {name} differs from the definition in float64 by "
                    f"{error:.1e}, more than {limit:.0e}"
                )
        return errors
