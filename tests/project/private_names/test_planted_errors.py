"""Errors in the text, in the list and in the tests that it names are caught."""

from pathlib import Path

import pytest

from tests.project.private_names import compare, listed, lookups, planted, scan
from tests.upstream import tables

TEXT = """
import contextlib
import os
from operator import itemgetter
from unittest import mock

import torch
import torch._dynamo as dynamo
from torch import nn
from megatron.core import parallel_state as mpu
from megatron.training import training
from torch.nn import Module as Base
from torch.utils.flop_counter import flop_registry

from kvshift_megatron import taps

aten = torch.ops.aten


class Own(Base):
    def __init__(self):
        self._mine = 1

    def forward(self, other, run):
        run._asdict()
        os._exit(self._mine + other._mine + taps._anything)
        return self._help(getattr(self, "_mine"), self.__dict__)

    def _help(self, *_):
        for name in ("weight", "bias"):
            setattr(self, name, None)
        return super()._call_impl()

    def _get_name(self):
        self._parameters.clear()

    @property
    def _called_by_nobody_here(self): ...


def use(x, scheduler):
    x._version
    aten._to_copy(x)
    mpu._SOME.value
    x.function(_hidden=1)
    getattr(x, "_hidden_too", None)
    training.train_step, x.y = None, None
    loop = training
    loop.count: int = 1
    torch.Tensor.type = None
    x.public = 1
    setattr(torch, "zeros", None)
    mock.patch.object(scheduler, "step", None)
    mock.patch("megatron.core.utils._name")
    return "torch._C._name", "_just_a_word", "a sentence. _not a name"
"""
FOUND = {
    "import torch._dynamo",
    "import torch.utils.flop_counter.flop_registry",
    "read ._call_impl",
    "override ._get_name",
    "read ._parameters",
    "override ._called_by_nobody_here",
    "read ._version",
    "read torch.ops.aten._to_copy",
    "read megatron.core.parallel_state._SOME",
    "read ._hidden",
    "read ._hidden_too",
    "set megatron.training.training.train_step",
    "set megatron.training.training.count",
    "set torch.Tensor.type",
    "set torch.zeros",
    "set .step",
    "set megatron.core.utils._name",
    "string megatron.core.utils._name",
    "string torch._C._name",
}


def test_every_kind_of_use_is_found_and_nothing_else():
    assert {f"{use.kind} {use.name}" for use in scan.uses_in(TEXT, "x.py")} == FOUND


def test_a_computed_name_is_found_unless_its_file_is_exempt():
    text = "import torch\n\ndef replace(name):\n    setattr(torch, name, None)\n"
    assert [use.name for use in scan.uses_in(text, "x.py")] == ["torch.?"]
    assert scan.uses_in(text, "specs/rewrite.py") == []


def row(**changes) -> listed.Row:
    fields = {"library": "torch", "names": ("torch._a",), "files": ("x.py",), "why": "no other",
              "releases": "", "tests": ("tests/x/test_x.py::test_x",)}  # fmt: skip
    return listed.Row(**{**fields, **changes})


def test_a_use_without_a_row_and_a_row_without_a_use_are_caught():
    uses = scan.uses_in("import torch\ntorch._a()\n", "x.py")
    assert compare.unlisted(uses, [row()]) == compare.unused(uses, [row()], {}) == []
    assert compare.unlisted(uses, [row(files=("y.py",))]) == compare.unlisted(
        uses, [row(names=("torch._b",))]
    )
    assert compare.unlisted(uses, []) == ["kvshift_megatron/x.py:2 read torch._a"]
    gone = row(names=("torch._a", "torch._b", "torch.Tensor._c"))
    words = {"x.py": {"_c"}}
    assert compare.unused(uses, [gone], words) == ["torch._b in x.py"]
    assert compare.unused(uses, [row(files=("x.py", "y.py"))], words) == ["torch._a in y.py"]


@pytest.mark.parametrize(
    "name",
    ["torch._no_such_name", "torch._no_such_module.x", "no_such_library.x", "torch.Tensor._no_such",
     "multiprocessing.connection.Listener._no_such"],
)  # fmt: skip
def test_a_name_that_no_longer_exists_is_caught(name):
    with pytest.raises(LookupError):
        listed.resolve(name)


