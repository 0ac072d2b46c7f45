"""The CPU layer's rows in torch: each call with its row, and without."""

import zipfile
from pathlib import Path

import pytest
import torch

from kvshift_megatron import cpu
from kvshift_megatron.cpu import layer
from kvshift_megatron.upstream import cpu_table

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for CPU machines")

CPU = torch.device("cpu")
X = torch.ones(2)


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device == CPU


def _seeds_the_cpus_generator(module) -> bool:
    torch.default_generator.manual_seed(1)
    module.manual_seed(7)
    drawn = torch.rand(3)
    torch.default_generator.manual_seed(7)
    return torch.equal(drawn, torch.rand(3))


def _puts_the_state_back(module) -> bool:
    state = module.get_rng_state()
    drawn = torch.rand(3)
    module.set_rng_state(state)
    return torch.equal(drawn, torch.rand(3))


def _loads_a_file_of_a_gpu(path: Path) -> bool:
    torch.save(X, path / "on_cpu.pt")
    with (
        zipfile.ZipFile(path / "on_cpu.pt") as on_cpu,
        zipfile.ZipFile(path / "on_gpu.pt", "w") as on_gpu,
    ):
        for entry in on_cpu.namelist():
            # The pickled name of a storage's device, with its length.
            content = on_cpu.read(entry).replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0")
            on_gpu.writestr(entry, content)
    return _is_on_cpu(torch.load(path / "on_gpu.pt"))


def _optimizer_sees_a_gpus_type() -> bool:
    scope = {"__name__": "megatron.core.optimizer.clip_grads"}
    exec("def ask(x): return x.type()", scope)
    return scope["ask"](X) == "torch.cuda.FloatTensor"


def _initialize_counts_one_gpu() -> bool:
    scope = {"__name__": "megatron.training.initialize", "torch": torch}
    exec("def ask(): return torch.cuda.device_count()", scope)
    return scope["ask"]() == 1


def _loader_leaves_the_generator_alone() -> bool:
    state = torch.default_generator.get_state()
    iter(torch.utils.data.DataLoader([1, 2]))
    return torch.equal(state, torch.default_generator.get_state())


def _compiles_at_the_first_call() -> bool:
    compiled = torch.compile(lambda x: x, backend="no such backend")
    try:
        compiled(X)
    except Exception:  # Dynamo's
        return True
    return False


def _stream_is_entered() -> bool:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream) as entered:
        return entered is stream


def _device_is_entered() -> bool:
    with torch.cuda.device(0):
        return True


def _maps_a_file(path: Path) -> bool:
    file = path / "numbers"
    file.write_bytes(bytes(8))
    return _is_on_cpu(torch.from_file(str(file), size=2, device="cuda"))


def _recorded(event: torch.cuda.Event) -> bool:
    event.record()
    return event.query()


