"""The CPU device layer: what it changes, and that turning it off restores everything."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from kvshift_megatron import cpu
from kvshift_megatron.cpu.layer import Layer
from kvshift_megatron.upstream.substitutions import resolve
from tests.support.launch import python_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for CPU machines"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layer():
    with cpu.cpu_device_layer() as enabled:
        assert enabled
        yield


def _patched_attributes():
    """Every attribute of the owners that the table touches, by identity."""
    owners = {row.rpartition(".")[0] for row in Layer().targets()}
    found = {}
    for owner in owners:
        thing = sys.modules.get(owner) if owner.startswith("megatron.") else resolve(owner)
        for name, value in vars(thing).items() if thing is not None else ():
            found[owner, name] = id(value)
    return found


def test_disable_restores_every_original():
    import megatron.core.datasets.utils
    import megatron.core.tensor_parallel.random as megatron_random

    before, path, environment = _patched_attributes(), list(sys.meta_path), dict(os.environ)
    captured = megatron_random.device_ctx_manager
    cpu.enable()
    during = _patched_attributes()
    assert sum(during.get(key) != value for key, value in before.items()) > 40
    assert megatron_random.device_ctx_manager is torch.cuda.device is not captured
    cpu.disable()
    assert _patched_attributes() == before
    assert megatron_random.device_ctx_manager is captured
    assert sys.meta_path == path and dict(os.environ) == environment
    assert megatron.core.datasets.utils.compile_helpers.__module__.startswith("megatron.")


def test_enable_is_idempotent_and_says_so_once(monkeypatch, capsys):
    monkeypatch.delenv("KVSHIFT_CPU", raising=False)
    with cpu.cpu_device_layer():
        assert cpu.enable() and cpu.is_enabled()
        with cpu.cpu_device_layer():
            pass
        assert cpu.is_enabled()
    assert not cpu.is_enabled()
    printed = capsys.readouterr().out
    assert printed.count("CPU device layer on (no GPU is present): gloo, ") == 1


def test_a_gpu_makes_enable_do_nothing(monkeypatch, capsys):
    monkeypatch.delenv("KVSHIFT_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, environment = _patched_attributes(), dict(os.environ)
    assert cpu.enable() is False and not cpu.is_enabled()
    assert _patched_attributes() == before and dict(os.environ) == environment
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("by", ["force", "environment"])
def test_the_cpu_can_be_asked_for_beside_a_gpu(monkeypatch, by):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if by == "environment":
        monkeypatch.setenv("KVSHIFT_CPU", "1")
    with cpu.cpu_device_layer(force=by == "force") as enabled:
        assert enabled and torch.cuda.is_available() is False
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.is_available() is True


CUDA_DEVICES = ["cuda", "cuda:0", torch.device("cuda", 1), torch.device("cuda"), 0]


@pytest.mark.parametrize("device", CUDA_DEVICES, ids=str)
def test_cuda_devices_become_the_cpu(layer, device):
    x = torch.ones(2)
    made = [
        torch.empty(2, device=device),
        torch.zeros((2,), device=device, pin_memory=True),
        torch.full((2,), 1.0, device=device),
        torch.tensor([1.0], device=device),
        torch.as_tensor([1.0], device=device),
        torch.arange(2, device=device),
        torch.randn(2, device=device),
        torch.randint(3, (2,), device=device),
        torch.eye(2, device=device),
        torch.tril_indices(2, 2, device=device),
        torch.normal(0.0, 1.0, (2,), device=device),
        torch.empty_like(x, device=device),
        torch.zeros_like(x, device=device),
        torch.randn_like(x, device=device),
        x.new_empty(2, device=device),
        x.new_tensor([1.0], device=device),
        x.new_full((2,), 1.0, device=device),
        x.to(device),
        x.to(device, torch.float64),
        x.to(device=device, non_blocking=True),
        x.cuda(),
        x.cuda(device, non_blocking=True),
        x.pin_memory(),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[18].dtype == torch.float64
    parameter = torch.nn.Parameter(x)
    assert parameter.cuda() is parameter
    module = torch.nn.Linear(2, 2)
    assert module.to(device) is module and module.cuda() is module
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_other_devices_and_answers_stay_as_they_are(layer):
    assert torch.cuda.is_available() is False and torch.cuda.device_count() == 0
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert torch.ones(2).type() == "torch.FloatTensor"
    assert torch.ones(2).type(torch.int64).dtype == torch.int64


def test_only_the_optimizer_is_answered_a_cuda_tensor_type(layer):
    scope = {"__name__": "megatron.core.optimizer.clip_grads"}
    exec("def ask(x): return x.type()", scope)
    assert scope["ask"](torch.ones(1)) == "torch.cuda.FloatTensor"
    assert scope["ask"](torch.ones(1, dtype=torch.bfloat16)) == "torch.cuda.BFloat16Tensor"
    scope["__name__"] = "megatron.core.optimizer_param_scheduler"
    assert scope["ask"](torch.ones(1)) == "torch.FloatTensor"


def test_streams_events_and_statistics(layer):
    stream = torch.cuda.Stream(priority=-1)
    assert isinstance(stream, torch.cuda.Stream) and isinstance(torch.cuda.Stream, type)
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    stream.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        start.record()
        time.sleep(0.002)
        assert stream.record_event(end) is end and isinstance(end, torch.cuda.Event)
    assert end.query() and start.elapsed_time(end) >= 2
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    torch.ones(1).record_stream(stream)
    assert torch.cuda.memory_stats()["active.all.current"] == 0
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.get_device_properties(0).major == 0


def test_layer_reaches_other_threads_and_backward(layer):
    import threading

    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.ones(1, device="cuda").device))
    thread.start()
    thread.join()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.full((), 2.0, device="cuda")

    x = torch.ones(1, requires_grad=True)
    Double.apply(x).backward()
    assert x.grad.item() == 2 and devices[0].type == "cpu"


def test_dynamo_traces_the_layer_and_forgets_it():
    def on_cuda(x):
        return torch.ones(3, device="cuda") + x.to("cuda") + x.new_ones(3).cuda()

    def plain(x):
        return torch.ones(3) + torch.zeros_like(x) + x.to(torch.float64)

    for context, function in ((cpu.cpu_device_layer, on_cuda), (None, plain)):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        if context is None:
            assert torch.equal(compiled(torch.ones(3)), function(torch.ones(3)))
        else:
            with context():
                assert torch.equal(compiled(torch.ones(3)), function(torch.ones(3)))


@pytest.fixture
def tracker(layer):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 11)
    tracker.add("expert-parallel-rng", 12)
    return tracker


def test_rng_tracker_regions_are_distinct_and_reproducible(tracker, caplog):
    def draw(name):
        with tracker.fork(name):
            return torch.rand(4, device="cuda")

    outside = torch.cuda.get_rng_state()
    states = tracker.get_states()
    first = draw("model-parallel-rng")
    expert = draw("expert-parallel-rng")
    second = draw("model-parallel-rng")
    assert not torch.equal(first, expert) and not torch.equal(first, second)
    assert torch.equal(outside, torch.cuda.get_rng_state())
    tracker.set_states(states)
    assert torch.equal(draw("model-parallel-rng"), first)
    assert torch.equal(draw("model-parallel-rng"), second)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(4), first)
    assert "CPU RNG state changed" not in caplog.text


def test_recomputed_dropout_gives_the_same_gradients(tracker, monkeypatch):
    import megatron.core.tensor_parallel.random as megatron_random

    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker)
    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    weight = torch.randn(8, 8)

    def block(x):
        x = torch.nn.functional.dropout(x @ weight, 0.5)
        with tracker.fork():
            return torch.nn.functional.dropout(x, 0.5)

    def gradient(recompute):
        torch.cuda.manual_seed(5)
        tracker.set_states(dict(states))
        x = torch.ones(16, 8, requires_grad=True)
        # The second argument is distribute_saved_activations.
        out = megatron_random.checkpoint(block, False, x) if recompute else block(x)
        out = out + torch.nn.functional.dropout(torch.ones(16, 8), 0.5)  # moves the generator on
        out.square().sum().backward()
        return x.grad, torch.rand(3)

    states = tracker.get_states()
    plain, plain_after = gradient(recompute=False)
    again, again_after = gradient(recompute=True)
    assert plain.count_nonzero() > 0 and torch.equal(plain, again)
    # The recomputation left the generator unchanged.
    assert torch.equal(plain_after, again_after)


def test_a_data_loader_leaves_the_random_state_of_dropout_alone(layer):
    state = torch.cuda.get_rng_state()
    loader = torch.utils.data.DataLoader(list(range(4)))
    seeds = [iter(loader)._base_seed for _ in range(2)]
    assert torch.equal(state, torch.cuda.get_rng_state()) and seeds[0] != seeds[1]


def test_megatrons_start_does_not_ask_for_a_gpu(layer, monkeypatch):
    from megatron.training import global_vars, initialize

    # It gets as far as the arguments, which are missing.
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    monkeypatch.setattr(sys, "argv", ["script", "--no-such-flag"])
    with pytest.raises((AssertionError, SystemExit)) as stop:
        initialize.initialize_megatron()
    assert "requires CUDA" not in str(stop.value)


def test_megatrons_warm_up_leaves_the_random_state_alone(layer, monkeypatch):
    from megatron.training import initialize, training

    monkeypatch.setattr(initialize, "_warmup_jit_function", lambda **_: torch.rand(3))
    state = torch.cuda.get_rng_state()
    for function in (initialize.set_jit_fusion_options, training.set_jit_fusion_options):
        function()
        assert torch.equal(state, torch.cuda.get_rng_state())


def test_a_gated_delta_net_needs_no_gpu_kernel(layer):
    from megatron.core.ssm.gated_delta_net import common

    assert common.HAVE_FLA
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(common.l2norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert common.l2norm(x.bfloat16()).dtype == torch.bfloat16


def test_megatrons_helpers_are_not_compiled_where_they_are(layer, monkeypatch):
    from megatron.core.datasets import utils

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("make was started"))
    utils.compile_helpers()


def test_megatrons_arguments_are_those_of_a_cpu(layer, monkeypatch):
    from megatron.training import arguments

    monkeypatch.setattr(sys, "argv", ["script"])
    args = arguments.parse_args()
    assert (args.transformer_impl, args.distributed_backend) == ("local", "gloo")


def _start(*words, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=inherited | environment,
    )


def test_commands_that_start_nothing():
    children = [
        _start("-c", "import sys, kvshift_megatron.cpu; print('torch' in sys.modules)"),
        _start("-m", "kvshift_megatron.cpu"),
        _start("-m", "kvshift_megatron.cpu", "no/such/script.py"),
        _start("-m", "kvshift_megatron.cpu", "--nproc-per-node", "0", __file__),
        _start("-m", "kvshift_megatron.cpu", __file__, "--distributed-backend", "nccl"),
        _start("-m", "kvshift_megatron.cpu", __file__, "--fp8-format", "e4m3", RANK="1"),
    ]
    results = [(*child.communicate(timeout=180), child.returncode) for child in children]
    assert results[0][0].strip() == "False" and results[0][2] == 0
    assert [code for _, _, code in results[1:]] == [2] * 5
    for error, words in zip(
        [error for _, error, _ in results[1:]],
        ["SCRIPT", "no/such/script.py", "--nproc-per-node", "--distributed-backend gloo", ""],
        strict=True,
    ):
        assert words in error and "Traceback" not in error


@pytest.mark.parametrize("module", [False, True])
def test_whatever_is_compiled_gives_what_the_compiled_one_gives(layer, module):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    backends = []

    def backend(graph, _):
        backends.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def thrice(x):
        return 3 * x

    assert thrice.__name__ == "thrice" and not backends
    one = torch.compile(Twice(), backend=backend) if module else thrice
    outer = torch.compile(lambda x: one(x) + 1, backend=backend, fullgraph=True)
    x = torch.arange(3.0)
    for _ in range(2):
        assert torch.equal(one(x), (2 if module else 3) * x)
        assert torch.equal(outer(x), (2 if module else 3) * x + 1)
    # Each was compiled once, the inner one again as a part of the outer one.
    assert len(backends) == 2


MEGATRON = """
import sys, torch
from kvshift_megatron import cpu

