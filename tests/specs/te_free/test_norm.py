"""The TE-free norms."""

import pytest
import torch

from kvshift_megatron.specs.te_free import SequenceParallelNorm
from tests.support.compare import assert_close_rel
from tests.support.single_process import transformer_config


def norm_in_float64(x, weight, bias, eps):
    x = x.double()
    if bias is None:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize(
    ("normalization", "torch_norm"),
    [("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)],
)
def test_equals_torch_and_the_formula(normalization, torch_norm, eps):
    config = transformer_config(normalization=normalization)
    norm = SequenceParallelNorm(config=config, hidden_size=16, eps=eps)
    assert type(norm) is torch_norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(16))
    expected = torch_norm(16, eps=eps)
    expected.load_state_dict(norm.state_dict())
    x = torch.randn(3, 2, 16)
    assert torch.equal(norm(x), expected(x))
    formula = norm_in_float64(x, norm.weight, getattr(norm, "bias", None), eps)
    assert_close_rel("norm", norm(x), formula)
    with pytest.raises(AssertionError, match="norm: relative error"):
        assert_close_rel("norm", norm(x * x), formula)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_every_parameter_says_whether_its_gradient_is_partial(normalization, sequence_parallel):
    config = transformer_config(normalization=normalization)
    config.sequence_parallel = sequence_parallel  # TransformerConfig itself refuses it without TP
    norm = SequenceParallelNorm(config, 16)
    parameters = dict(norm.named_parameters())
    assert set(parameters) == ({"weight", "bias"} if normalization == "LayerNorm" else {"weight"})
    for parameter in parameters.values():
        assert parameter.sequence_parallel is sequence_parallel


def test_it_takes_the_arguments_of_wrapped_torch_norm():
    norm = SequenceParallelNorm(
        transformer_config(),
        16,
        1e-5,
        persist_layer_norm=False,
        zero_centered_gamma=False,
        normalization="LayerNorm",
    )
    # As in Megatron's WrappedTorchNorm, the configuration decides.
    assert type(norm) is torch.nn.RMSNorm


def test_refusals_name_the_setting_and_the_remedy():
    config = transformer_config()
    config.layernorm_zero_centered_gamma = True
    with pytest.raises(ValueError, match=r"layernorm_zero_centered_gamma.*--apply-layernorm-1p"):
        SequenceParallelNorm(config, 16)
    config = transformer_config()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match=r"normalization='L2Norm'.*RMSNorm"):
        SequenceParallelNorm(config, 16)
