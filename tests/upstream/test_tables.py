"""Every replacement in Megatron and torch is a row of a table, and every row has its target."""

import ast
import re

import pytest

from kvshift_megatron.upstream.loading_table import BRIDGE
from kvshift_megatron.upstream.substitutions import resolve
from tests.project.private_names import scan, syntax
from tests.upstream import tables

ROWS = list(tables.rows())
_FOLDER = "upstream/"
# Set elsewhere, but not replacements; see kvshift_megatron/upstream/__init__.py.
_NOT_REPLACED = {("bridge.py", "._normalize_expert_param_name"), ("arguments.py", ".?")}
# Fields of a copy, and of Megatron's arguments.
_SETTERS = ("specs/rewrite.py", "arguments.py")


def outside(text: str, file: str) -> list[str]:
    """Return what a file of the package replaces without a row."""
    if file.startswith(_FOLDER):
        return []
    found = [
        use.name
        for use in scan.uses_in(text, file)
        if use.kind == "set"
        and syntax.root(use.name) in ("torch", "megatron", "")
        and (file, use.name) not in _NOT_REPLACED
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found += [name for name in _imported(node) if name.startswith("unittest.mock")]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (
                called == "Substitution"
                or (
                    re.search(r"\b(setattr|delattr|__setattr__|__delattr__)$", called)
                    and file not in _SETTERS
                )
                or re.fullmatch(r"(vars\(.*\)|.*\.__dict__)\.(update|pop|setdefault|clear)", called)
            ):
                found.append(ast.unparse(node))
        elif (
            isinstance(node, ast.Subscript)
            and not isinstance(node.ctx, ast.Load)
            and re.fullmatch(r"vars\(.*\)|.*\.__dict__", ast.unparse(node.value))
        ):
            found.append(ast.unparse(node))
    return found


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [f"{module}{alias.name}" for alias in node.names]


def test_everything_that_is_replaced_has_a_row():
    found = {}
    for path in sorted(scan.PACKAGE.rglob("*.py")):
        file = path.relative_to(scan.PACKAGE).as_posix()
        if names := outside(path.read_text(), file):
            found[file] = names
    assert found == {}


HEAD = """
import torch
from megatron.core import timers
from megatron.core.optimizer import clip_grads as norms
from megatron.training import training


class Own(torch.nn.Module):
    def __init__(self):
        self.step = training.train_step
        vars(self)
        self.shape = torch.Tensor.shape


def install(args, thing):
    args.training = True
    {}
"""


@pytest.mark.parametrize(
    "planted",
    [
        "training.train_step = print",
        "thing.x, norms.l2_norm_impl = 1, 2",
        "torch.Tensor.type = print",
        "tensor = torch.Tensor; tensor.type = print",
        "loop = training; loop.train_step = print",
        "timers.SummaryWriter: type = int",
        "training.count += 1",
        "del training.train_step",
        "setattr(thing, 'train_step', print)",
        "delattr(training, 'train_step')",
        "type.__setattr__(torch.Tensor, 'type', print)",
        "vars(training)['train_step'] = print",
        "vars(thing).update(step=print)",
        "training.__dict__['train_step'] = print",
        "from unittest import mock",
        "from unittest.mock import patch",
        "thing._hidden = 1",
        "Substitution('torch.Tensor.type', 'Why.', value=1)",
    ],
)
def test_a_replacement_without_a_row_is_seen(planted):
    assert outside(HEAD.format("pass"), "x.py") == []
    assert outside(HEAD.format(planted), "x.py")
    assert outside(HEAD.format(planted), "upstream/substitutions.py") == []


def test_every_table_has_rows():
    files = {file for file, _ in ROWS}
    assert {f"{_FOLDER}{path.name}" for path in tables.FOLDER.glob("*_table.py")} <= files
    assert f"{_FOLDER}dataset_helpers.py" in files
    assert len(ROWS) > 80


def is_sentence(text: str) -> bool:
    """Return whether a text is one sentence."""
    return bool(re.fullmatch(r"[A-Z][^.]*(\.\w[^.]*)*\.", text)) and len(text.split()) > 2


def test_every_row_has_a_reason_that_is_a_sentence():
    assert [row.target for _, row in ROWS if not is_sentence(row.reason)] == []
    for planted in ("", "no capital here.", "No full stop", "Too short.", "One is. Two are not."):
        assert not is_sentence(planted)


# Those of Megatron-Bridge: tests/transformer_engine/test_private_names.py.
HERE = [row for _, row in ROWS if not row.target.startswith(f"{BRIDGE}.")]


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.target)
def test_the_installed_release_has_the_target(row):
    if row.applies():
        assert hasattr(resolve(row.module), row.name)


def test_the_tables_import_no_other_part_of_the_package():
    for path in tables.FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [name for name in _imported(node) if name.startswith("kvshift_megatron")]
                assert all(name.startswith("kvshift_megatron.upstream") for name in names), path
