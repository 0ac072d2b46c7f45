"""The compiled shift on the CPU against the definition in float64, and against planted errors."""

import os
import re

import pytest
import torch

from kvshift_megatron.ops import shift_ref
from kvshift_megatron.ops.cpu import build, cache_folders, kernel, self_check
from tests.support.compare import relative_error

pytestmark = pytest.mark.slow

# [s, b, ng, hn]: whole vectors and odd sizes, fewer tokens than the window, several blocks.
SHAPES = [
    (67, 2, 3, 128),
    (70, 3, 2, 40),
    (5, 1, 1, 7),
    (1, 2, 4, 64),
    (3, 3, 1, 33),
    (300, 1, 2, 64),
]
# Rounding once to bf16; the error of fp32.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def kernel_is_ready():
    assert kernel.why_not() is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(shape, dtype, window, packed=False, count=2, seed=0):
    """Return the arguments of `backward`; keys and values are views, as in Megatron."""
    generator = torch.Generator().manual_seed(seed)
    tokens, samples, groups, head = shape

    def normal(*size):
        return torch.randn(size, generator=generator)

    mixed = normal(tokens, samples, groups, 4 * head).to(dtype)
    inputs = list(mixed.split([2 * head, head, head], dim=-1)[1:])[:count]
    taps = [normal(window, groups) for _ in inputs]
    # One contiguous gradient and one permuted.
    grads = [normal(*shape).to(dtype), normal(groups, tokens, samples, head).to(dtype)]
    grads = [grads[0], grads[1].permute(1, 2, 0, 3)][:count]
    position = None
    if packed:
        starts = torch.zeros(tokens, dtype=torch.bool)
        starts[torch.randint(tokens, (5,), generator=generator)] = True
        index = torch.arange(tokens)
        position = index - torch.where(starts, index, 0).cummax(0).values
    return inputs, taps, position, grads


def check(inputs, taps, position, grads, outputs, gradients):
    """Compare outputs to the bit, gradients within rounding, those of the taps with their terms."""
    count, dtype = len(inputs), inputs[0].dtype
    assert len(outputs) == count and len(gradients) == 2 * count
    for n, (x, tap, dy) in enumerate(zip(inputs, taps, grads)):
        dx, dtap = gradients[n], gradients[count + n]
        assert all(y.shape == x.shape and y.is_contiguous() for y in (outputs[n], dx))
        assert outputs[n].dtype == dx.dtype == dtype and dtap.dtype == torch.float32
        assert torch.equal(outputs[n], shift_ref(x, tap, position)), "output"
        x, tap = (leaf.detach().double().requires_grad_() for leaf in (x, tap))
        exact = shift_ref(x, tap, position)
        assert relative_error(outputs[n], exact) <= ROUNDING[dtype], "output"
        exact.backward(dy.double())
        assert relative_error(dx, x.grad) <= ROUNDING[dtype], "input gradient"
        assert dtap.shape == tap.shape, "taps"
        error = (dtap - tap.grad).norm()
        # Relative to the size of the terms, as the sums may cancel.
        terms = (x.detach().abs() * dy.double().abs()).sum((0, 1, 3)).norm()
        assert error <= 2e-7 * terms, "taps"


def check_case(*arguments):
    inputs, taps, position, grads = arguments
    outputs = kernel.forward(inputs, taps, position)
    check(*arguments, outputs, kernel.backward(inputs, taps, position, grads))


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_and_gradient_is_the_definition(shape, dtype, packed):
    for window in (2, 3, 4, 5, kernel.MAX_WINDOW):
        for count in (1, 2):
            check_case(*draw(shape, dtype, window, packed, count, seed=window))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_bits_depend_on_neither_threads_nor_how_the_outputs_are_stored(dtype, monkeypatch, threads):
    arguments = draw((300, 2, 2, 64), dtype, 3, packed=True)
    inputs, taps, position, grads = arguments
    monkeypatch.setattr(kernel, "_GRAIN", 0)
    results = []
    for number, past_caches in ((1, 2**40), (1, 2**40), (2, 2**40), (3, 2**40), (2, 0)):
        threads(number)
        monkeypatch.setattr(kernel, "_PAST_CACHES", past_caches)
        outputs = kernel.forward(inputs, taps, position)
        gradients = kernel.backward(inputs, taps, position, grads)
        check(*arguments, outputs, gradients)
        results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nothing_crosses_a_document_boundary(dtype, poison):
    inputs, taps, _, grads = draw((9, 2, 3, 40), dtype, 3)
    position = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    clean = kernel.forward(inputs, taps, position)
    clean_dx = kernel.backward(inputs, taps, position, grads)[:2]
    inputs, grads = [x.clone() for x in inputs], [dy.clone() for dy in grads]
    for tensor in (*inputs, *grads):
        tensor[4] = poison
    outputs = kernel.forward(inputs, taps, position)
    dx = kernel.backward(inputs, taps, position, grads)[:2]
    others = torch.arange(9) != 4
    for one, two in zip((*clean, *clean_dx), (*outputs, *dx)):
        assert not two[4].isfinite().any()
        assert torch.equal(one[others], two[others])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_what_is_not_finite_comes_out_as_in_the_definition(dtype):
    inputs, taps, _, _ = draw((6, 1, 2, 40), dtype, 2, count=1)
    x = inputs[0].clone()
    x[1, 0, 0, ::3], x[3, 0, 1, 1::3], x[4, 0, 1, :] = float("nan"), float("-inf"), 3e38
    expected = shift_ref(x, taps[0] * 3)
    assert expected.isnan().any() and expected.isinf().any()
    output = kernel.forward([x], [taps[0] * 3], None)[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_are_one_number_or_empty_tensors():
    inputs, taps, position, _ = draw((5, 2, 3, 8), torch.float32, 2)
    ones = torch.ones(()).expand(5, 2, 3, 8)
    check_case(inputs, taps, position, [ones, ones])
    empty = torch.empty(0, 2, 3, 8)
    dx, dtaps = kernel.backward([empty], taps[:1], None, [empty])
    assert dx.shape == empty.shape and not dtaps.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, taps, position, dy: (x, [tap.flip(0) for tap in taps], position, dy),
        lambda x, taps, position, dy: (x, [tap[:-1] for tap in taps], position, dy),
        lambda x, taps, position, dy: (x, [tap.roll(1, 1) for tap in taps], position, dy),
        lambda x, taps, position, dy: (x, taps, None, dy),
        lambda x, taps, position, dy: (x[::-1], taps, position, dy),
    ],
    ids=["taps swapped", "a tap forgotten", "another group's", "no boundaries", "keys for values"],
)
def test_the_comparison_sees_a_wrong_shift(change):
    arguments = draw((67, 2, 3, 128), torch.bfloat16, 3, packed=True)
    x, taps, position, dy = change(*arguments)
    outputs = kernel.forward(x, taps, position)
    right = kernel.forward(*arguments[:3])
    gradients = kernel.backward(*arguments)
    with pytest.raises(AssertionError, match="output"):
        check(*arguments, outputs, gradients)
    with pytest.raises(AssertionError, match=r"gradient|taps"):
        check(*arguments, right, kernel.backward(x, taps, position, dy))


