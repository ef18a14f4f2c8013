"""Values computed from converted weights, in the graphs of ``torch.compile``.

Compiled code keeps no class such as :class:`~halo_tensor.weight.derived.Derived`. Dynamo's graph is read instead, before it is
compiled: it holds the calls of forward under the names that eager code uses, and no backward. The rules are those of
:mod:`halo_tensor.weight.derived`. Dynamo makes its graph in every process, so a warning does not depend on caches.

This module relies on internals of Dynamo (:data:`halo_tensor.fences.fast_paths.DERIVED`). It was tested with torch 2.11 to
2.15.
"""

import operator
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import fx
from torch._dynamo import symbolic_convert
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import grad_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from halo_tensor.fences.fast_paths import DERIVED
from halo_tensor.weight import derived
from halo_tensor.weight.product_warnings import PRODUCTS, message_of_product, name_of
from halo_tensor.weight.tensor import HaloWeight

#: The tracing contexts of those graphs of Dynamo that are or will be read.
_read: WeakSet[Any] = WeakSet()
#: The warnings that were shown: Python's default filter shows a warning once for each line of code.
_registry: dict[Any, Any] = {}
#: The directory of this library: a warning points to a line of the user's code.
_HERE = str(Path(__file__).parents[1])
#: Operators whose graphs run without gradients enabled, as an autograd function does in eager code.
_WITHOUT_GRADIENTS = {"autograd_function_apply"}


class _Product(NamedTuple):
    """A product in high precision: its name, its operand, and its line in the user's code."""

    name: str
    what: str
    file: str
    line: int


def install() -> None:
    """If Dynamo is making a graph in this thread, have it read when it is complete, once."""
    translator = getattr(symbolic_convert.tls, "current_tx", None)
    output = getattr(translator, "output", None)
    if output is None or output.tracing_context in _read:
        return
    _read.add(output.tracing_context)
    grad_enabled = output.tracing_context.global_context.global_state["grad_enabled"][1]  # where the graph begins
    # Dynamo calls it before it hands the graph to a backend. It also calls it where it restarts before a graph break; then
    # there is no module yet.
    output.add_cleanup_hook(lambda: _warn_of_products(output, grad_enabled))


def _warn_of_products(output: Any, grad_enabled: bool) -> None:
    # Warnings are raised outside of the fence, since a user's filter may make them errors.
    for name, what, file, line in DERIVED.attempt(_products_of, output, grad_enabled) or ():
        message = message_of_product(name, what)
        warnings.warn_explicit(message, UserWarning, file, line, registry=_registry)


def _products_of(output: Any, grad_enabled: bool) -> list[_Product]:
    """Return the products in the graph of one frame, each once."""
    if output.graph.owning_module is None:
        return []
    return sorted(set(_products(output.graph, grad_enabled, {})))


def _products(graph: fx.Graph, grad_enabled: bool, sources: dict[fx.Node, Any]) -> Iterator[_Product]:
    """Yield the products that ``graph`` makes with values computed from weights.

    Args:
        graph: read in order.
        grad_enabled: whether gradients are enabled where it begins.
        sources: node -> the weight that its value was computed from; a list for a node with several results. It is filled in.
    """
    modes = [grad_enabled]  # one for each nested inference mode, the innermost last
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            modes[-1] = bool(node.args[0])
        elif node.target is grad_mode._enter_inference_mode:
            modes.append(modes[-1] and not node.args[0])
        elif node.target is grad_mode._exit_inference_mode:
            modes.pop()
        elif node.op == "placeholder":
            sources.setdefault(node, _source_of_input(node))
        elif isinstance(node.target, HigherOrderOperator):
            yield from _products_inside(node, modes[-1], sources)
        elif node.op in ("call_function", "call_method"):
            if (product := _product(node, sources)) is not None:
                yield product
            sources[node] = _source_of_result(node, modes[-1], sources)


