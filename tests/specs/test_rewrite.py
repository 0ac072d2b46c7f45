"""Rewriting nested specs: copies, shared nodes, the order of visits."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from kvshift_megatron.specs.rewrite import module_class, rewrite


class Old:
    pass


class New:
    pass


class Other:
    pass


@dataclass
class Submodules:
    first: Any = None
    second: Any = None


def replace_old(node):
    return New if node is Old else node


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Old, New),
        (Other, Other),
        ([Old, Other], [New, Other]),
        ((Old, [Old]), (New, [New])),
        ({"a": Old, "b": {"c": Old}}, {"a": New, "b": {"c": New}}),
        (Submodules(Old, Submodules(Other, Old)), Submodules(New, Submodules(Other, New))),
        (
            ModuleSpec(Other, params={"p": 1}, submodules=Submodules(Old)),
            ModuleSpec(Other, params={"p": 1}, submodules=Submodules(New)),
        ),
        (
            Submodules(ModuleSpec(Other, submodules=Submodules([Old]))),
            Submodules(ModuleSpec(Other, submodules=Submodules([New]))),
        ),
        ("text", "text"),
        (None, None),
    ],
)
def test_it_reaches_every_kind_of_node(spec, expected):
    assert rewrite(spec, replace_old) == expected


def test_it_reaches_into_partials():
    result = rewrite(partial(Other, Old, key=Submodules(Old)), replace_old)
    assert (result.func, result.args, result.keywords) == (Other, (New,), {"key": Submodules(New)})


def test_the_spec_itself_does_not_change():
    inner = Submodules(Old, [Old])
    spec = ModuleSpec(Other, params={"p": [1]}, submodules=inner)
    result = rewrite(spec, replace_old)
    assert spec.submodules is inner and inner == Submodules(Old, [Old])
    assert result.params == spec.params and result.params is not spec.params
    result.params["p"].append(2)
    assert spec.params == {"p": [1]}


def test_a_shared_node_is_visited_once_and_stays_shared():
    layer = ModuleSpec(Other, submodules=Submodules(Old))
    visited = []

    def visit(node):
        if isinstance(node, ModuleSpec):
            visited.append(node)
            return ModuleSpec(New, submodules=node.submodules)
        return replace_old(node)

    result = rewrite([layer, layer, Submodules(layer)], visit)
    assert len(visited) == 1
    assert result[0] is result[1] is result[2].first
    assert result[0] == ModuleSpec(New, submodules=Submodules(New))


def test_children_come_first():
    seen = []

    def visit(node):
        if isinstance(node, ModuleSpec | Submodules):
            seen.append((type(node).__name__, node))
        return replace_old(node)

    rewrite(ModuleSpec(Other, submodules=Submodules(Old)), visit)
    assert [name for name, _ in seen] == ["Submodules", "ModuleSpec"]
    assert seen[1][1].submodules == Submodules(New)


def test_module_class():
    assert module_class(ModuleSpec(Old)) is Old
    assert module_class(partial(Old, key=1)) is Old
    assert module_class(Old) is Old
    for node in (None, "text", Submodules(Old), [Old], 3):
        assert module_class(node) is None
    # A (module, name) pair, which Megatron imports when it builds the module.
    path = ("megatron.core.transformer.attention", "SelfAttention")
    assert module_class(ModuleSpec(path)).__name__ == "SelfAttention"