# Target -> a call as Megatron makes it, which returns whether the result is the CPU layer's.
CALLS = {
    "torch.cuda.current_device": lambda _: torch.cuda.current_device() == CPU,
    "torch.Tensor.to": lambda _: _is_on_cpu(X.to("cuda")),
    "torch.Tensor.cuda": lambda _: X.cuda() is X,
    "torch.Tensor.pin_memory": lambda _: X.pin_memory() is X,
    "torch.load": _loads_a_file_of_a_gpu,
    "torch.Tensor.type": lambda _: _optimizer_sees_a_gpus_type(),
    "torch.cuda.device_count": lambda _: _initialize_counts_one_gpu(),
    "torch.cuda.set_device": lambda _: torch.cuda.set_device(0) is None,
    "torch.cuda.device": lambda _: _device_is_entered(),
    "torch.cuda.get_device_properties": lambda _: torch.cuda.get_device_properties(0).major == 0,
    "torch.cuda.get_device_capability": lambda _: torch.cuda.get_device_capability() == (0, 0),
    "torch.cuda.get_device_name": lambda _: torch.cuda.get_device_name() == "cpu",
    "torch.cuda.Stream": lambda _: torch.cuda.Stream(priority=1).query(),
    "torch.cuda.Event": lambda _: _recorded(torch.cuda.Event(enable_timing=True)),
    "torch.cuda.current_stream": lambda _: torch.cuda.current_stream().query(),
    "torch.cuda.default_stream": lambda _: torch.cuda.default_stream().query(),
    "torch.cuda.stream": lambda _: _stream_is_entered(),
    "torch.cuda.set_stream": lambda _: torch.cuda.set_stream(torch.cuda.Stream()) is None,
    "torch.Tensor.record_stream": lambda _: X.record_stream(torch.cuda.Stream()) is None,
    "torch.cuda.synchronize": lambda _: torch.cuda.synchronize() is None,
    "torch.cuda.is_current_stream_capturing": (
        lambda _: torch.cuda.is_current_stream_capturing() is False
    ),
    "torch.cuda.nvtx.range_push": lambda _: torch.cuda.nvtx.range_push("x") is None,
    "torch.cuda.nvtx.range_pop": lambda _: torch.cuda.nvtx.range_pop() is None,
    "torch.cuda.nvtx.mark": lambda _: torch.cuda.nvtx.mark("x") is None,
    "torch.cuda.memory_stats": lambda _: torch.cuda.memory_stats()["active.all.current"] == 0,
    "torch.cuda.mem_get_info": lambda _: torch.cuda.mem_get_info() == (0, 0),
    "torch.cuda.device_memory_used": lambda _: torch.cuda.device_memory_used() == 0,
    "torch.cuda.empty_cache": lambda _: torch.cuda.empty_cache() is None,
    "torch.cuda.ipc_collect": lambda _: torch.cuda.ipc_collect() is None,
    "torch.cuda.reset_peak_memory_stats": lambda _: torch.cuda.reset_peak_memory_stats() is None,
    "torch.cuda.reset_max_memory_allocated": (
        lambda _: torch.cuda.reset_max_memory_allocated() is None
    ),
    "torch.cuda.get_rng_state": lambda _: _puts_the_state_back(torch.cuda),
    "torch.cuda.set_rng_state": lambda _: _puts_the_state_back(torch.cuda),
    "torch.cuda.random.get_rng_state": lambda _: _puts_the_state_back(torch.cuda.random),
    "torch.cuda.random.set_rng_state": lambda _: _puts_the_state_back(torch.cuda.random),
    "torch.cuda.manual_seed": lambda _: _seeds_the_cpus_generator(torch.cuda),
    "torch.cuda.random.manual_seed": lambda _: _seeds_the_cpus_generator(torch.cuda.random),
    "torch.cuda.initial_seed": (
        lambda _: torch.cuda.initial_seed() == torch.default_generator.initial_seed()
    ),
    "torch.cuda.default_generators": (
        lambda _: torch.cuda.default_generators[3] is torch.default_generator
    ),
    "torch.compile": lambda _: _compiles_at_the_first_call(),
    "torch.utils.data.DataLoader.__iter__": lambda _: _loader_leaves_the_generator_alone(),
    "torch.empty_like": lambda _: _is_on_cpu(torch.empty_like(X, device="cuda")),
    "torch.full_like": lambda _: _is_on_cpu(torch.full_like(X, 1.0, device="cuda")),
    "torch.ones_like": lambda _: _is_on_cpu(torch.ones_like(X, device="cuda")),
    "torch.rand_like": lambda _: _is_on_cpu(torch.rand_like(X, device="cuda")),
    "torch.randint_like": lambda _: _is_on_cpu(torch.randint_like(X, 3, device="cuda")),
    "torch.randn_like": lambda _: _is_on_cpu(torch.randn_like(X, device="cuda")),
    "torch.zeros_like": lambda _: _is_on_cpu(torch.zeros_like(X, device="cuda")),
    "torch.normal": lambda _: _is_on_cpu(torch.normal(0.0, 1.0, (2,), device="cuda")),
    "torch.from_file": _maps_a_file,
    "torch.Tensor.new": lambda _: _is_on_cpu(X.new(2, device="cuda")),
    "torch.Tensor.new_empty": lambda _: _is_on_cpu(X.new_empty(2, device="cuda")),
    "torch.Tensor.new_empty_strided": (
        lambda _: _is_on_cpu(X.new_empty_strided((2,), (1,), device="cuda"))
    ),
    "torch.Tensor.new_full": lambda _: _is_on_cpu(X.new_full((2,), 1.0, device="cuda")),
    "torch.Tensor.new_ones": lambda _: _is_on_cpu(X.new_ones(2, device="cuda")),
    "torch.Tensor.new_tensor": lambda _: _is_on_cpu(X.new_tensor([1.0], device="cuda")),
    "torch.Tensor.new_zeros": lambda _: _is_on_cpu(X.new_zeros(2, device="cuda")),
}
# These work without their rows too: the first two only in a torch built with CUDA, the others
# because they call get_device_properties, which has a row.
ANSWERED_WITHOUT = {
    "torch.cuda.nvtx.mark",
    "torch.cuda.empty_cache",
    "torch.cuda.get_device_capability",
    "torch.cuda.get_device_name",
}


def _is_answered(target: str, folder: Path) -> bool:
    with cpu.cpu_device_layer():
        try:
            return CALLS[target](folder) is True
        except Exception:  # the kind differs, from RuntimeError to NVML's
            return False


@pytest.mark.filterwarnings("ignore:torch.cuda.reset_max_memory_allocated")
@pytest.mark.parametrize("target", CALLS)
def test_a_call_is_answered_because_of_its_row(target, tmp_path, monkeypatch):
    assert _is_answered(target, tmp_path)
    others = [row for row in layer.table() if row.target != target]
    monkeypatch.setattr(layer, "table", lambda: others)
    assert _is_answered(target, tmp_path) is (target in ANSWERED_WITHOUT)


def test_every_row_in_torch_has_a_call():
    """The functions that make tensors are tested in tests/cpu/test_layer.py."""
    rows = {row.target for row in layer.table() if row.library == "torch"}
    assert set(CALLS) <= rows
    assert rows - set(CALLS) <= set(cpu_table.factory_targets())