cpu.enable()
import megatron.training
from megatron.core.fusions.fused_bias_swiglu import swiglu
print("torch._inductor.compile_fx" in sys.modules, swiglu.__module__, torch.compile.__module__)
"""


def test_megatron_is_imported_without_its_compiler():
    output, errors = _start("-c", MEGATRON, KVSHIFT_CPU="1").communicate(timeout=180)
    assert output.split()[-3:] == ["False", "megatron.core.fusions.fused_bias_swiglu", "torch"], (
        errors
    )


DYNAMO = """
import torch
from kvshift_megatron import cpu

with cpu.cpu_device_layer():
    torch.compile(lambda x: x + torch.ones(3, device="cuda"), backend="eager")(torch.ones(3))
twice = torch.compile(lambda x: x + torch.full((3,), 2.0), fullgraph=True, backend="eager")
print(twice(torch.ones(3)).tolist())
"""


def test_dynamo_that_starts_in_the_layer_forgets_it():
    """Dynamo lists torch's functions when it is first imported, and again when told to."""
    output, errors = _start("-c", DYNAMO, KVSHIFT_CPU="1").communicate(timeout=180)
    assert output.splitlines()[-1] == "[3.0, 3.0, 3.0]", errors


WORKER = """
import os, sys, time
import torch
import beside
from kvshift_megatron import cpu

assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
assert sys.argv[1:] == ["--flag", "x y"], sys.argv
assert os.path.samefile(sys.argv[0], __file__)
assert sys.path[0] == os.path.dirname(os.path.abspath(__file__))
assert cpu.is_enabled() and torch.ones(1, device="cuda").device.type == "cpu"
torch.distributed.init_process_group("gloo")
total = torch.tensor([float(torch.distributed.get_rank() + 1)], device="cuda")
torch.distributed.all_reduce(total)
# The launcher's workers write unbuffered: in two writes the lines of two ranks could mix.
print(f"total {total.item()} threads {os.environ['OMP_NUM_THREADS']}\\n", end="")
if os.environ["WHAT"] == "sleep":
    time.sleep(120)
# gloo's threads are still in Python when the script ends.
for seconds in [1.0] + 300 * [0.001]:
    work = torch.distributed.all_reduce(total.clone(), async_op=True)
    work.get_future().then(lambda _, seconds=seconds: time.sleep(seconds))
sys.exit(int(os.environ["WHAT"]))
"""


