"""Rewrite a Megatron layer spec at any depth."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec, get_module


def rewrite(spec: Any, visit: Callable[[Any], Any]) -> Any:
    """Return a deep copy of `spec` with every node replaced by `visit(node)`, children first.

    Args:
        spec: A ModuleSpec, a submodules dataclass, a list, tuple, dict or functools.partial of
            these, or a class.
        visit: Takes a node, whose children are already rewritten, and returns it or another.

    Returns:
        The copy; `spec` itself does not change. A node that occurs more than once (one layer spec
        repeated for every layer) is visited once and stays shared inside the copy.
    """
    return _rewrite(copy.deepcopy(spec), visit, {})


def _rewrite(node: Any, visit: Callable[[Any], Any], done: dict[int, tuple[Any, Any]]) -> Any:
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
    # Keep the node alive with its result: no other object may get its id meanwhile.
    done[id(node)] = (node, result)
    return result


def module_class(node: Any) -> Any:
    """Return the class or function that a spec node builds, or None if it builds nothing."""
    if isinstance(node, ModuleSpec):
        return get_module(node)
    if isinstance(node, partial):
        return node.func
    return node if isinstance(node, type) else None