@pytest.mark.parametrize(
    ("line", "wrong", "named"),
    [
        ("lane < LANES;", "lane < LANES - 1;", "taps"),
        ("terms->sums[j][g] = total[j];", "terms->sums[0][g] = total[0];", "taps"),
        ("index < blocks;", "index < blocks - 1;", "taps"),
    ],
    ids=["a lane lost", "a tap's sum lost", "a block lost"],
)
def test_the_comparison_sees_a_wrong_kernel(line, wrong, named, tmp_path, monkeypatch):
    text = kernel.SOURCE.read_text()
    assert text.count(line) == 1
    source = tmp_path / "wrong.c"
    source.write_text(text.replace(line, wrong))
    monkeypatch.setenv(cache_folders.VARIABLE, str(tmp_path))
    wrong_run = build.load(source).kvshift_run
    right = kernel._entries()
    monkeypatch.setattr(kernel, "_entries", lambda: (wrong_run, *right[1:]))
    with pytest.raises(AssertionError, match=named):
        check_case(*draw((300, 1, 2, 64), torch.float32, 2))
    # The trial before the first use sees it too.
    self_check.self_check.cache_clear()
    try:
        said = self_check.self_check(torch.float32)
    finally:
        self_check.self_check.cache_clear()
    assert said and re.search(
        r"are wrong on cpu in torch.float32: a trial on small .* is off", said
    )


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_trial_before_the_first_use_passes_and_runs_every_version(dtype, monkeypatch):
    ran, run = set(), kernel._run

    def noted(inputs, taps, position, outputs, output_grads=(), tap_grads=(), past_caches=None):
        ran.add((bool(output_grads), past_caches, position is not None))
        run(inputs, taps, position, outputs, output_grads, tap_grads, past_caches)

    monkeypatch.setattr(kernel, "_run", noted)
    self_check.self_check.cache_clear()
    assert self_check.self_check(dtype) is None
    assert len(ran) == 8


def test_more_groups_than_a_stack_has_room_for():
    arguments = draw((2, 1, 70_000, 4), torch.float32, kernel.MAX_WINDOW, count=1)
    check_case(*arguments)


@pytest.mark.parametrize(
    "misfit",
    [
        lambda x, taps, position: ([x[0], x[1][:-1]], taps, position),
        lambda x, taps, position: ([x[0], x[1].bfloat16()], taps, position),
        lambda x, taps, position: ([y.half() for y in x], taps, position),
        lambda x, taps, position: (x, [tap[:, :1] for tap in taps], position),
        lambda x, taps, position: (x, [tap.double() for tap in taps], position),
        lambda x, taps, position: (x, [tap.repeat(5, 1) for tap in taps], position),
        lambda x, taps, position: (x, taps, position[:-1]),
        lambda x, taps, position: (x, taps, position.int()),
        lambda x, taps, position: ([y.to("meta") for y in x], taps, position),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(misfit):
    inputs, taps, position, _ = draw((9, 2, 3, 8), torch.float32, 2, packed=True)
    kernel.forward(inputs, taps, position)
    with pytest.raises(ValueError, match="the CPU kernel of the shift takes"):
        kernel.forward(*misfit(inputs, taps, position))


def test_threads_are_those_of_torchs_own_runtime(threads, monkeypatch):
    monkeypatch.setattr(kernel, "_GRAIN", 0)
    arguments = draw((67, 2, 3, 128), torch.float32, 2)
    threads(3)
    torch.ones(2**22).add_(1)
    running = len(os.listdir("/proc/self/task"))
    assert running >= 3
    check_case(*arguments)
    # A second OpenMP runtime would have started two more.
    assert len(os.listdir("/proc/self/task")) == running
