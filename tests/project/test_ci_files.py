"""GitHub's workflows and the pre-commit hooks call what exists, and find what they look for."""

import re

import pytest
import yaml

from tests.packaging.builds import tracked_files
from tests.support.launch import PROJECT

WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repo["hooks"]
}


def commands(node) -> list[str]:
    """Return every `make` command of a workflow, each once per target of its matrix."""
    if isinstance(node, list):
        return [command for item in node for command in commands(item)]
    if not isinstance(node, dict):
        return []
    found = [command for value in node.values() for command in commands(value)]
    if "run" in node:
        found.append(node["run"])
    if "strategy" not in node:
        return found
    matrix = node["strategy"]["matrix"]
    targets = [*matrix["target"], *(row["target"] for row in matrix.get("include", []))]
    return [
        command.replace("${{ matrix.target }}", target) for command in found for target in targets
    ]


def make_targets() -> set[str]:
    text = (PROJECT / "Makefile").read_text().replace("\\\n", " ")
    return set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_make_targets_that_exist(path):
    found = [command.split() for command in commands(yaml.safe_load(path.read_text()))]
    assert found
    assert {words[0] for words in found} == {"make"}
    assert {words[1] for words in found} <= make_targets()


def test_a_target_that_is_gone_is_noticed():
    planted = {"jobs": {"x": {"strategy": {"matrix": {"target": ["test", "gone"]}},
                              "steps": [{"run": "make ${{ matrix.target }}"}]}}}  # fmt: skip
    assert commands(planted) == ["make test", "make gone"]
    assert "gone" not in make_targets()


def test_no_file_has_a_path_of_one_machine():
    hook = HOOKS["no-machine-paths"]
    found = []
    for name in tracked_files():
        path = PROJECT / name
        if re.search(hook["exclude"], name) or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{name}: {match[0]}" for match in re.finditer(hook["entry"], text)]
    assert not found
    planted = "/" + "home/someone/project/"
    assert re.search(hook["entry"], f"see {planted}notes")