def test_a_script_runs_as_main_and_its_ranks_end_with_the_launcher(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    (tmp_path / "beside.py").write_text("")
    run, command = ("-m", "kvshift_megatron.cpu"), (str(script), "--flag", "x y")
    sleeper = _start(*run, "--nproc-per-node=2", *command, WHAT="sleep")
    exits_7 = _start(*run, *command, WHAT="7")
    lines = [""]
    while "total 3.0" not in lines[-1]:
        lines.append(sleeper.stdout.readline())
        assert lines[-1], f"{lines}\n{sleeper.stderr.read()}"
    children = psutil.Process(sleeper.pid).children(recursive=True)
    assert len(children) >= 2
    sleeper.terminate()
    assert sleeper.wait(timeout=180) == 128 + 15
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    sleeper.communicate()

    output, errors = exits_7.communicate(timeout=180)
    assert exits_7.returncode == 7, errors
    assert output.count("total 1.0") == 1
    assert output.count("kvshift_megatron: CPU device layer on") == 1


def test_the_command_runs_nothing_that_lies_in_the_working_directory(tmp_path, monkeypatch):
    """As the installed command: unlike with -m, modules there are not found by it."""
    script = tmp_path / "scripts" / "worker.py"
    script.parent.mkdir()
    script.write_text("import os, torch\nprint('safe', os.environ.get('PYTHONSAFEPATH'))\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')\n")
    program = "from kvshift_megatron.cpu.__main__ import main; import sys; sys.exit(main())"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kvshift-cpu").write_text(program)
    run = subprocess.run(
        [sys.executable, tmp_path / "bin" / "kvshift-cpu", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "safe None" in run.stdout