def test_releases_are_honoured(monkeypatch):
    monkeypatch.setattr(listed.releases, "imported_version", lambda: "0.18.2")
    asked = {"": True, ">=0.19": False, "<0.18": False, ">=0.18,<0.19": True}
    found = [listed.is_there(row(library="megatron-core", releases=which)) for which in asked]
    assert found == list(asked.values())
    assert listed.is_there(row(library="no-such-library")) is None


HEAD = (
    "| Library | Names | Used in | Why no public name serves | Releases | Noticed by |\n"
    "|---|---|---|---|---|---|\n"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("| torch | `a` | `b` | c | | `d` | more |", "expected 6 cells"),
        ("| torch | `a` | `b` | c | |", "expected 6 cells"),
        ("| torch | a | `b` | c | | `d` |", "only `releases` may be empty"),
        ("| torch | `a` | `b` | | | `d` |", "only `releases` may be empty"),
    ],
)
def test_a_damaged_table_is_refused(line, message):
    assert len(listed.rows(HEAD + "| torch | `a` | `b` | c | | `d` |")) == 1
    with pytest.raises(ValueError, match=message):
        listed.rows(HEAD + line)
    with pytest.raises(ValueError, match="expected the columns"):
        listed.rows(HEAD.replace("Releases", "Since"))


def test_a_name_that_is_not_a_test_is_caught():
    here = "tests/project/private_names/test_planted_errors.py"
    assert listed.is_test(f"{here}::test_a_name_that_is_not_a_test_is_caught")
    planted = "tests/project/private_names/planted.py::main"
    for name in (
        f"{here}::test_no_such",
        f"{here}::row",
        here,
        planted,
        "tests/x/test_x.py::test_x",
    ):
        assert not listed.is_test(name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("upstream/cpu_table.py", "torch.cuda.is_available"),
        ("upstream/dataset_helpers.py", "megatron.core.datasets.utils.compile_helpers"),
        ("upstream/faults_table.py", "megatron.training.training.train_step"),
    ],
)
def test_a_table_can_be_left_without_a_row(file, name):
    (error,) = planted.errors(row(names=(name,), files=(file,)), name).values()
    assert error[0] == file
    scope = {}
    exec(error[1], scope)
    for function in tables.functions(Path(file).stem).values():
        arguments = tables.placeholders(function)
        whole = [one.target for one in function(**arguments)]
        left = [one.target for one in scope[function.__name__](**arguments)]
        assert left == [target for target in whole if target != name]


PLANTED = """
from contextlib import suppress

import torch
from torch.nn import Module, Parameter as P


class Own(Module):
    def _get_name(self): ...


torch.Tensor.type = torch.Tensor._x
with suppress(Exception), mock.patch.object(torch, "zeros", 1):
    from torch._a import b as c
"""


def test_errors_are_planted_at_the_uses():
    found = {use.name: planted.with_error(PLANTED, use) for use in scan.uses_in(PLANTED, "x.py")}
    assert found.keys() == {"._get_name", "torch.Tensor.type", "torch.Tensor._x", "torch.zeros",
                            "torch._a.b"}  # fmt: skip
    assert "    def x_get_name(self): ..." in found["._get_name"]
    assert "\npass\nwith" in found["torch.Tensor.type"]
    assert "torch.Tensor.type = (1 / 0)\n" in found["torch.Tensor._x"]
    assert "__import__('contextlib').nullcontext():\n" in found["torch.zeros"]
    assert found["torch._a.b"].endswith("as c\n    c = type('planted', (), {})\n")


@pytest.mark.slow
def test_a_test_that_catches_an_error_fails_and_another_passes():
    """Plant one whole row, the size of a storage; the other test is only about arithmetic."""
    name, file = "torch.UntypedStorage.resize_", "upstream/planning_table.py"
    (error,) = planted.errors(row(names=(name,), files=(file,)), name).values()
    parts = "tests/planning/test_parts.py::"
    assert not planted.passes(f"{parts}test_live_storages_follow_what_is_resized", *error)
    assert planted.passes(f"{parts}test_estimate_by_hand", *error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(): pass\ndef g(): return f()", True),
        ("def f(): pass\ndef g(): return h()", False),
        ("def f(): return f()", False),
        ("def f(): pass\ndef g(f): return f()", False),
        ("def f(): pass\nx = f()", False),
        ("def g(): return module.f()", True),
        ("def g():\n    from a import f", True),
        ("from a import f", False),
    ],
)
def test_names_that_are_looked_up_are_recognized(text, expected):
    assert lookups.is_looked_up("a.f", text) is expected
