"""Rewriting a Megatron layer spec, whatever it is nested in."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec, get_module


def rewrite(spec: Any, visit: Callable[[Any], Any]) -> Any:
    """A deep copy of `spec` in which every node is replaced by `visit(node)`, children first.

    Args:
        spec: ModuleSpec, a submodules dataclass, a list, tuple, dict or functools.partial of such,
            or a class.
        visit: takes a node (its children are rewritten already) and returns it or another.

    Returns:
        The copy; `spec` is left as it was. A node that occurs twice (one layer spec repeated for
        every layer) is visited once and stays shared inside the copy.
    """
    return _rewrite(copy.deepcopy(spec), visit, {})


def _rewrite(node, visit, done):
    if id(node) in done:
        return done[id(node)][1]
    result = node
    if isinstance(node, ModuleSpec):
        node.submodules = _rewrite(node.submodules, visit, done)
    elif is_dataclass(node) and not isinstance(node, type):
        for field in fields(node):
            child = getattr(node, field.name)
            new = _rewrite(child, visit, done)
            if new is not child:
                setattr(node, field.name, new)
    elif type(node) in (list, tuple):
        result = type(node)(_rewrite(child, visit, done) for child in node)
    elif type(node) is dict:
        result = {key: _rewrite(child, visit, done) for key, child in node.items()}
    elif isinstance(node, partial):
        result = partial(
            node.func,
            *(_rewrite(child, visit, done) for child in node.args),
            **{key: _rewrite(child, visit, done) for key, child in node.keywords.items()},
        )
    result = visit(result)
    # The node is kept beside its result, so that its id is not given to another object meanwhile.
    done[id(node)] = (node, result)
    return result


def module_class(node: Any) -> Any:
    """The class or function that a spec node builds; None for a node that builds nothing."""
    if isinstance(node, ModuleSpec):
        return get_module(node)
    if isinstance(node, partial):
        return node.func
    return node if isinstance(node, type) else None
