"""The engine applies rows in order and restores every original."""

import importlib
import sys

import pytest
import torch

from kvshift_megatron.upstream import substitutions
from kvshift_megatron.upstream.on_import import AppliedOnImport
from kvshift_megatron.upstream.substitutions import Applied, Substitution, resolve

WHY = "It is a test."


class Base:
    def inherited(self):
        return "base"


class Owner(Base):
    attribute = 1

    @staticmethod
    def static():
        return "static"

    def method(self):
        return "method"


HERE = f"{__name__}.Owner"


def row(name: str, **replacement) -> Substitution:
    return Substitution(f"{HERE}.{name}", WHY, **replacement)


def louder(original):
    return lambda *arguments: original(*arguments) + "!"


def test_rows_are_in_force_in_the_block_only():
    before = dict(vars(Owner))
    rows = [row("attribute", value=2), row("inherited", wrap=louder), row("static", wrap=louder)]
    with Applied(rows) as applied:
        assert Owner.attribute == 2 and Owner().inherited() == "base!"
        assert len(applied) == 3 and applied.targets()[0] == f"{HERE}.attribute"
    assert vars(Owner) == before
    assert Owner.static() == Owner().static() == "static" and "inherited" not in vars(Owner)


def test_rows_nest_and_come_back_in_reverse_order():
    order = []

    def wrap(name):
        def wrapped(original):
            order.append(name)
            return lambda self: f"{name}({original(self)})"

        return wrapped

    first, second = row("method", wrap=wrap("a")), row("method", wrap=wrap("b"))
    with Applied([first, second]):
        assert Owner().method() == "b(a(method))"
        with Applied([row("method", wrap=wrap("c"))]):
            assert Owner().method() == "c(b(a(method)))"
        assert Owner().method() == "b(a(method))"
    assert Owner().method() == "method" and order == ["a", "b", "c"]


def test_an_exception_restores_too():
    with pytest.raises(KeyError), Applied([row("attribute", value=2)]):
        raise KeyError
    assert Owner.attribute == 1


def test_one_row_that_fails_leaves_none_in_force():
    rows = [row("attribute", value=2), row("gone", value=3)]
    with pytest.raises(AttributeError, match=rf"Owner\.gone .*: {WHY}"), Applied(rows):
        pytest.fail("the block was entered")
    assert Owner.attribute == 1

    def fails(original):
        raise ValueError

    with pytest.raises(ValueError):
        substitutions.apply([row("attribute", value=2), row("method", wrap=fails)])
    assert Owner.attribute == 1


def test_an_object_is_changed_and_not_its_class():
    one, other = Owner(), Owner()
    with Applied([row("method", wrap=louder, owner=one)]):
        assert (one.method(), other.method()) == ("method!", "method")
    assert vars(one) == {} and one.method() == "method"


def test_rows_stay_in_force_until_they_are_undone():
    applied = substitutions.apply([row("attribute", value=2)])
    assert Owner.attribute == 2
    applied.undo()
    applied.undo()
    assert Owner.attribute == 1


def test_a_row_has_a_value_or_a_wrap():
    assert row("attribute", value=None).replacement(1) is None
    for replacement in ({}, {"value": 1, "wrap": louder}):
        with pytest.raises(ValueError, match=r"attribute: .* either a value or a wrap"):
            row("attribute", **replacement)


@pytest.mark.parametrize(
    ("installed", "applies"), [("0.18.2", False), ("0.19.0rc1", True), ("0.19.2+abc", True)]
)
def test_a_row_of_other_releases_is_left_out(monkeypatch, installed, applies):
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__version__", installed)
    with Applied([row("attribute", value=2, releases=">=0.19")]):
        assert Owner.attribute == (2 if applies else 1)
    with Applied([row("gone", value=2, releases="<0.17")]):
        pass


def test_torchs_rows_go_by_torchs_release(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "3.1.0+cpu")
    for releases, applies in ((None, True), (">=3", True), ("<3", False)):
        assert Substitution("torch.x", WHY, value=1, releases=releases).applies() is applies


def test_names_are_found_as_an_import_finds_them():
    assert resolve("torch") is torch
    assert resolve("torch.Tensor") is torch.Tensor
    assert resolve("json.tool") is importlib.import_module("json.tool")
    with pytest.raises(ModuleNotFoundError):
        resolve("json.no_such_module")


MODULE = "megatron.kvshift_planted"
TEXT = "setting = None\n\n\ndef answer():\n    return 1\n\n\ndef other():\n    return 2\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Plant a Megatron module that is not imported yet, and one that captures its names."""
    package = importlib.import_module("megatron")
    (tmp_path / "kvshift_planted.py").write_text(TEXT)
    (tmp_path / "kvshift_capturing.py").write_text(f"from {MODULE} import answer, setting\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield
    for name in (MODULE, "megatron.kvshift_capturing"):
        sys.modules.pop(name, None)
        vars(package).pop(name.rpartition(".")[2], None)


def on_import() -> AppliedOnImport:
    return AppliedOnImport(
        [
            row("attribute", value=2),
            Substitution(f"{MODULE}.answer", WHY, wrap=lambda original: lambda: original() + 10),
            Substitution(f"{MODULE}.setting", WHY, value=5),
            Substitution(f"{MODULE}.gone", WHY, value=3),
            row("gone_too", value=4),
        ]
    )


def test_rows_wait_for_their_module(planted):
    path, layer = list(sys.meta_path), on_import()
    layer.apply()
    assert Owner.attribute == 2 and MODULE not in sys.modules
    capturing = importlib.import_module("megatron.kvshift_capturing")
    module = sys.modules[MODULE]
    assert (module.answer(), module.other(), capturing.answer()) == (11, 2, 11)
    layer.undo()
    assert (module.answer(), capturing.answer(), Owner.attribute) == (1, 1, 1)
    assert sys.meta_path == path and not hasattr(module, "gone")
    importlib.reload(module)
    assert module.answer() == 1


def test_names_that_were_captured_earlier_change_too(planted):
    capturing = importlib.import_module("megatron.kvshift_capturing")
    module, captured = sys.modules[MODULE], capturing.answer
    layer = on_import()
    layer.apply()
    assert module.answer() == capturing.answer() == 11
    # Only callables are searched for: a value such as None occurs in many places.
    assert (module.setting, capturing.setting) == (5, None)
    layer.undo()
    assert module.answer is capturing.answer is captured and module.setting is None
