"""The model uses public names of Transformers, in one file, and says what it needs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from kvshift_megatron import hf
from kvshift_megatron.hf import compatibility_kvshift
from tests.hf.models import tiny_model, tokens

FOLDER = Path(hf.__file__).parent
FILES = sorted(FOLDER.glob("*_kvshift.py"))
# Names that the library reads from a custom model, and documents for its authors.
HOOKS = {
    "_attn_implementation",
    "_can_compile_fullgraph",
    "_init_weights",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tied_weights_keys",
}


def foreign_imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] == "transformers"}


def underscored(tree: ast.AST) -> set[str]:
    """Return names with a leading underscore that a file reads or sets, but does not define."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            (defined if on_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            (used if node.name in HOOKS else defined).add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            (used if node.id in HOOKS else defined).add(node.id)
    return {n for n in used - defined if n.startswith("_") and not n.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_one_file_imports_the_library(path):
    imported = foreign_imports(ast.parse(path.read_text()))
    if path.name != "compatibility_kvshift.py":
        assert not imported
        return
    parts = {part for name in imported for part in name.split(".")}
    assert imported and not any(part.startswith("_") for part in parts)
    # No import from another model: its classes may change with any release.
    assert "models" not in parts


def test_the_underscored_names_are_the_documented_hooks():
    used = set().union(*(underscored(ast.parse(path.read_text())) for path in FILES))
    assert used == HOOKS | {"_assert_async", "_dynamo"}  # torch's, in docs/private_names.md


def test_an_underscored_name_is_noticed():
    source = "class A:\n  _no_split_modules = []\n  def f(self, cache):\n    self._a = cache._seen"
    assert underscored(ast.parse(source)) == {"_no_split_modules", "_seen"}
    assert foreign_imports(ast.parse("from transformers.models.llama import x")) == {
        "transformers.models.llama.x"
    }


IMPORT = """
import sys, types
stand_in = types.ModuleType("transformers")
stand_in.__version__, stand_in.__path__ = sys.argv[1], []
sys.modules["transformers"] = stand_in
sys.path.insert(0, sys.argv[2])
import compatibility_kvshift
"""


@pytest.mark.parametrize(
    ("version", "what"),
    [("4.57.6", "pip install 'transformers>=5.0.0'"), ("6.0.0", "it lacks a name")],
)
def test_a_release_that_cannot_work_is_refused(version, what):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, version, str(FOLDER)], capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: a KV-shifting Llama needs a release of transformers")
    assert f"{version} is installed" in last and what in last
    assert compatibility_kvshift.OLDEST in last and compatibility_kvshift.NEWEST in last


def test_the_message_names_the_tested_releases():
    """Check that pyproject.toml's range begins with the oldest, and make lock pins the newest."""
    project = Path(__file__).parents[2]
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    (wanted,) = (
        Requirement(line)
        for line in extras["optional-dependencies"]["hf"]
        if line.startswith("transformers")
    )
    floor = next(part.version for part in wanted.specifier if part.operator == ">=")
    oldest, newest = compatibility_kvshift.OLDEST, compatibility_kvshift.NEWEST
    assert Version(oldest) == Version(floor)
    assert f"transformers=={newest}" in (project / "tools/requirements/dev.txt").read_text()
    assert Version(transformers.__version__) in wanted.specifier


def test_the_cache_has_both_names():
    model, ids = tiny_model(), tokens(1, 4)
    first = model(ids)
    cache = getattr(first, compatibility_kvshift.CACHE_NAME)
    assert cache.get_seq_length() == 4
    for name in ("cache", "past_key_values"):
        model(ids[:, :1], **{name: cache})
    assert cache.get_seq_length() == 6


def test_return_dict_false_returns_a_tuple():
    model, ids = tiny_model(attn_implementation="eager"), tokens(1, 4)
    out = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    as_tuple = model(
        ids, output_attentions=True, output_hidden_states=True, use_cache=False, return_dict=False
    )
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3
    assert as_tuple[0].equal(out.logits)
    assert as_tuple[1][-1].equal(model.model(ids).last_hidden_state)
