"""Modules named by --spec: found without an import, or refused by the CPU launcher."""

import subprocess
import sys

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from kvshift_megatron import layer_specs, static_specs
from kvshift_megatron.cpu import __main__ as launcher
from kvshift_megatron.specs import named_specs
from tests.support.launch import PROJECT, python_path


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--spec", "a.b", "c"], ("a.b", "c")),
        (["x.py", "--bf16", "--spec", "a.b", "c", "--swiglu"], ("a.b", "c")),
        (["--spec", "a.b", "c", "--spec", "d.e", "f"], ("d.e", "f")),
        (["--spec", "local", "--bf16"], None),
        (["--spec", "local"], None),
        (["--spec=a.b", "c"], None),
        (["--spec"], None),
        ([], None),
    ],
)
def test_the_last_spec_counts(words, named):
    assert named_specs.named_spec(words) == named


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make modules that end the test if they are imported."""
    for name in ("top.py", "package/__init__.py", "package/inner/__init__.py", "bare/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported')\n")
    (tmp_path / "package/inner/specs.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "there"),
    [
        ("top", True),
        ("top.inner", False),
        ("package.inner.specs", True),
        ("package.inner.spec", False),
        ("package.outer.specs", False),
        ("bare.module", True),
        ("bare.modules", False),
        ("nowhere", False),
        ("nowhere.specs", False),
        ("os.path", True),
        ("sys.path", False),
        ("kvshift_megatron.layer_specs", True),
        ("kvshift_megatron.layer_spec", False),
    ],
)
def test_a_module_is_found_without_importing_it(folder, module, there):
    before = set(sys.modules)
    assert named_specs.is_there(module) is there
    assert set(sys.modules) == before


@pytest.fixture
def script(folder, monkeypatch):
    """Make a script with modules next to it, which are found through the script's path only."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    monkeypatch.setattr(launcher, "_launch", lambda processes, script, arguments: 0)
    (folder / "train.py").touch()
    return str(folder / "train.py")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("kvshift_megatron.layer_spec", "there is no kvshift_megatron.layer_spec: for --spec, "),
        ("kvshift_megatronic.layer_specs", "there is no module kvshift_megatronic.layer_specs"),
        ("package.inner.spec", "there is no module package.inner.spec"),
    ],
)
def test_the_launcher_refuses_a_module_that_does_not_exist(script, module, said, capsys):
    before = list(sys.path)
    assert launcher.main([script, "--bf16", "--spec", module, "name"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kvshift-cpu: {said}") and error.count("\n") == 1
    assert sys.path == before


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kvshift_megatron.layer_specs", "kv_shift_layer_spec"),
        ("package.inner.specs", "name"),
        ("top", "name"),
    ],
)
def test_the_launcher_accepts_a_module_that_the_script_finds(script, module, name):
    before = list(sys.path)
    assert launcher.main([script, "--spec", module, name]) == 0
    assert sys.path == before


def test_a_misspelt_name_in_a_module_of_specs_is_one_sentence(script, capsys):
    words = ["--spec", "kvshift_megatron.static_specs", "te_layer_spek"]
    said = "kvshift_megatron.static_specs has no te_layer_spek: correct the name after --spec "
    assert launcher.main([script, *words]) == 2
    assert capsys.readouterr().err.startswith(f"kvshift-cpu: {said}")
    with pytest.raises(named_specs.MisspeltSpec, match=said):
        named_specs.refuse_misspelt(["pretrain_gpt.py", *words])
    named_specs.refuse_misspelt(["pretrain_gpt.py", *words[:-1], "te_layer_spec"])


def test_the_names_of_the_specs_are_all_there():
    made = {name for name, spec in vars(static_specs).items() if isinstance(spec, ModuleSpec)}
    assert made == set(named_specs._NAMES["kvshift_megatron.static_specs"])
    callables = {
        name
        for name, function in vars(layer_specs).items()
        if name.endswith("_layer_spec") and not name.startswith("_") and callable(function)
        and function.__module__ == layer_specs.__name__
    }  # fmt: skip
    assert callables == set(named_specs._NAMES["kvshift_megatron.layer_specs"])


def test_the_launcher_refuses_before_anything_else_does(tmp_path):
    """The package's import would end in a traceback; it leaves the refusal to the launcher."""
    script = tmp_path / "train.py"
    script.touch()
    done = subprocess.run(
        [sys.executable, "-m", "kvshift_megatron.cpu", script, "--spec", "kvshift_megatron.x", "y"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("kvshift-cpu: there is no kvshift_megatron.x: ")
    assert done.stderr.count("\n") == 1


_STATE = """
import gc, os, signal, sys, threading, warnings

def state():
    return {
        "meta_path": list(sys.meta_path), "path": list(sys.path), "hooks": list(sys.path_hooks),
        "argv": list(sys.argv), "environment": dict(os.environ), "excepthook": sys.excepthook,
        "threads": threading.enumerate(), "warnings": list(warnings.filters), "gc": gc.callbacks[:],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
    }

before, modules = state(), set(sys.modules)
import kvshift_megatron
exec(sys.argv[1])
print(*(name for name, value in state().items() if value != before[name]))
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - modules}))
"""


def changed_by_import(planted: str = "") -> list[list[str]]:
    """Return what the import changes in the interpreter's state, and what it imports."""
    done = subprocess.run(
        [sys.executable, "-c", _STATE, planted],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": python_path()},
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_importing_the_package_changes_nothing():
    changed, imported = changed_by_import()
    assert changed == []
    assert set(imported) - sys.stdlib_module_names == {"kvshift_megatron"}


def test_a_change_by_the_import_would_be_noticed():
    assert changed_by_import("sys.meta_path.append(None)")[0] == ["meta_path"]
    assert "numpy" in changed_by_import("import numpy")[1]
