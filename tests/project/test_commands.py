"""The commands that an installation has: each is there, helps, and does so without waiting.

What must not be imported is held rather than a time, which depends on the machine: torch takes a
second or more, Megatron several.
"""

import subprocess
import sys
import tomllib

import pytest

from tests.support.launch import PROJECT, python_path

SCRIPTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
# Also started by python -m.
MODULES = {
    "kvshift-recipe": "kvshift_megatron.recipes",
    "kvshift-plan": "kvshift_megatron.planning",
    "kvshift-convert": "kvshift_megatron.convert",
    "kvshift-patch": "kvshift_megatron.megatron_lm.patch",
    "kvshift-check": "kvshift_megatron.megatron_lm.check",
    "kvshift-cpu": "kvshift_megatron.cpu",
}
HEAVY = {"torch", "megatron", "transformers", "numpy", "matplotlib", "safetensors"}

# Ends a program's output with what it imported.
_PROBE = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *sorted({HEAVY!r} & set(sys.modules))))
"""
_SCRIPT = "from importlib.metadata import EntryPoint\nsys.exit(EntryPoint({!r}, {!r}, '').load()())"
_MODULE = "import runpy\nrunpy.run_module({!r}, run_name='__main__', alter_sys=True)"


def run(program: str, *words: str) -> tuple[int, str, list[str]]:
    """A program with a command line of its own: exit status, output, heavy modules."""
    start = f"{_PROBE}sys.argv[1:] = {list(words)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=PROJECT.anchor,  # not the checkout, which would be found as the working directory
        env={"PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    output, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, output + done.stderr, imported.split()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("way", ["installed", "-m"])
def test_help_waits_for_nothing(name, way):
    program = (
        _SCRIPT.format(name, SCRIPTS[name]) if way == "installed" else _MODULE.format(MODULES[name])
    )
    status, said, imported = run(program, "--help")
    assert (status, imported) == (0, []), said
    assert said.startswith(f"usage: {name} ")


@pytest.mark.parametrize("direction", ["megatron-to-hf", "hf-to-megatron"])
def test_help_of_a_conversion_waits_for_nothing(direction):
    status, said, imported = run(_MODULE.format(MODULES["kvshift-convert"]), direction, "--help")
    assert (status, imported) == (0, []), said
    assert said.startswith(f"usage: kvshift-convert {direction} ")


def test_a_recipe_waits_for_nothing():
    status, said, imported = run(_MODULE.format(MODULES["kvshift-recipe"]), "19b", "240x80gb")
    assert (status, imported) == (0, []), said
    assert "--num-layers 48" in said


@pytest.mark.parametrize(
    "tool", sorted(path.name for path in (PROJECT / "tools").glob("[a-z]*.py"))
)
def test_help_of_a_tool_of_the_checkout_waits_for_nothing(tool):
    path = str(PROJECT / "tools" / tool)
    status, said, imported = run(
        f"import runpy\nrunpy.run_path({path!r}, run_name='__main__')", "-h"
    )
    assert (status, imported) == (0, []), said
    assert said.startswith("usage: ")


def test_what_is_imported_is_noticed():
    assert run("import numpy")[2] == ["numpy"]
    assert run("raise SystemExit(3)")[0] == 3