def _products_inside(node: fx.Node, grad_enabled: bool, sources: dict[fx.Node, Any]) -> Iterator[_Product]:
    """Yield the products in the graphs that a higher-order operator runs, such as activation checkpointing."""
    if _name(node) in _WITHOUT_GRADIENTS:
        return
    arguments: list[fx.Node] = []
    fx.node.map_arg(node.args, arguments.append)
    root = node.graph.owning_module
    modules = {a: getattr(root, str(a.target), None) for a in arguments if a.op == "get_attr"}
    operands = [a for a in arguments if a not in modules]
    for module in modules.values():
        if isinstance(module, fx.GraphModule):
            inputs = module.graph.find_nodes(op="placeholder")
            # Operands come last: arguments that the operator reads itself, such as a condition, come before them.
            given = dict(zip(reversed(inputs), (sources.get(o) for o in reversed(operands)), strict=False))
            inner = {i: source for i, source in given.items() if source}
            yield from _products(module.graph, grad_enabled, inner)


def _source_of_input(node: fx.Node) -> str | None:
    """Describe the weight that an input of the graph was computed from in eager code."""
    argument = node.meta.get("grapharg")
    example = None if argument is None else argument.example
    return example.source if isinstance(example, derived.Derived) else None


def _product(node: fx.Node, sources: dict[fx.Node, Any]) -> _Product | None:
    if _name(node) not in PRODUCTS or str(getattr(node.target, "__module__", "")).startswith("halo_tensor."):
        return None
    operands = node.all_input_nodes
    if any(isinstance(_value(o), HaloWeight) for o in operands):  # quantised, or warned of where it is traced
        return None
    operand = next((o for o in operands if isinstance(sources.get(o), str)), None)
    if operand is None:
        return None
    what = f"a value {list(_value(operand).shape)} computed from {sources[operand]}"
    return _Product(getattr(node.target, "__name__", str(node.target)), what, *_place(node))


def _place(node: fx.Node) -> tuple[str, int]:
    """Return the file and the line of the user's code that makes a call."""
    places = re.findall(r'File "(.*)", line (\d+)', node.stack_trace or "")
    places = [(file, int(line)) for file, line in places if not file.startswith(_HERE)]
    return places[-1] if places else ("<compiled code>", 1)


def _source_of_result(node: fx.Node, grad_enabled: bool, sources: dict[fx.Node, Any]) -> Any:
    """Describe the weight that the result of a call is computed from, if it is still a weight; a list for several results."""
    name, value = _name(node), _value(node)
    arguments: Any = node.args
    if node.target is operator.getitem:
        found = sources.get(arguments[0]) if isinstance(arguments[0], fx.Node) else None
        if isinstance(found, list):
            return found[arguments[1]]
    given: list[tuple[Any, str | None]] = []
    for operand in node.all_input_nodes:
        tensor = _value(operand)
        if isinstance(tensor, HaloWeight):
            given.append((tensor, derived.source_of(tensor)))
        elif isinstance(tensor, torch.Tensor):
            given.append((tensor, sources.get(operand)))
    for tensor, source in given:
        is_detached = name == "detach" and not isinstance(tensor, HaloWeight)
        if tensor is value or is_detached:  # an in-place op returns its argument
            return source
    if not grad_enabled or name == "dequantize":  # the warning advises it
        return None
    if isinstance(value, list | tuple):
        return [_source(name, given, each) for each in value]
    return _source(name, given, value)


def _source(name: str, given: list, value: Any) -> str | None:
    return derived.source_of_result(name, given, value, _are_equal) if type(value) is FakeTensor else None


def _are_equal(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are known to be equal. To ask adds no guard on symbolic sizes."""
    return statically_known_true(sym_eq(tuple(one), tuple(other)))


def _name(node: fx.Node) -> str:
    """Return the name under which :mod:`halo_tensor.weight.derived` knows a call."""
    name = node.target.strip("_") if isinstance(node.target, str) else name_of(node.target)
    return "get" if name == "getattr" else name


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")
