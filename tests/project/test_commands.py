"""The installed commands exist, and show their help without waiting.

Tested by what they import, as time depends on the machine: importing torch takes a second or more,
Megatron several.
"""

import subprocess
import sys
import tomllib

import pytest

from tests.support.launch import PROJECT, python_path

SCRIPTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
# Modules that start the same commands with python -m.
MODULES = {
    "kvshift-recipe": "kvshift_megatron.recipes",
    "kvshift-plan": "kvshift_megatron.planning",
    "kvshift-convert": "kvshift_megatron.convert",
    "kvshift-patch": "kvshift_megatron.megatron_lm.patch",
    "kvshift-check": "kvshift_megatron.megatron_lm.check",
    "kvshift-cpu": "kvshift_megatron.cpu",
}
HEAVY = {"torch", "megatron", "transformers", "numpy", "matplotlib", "safetensors"}

# Prints what a program has imported at the end of its output.
_PROBE = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *sorted({HEAVY!r} & set(sys.modules))))
"""
_SCRIPT = "from importlib.metadata import EntryPoint\nsys.exit(EntryPoint({!r}, {!r}, '').load()())"
_MODULE = "import runpy\nrunpy.run_module({!r}, run_name='__main__', alter_sys=True)"


def run(program: str, *words: str) -> tuple[int, str, list[str]]:
    """Run a program with a command line; return exit status, output and heavy imports."""
    start = f"{_PROBE}sys.argv[1:] = {list(words)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=PROJECT.anchor,  # not the checkout, from which Python would import
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


def test_heavy_imports_are_caught():
    assert run("import numpy")[2] == ["numpy"]
    assert run("raise SystemExit(3)")[0] == 3
