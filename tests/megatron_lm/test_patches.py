"""The patches themselves: they are small, import lazily, and do nothing without the flag."""

import argparse
import ast
import os
import sys
import tomllib
import types

import pytest

from kvshift_megatron.megatron_lm import patch as tool
from tests.megatron_lm import megatron_trees as trees

SETS = {
    tag: tool.find_set(
        tomllib.loads((trees.PATCHES / tag / "manifest.toml").read_text())["versions"][0]
    )
    for tag in trees.TAGS
}
HUNKS = [
    pytest.param(patch, path, lines, id=f"{tag}-{patch.name[:4]}-{path}-{start}")
    for tag, chosen in SETS.items()
    for path in chosen.unpatched
    for patch in chosen.touching(path)
    for start, lines in trees.hunks(patch, path)
]


@pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)
def test_manifest_names_what_the_patches_touch(chosen):
    touched = {
        line.removeprefix("+++ b/")
        for patch in chosen.patches
        for line in patch.read_text().splitlines()
        if line.startswith("+++ b/")
    }
    assert touched == set(chosen.unpatched)
    assert all(len(digest) == 64 for digest in chosen.unpatched.values())


@pytest.mark.parametrize("patch, path, lines", HUNKS)
def test_hunks_are_small_and_add_only(patch, path, lines):
    added = [line for line in lines if line.startswith("+")]
    removed = [line for line in lines if line.startswith("-")]
    # Only one line is changed: what gpt_builders.py imports from spec_utils.
    assert len(removed) == ("import_module" in "".join(removed))
    assert 0 < len(added) <= 15
    assert not any(line != line.rstrip() or len(line) > 105 for line in added)


@pytest.mark.parametrize("patch, path, lines", HUNKS)
def test_this_package_is_only_imported_under_a_condition(patch, path, lines):
    after = [line[1:] for line in lines if not line.startswith("-")]
    for number, line in enumerate(after):
        if "import" in line.split() and "kvshift_megatron" in line:
            guard = next(
                earlier
                for earlier in reversed(after[:number])
                if earlier.strip() and _indent(earlier) < _indent(line)
            )
            assert guard.strip().startswith("if ") and "kv" in guard


def _indent(line):
    return len(line) - len(line.lstrip())


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Return path -> syntax tree of every patched file that the installed megatron-core has."""
    root, patches = trees.installed_tree(tmp_path_factory.mktemp("patched"))
    assert tool.main(["apply", "--megatron-path", str(root)], patches) == 0
    chosen = tool.find_set(tool.read_version(root), patches)
    real = [path for path in chosen.unpatched if (trees.installed_root() / path).exists()]
    return {path: ast.parse((root / path).read_bytes(), path) for path in real}


def test_patched_files_compile_and_only_import_this_package_inside_functions(patched):
    assert "megatron/training/arguments.py" in patched
    for path, tree in patched.items():
        compile(tree, path, "exec")
        for node in _outside_functions(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "kvshift" not in ast.unparse(node), path


def _outside_functions(tree):
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _outside_functions(node)


@pytest.fixture
def parse(patched, monkeypatch):
    """Return a function that runs Megatron's patched parse_args alone, on a command line."""
    tree = patched["megatron/training/arguments.py"]
    function = next(node for node in tree.body if getattr(node, "name", None) == "parse_args")

    def add_megatron_arguments(parser):
        parser.add_argument("--spec", nargs="*", default=None)
        for flag in ("--yaml-cfg", "--global-batch-size"):
            parser.add_argument(flag, default=None)
        for flag in ("--use-legacy-models", "--enable-msc", "--disable-msc-deprecated"):
            parser.add_argument(flag, action="store_true")
        return parser

    storage = types.SimpleNamespace(disable=lambda: None, is_enabled=lambda: False)
    names = {
        "argparse": argparse,
        "os": os,
        "sys": sys,
        "add_megatron_arguments": add_megatron_arguments,
        "MultiStorageClientFeature": storage,
        "warn_rank_0": lambda *_: None,
    }
    exec(compile(ast.Module([function], []), "arguments.py", "exec"), names)
    # Without the flag nothing may import the package: with this, an import fails.
    monkeypatch.setitem(sys.modules, "kvshift_megatron.gpt_specs", None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        return names["parse_args"]()

    return call


@pytest.fixture
def stock(monkeypatch):
    """Return a function that puts a stand-in in place of kvshift_megatron.gpt_specs."""

    def add_kv_shift_args(parser):
        parser.add_argument("--kv-shift-window", type=int)
        return parser

    # The real module needs torch.
    module = types.SimpleNamespace(add_kv_shift_args=add_kv_shift_args)
    return lambda: monkeypatch.setitem(sys.modules, "kvshift_megatron.gpt_specs", module)


def test_without_the_flag_the_package_is_not_imported(parse):
    assert parse().kv_shift is False
    assert parse("--spec", "a", "b").spec == ["a", "b"]


def test_options_without_the_flag_are_refused(parse, stock, capsys):
    stock()
    with pytest.raises(SystemExit):
        parse("--kv-shift-window", "3")
    assert "unrecognized arguments: --kv-shift-window" in capsys.readouterr().err


def test_the_flag_brings_its_options(parse, stock):
    with pytest.raises(ImportError):
        parse("--kv-shift")
    stock()
    args = parse("--kv-shift", "--kv-shift-window", "3")
    assert args.kv_shift is True and args.kv_shift_window == 3


@pytest.mark.parametrize("words", [["--spec", "a", "b"], ["--yaml-cfg", "c.yaml"]])
def test_the_flag_and_another_choice_of_layers_are_refused(parse, stock, words):
    stock()
    with pytest.raises(ValueError, match=f"^--kv-shift and {words[0]} both .* drop one of them$"):
        parse("--kv-shift", *words)
