"""Which of the values that a compiled graph saves are compressed, and in how many bits.

A value is known by the op that made it and by those that read it. What is not known is saved as it is: probabilities and
logits span decades, which a uniform grid cannot hold.
"""

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch import fx

from halo_tensor.activations import choice
from halo_tensor.activations.choice import has_size
from halo_tensor.recipe import Activations

_aten = torch.ops.aten
#: Ops whose results are compressed: products of converted layers, elementwise ops, convolutions.
_MADE_BY = {
    torch.ops.halo.scaled_mm.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.cat.default, _aten.embedding.default,
    _aten.convolution.default, _aten.clone.default, _aten.silu.default, _aten.gelu.default, _aten.relu.default,
}  # fmt: skip
#: Ops of softmax: what they make, and what is computed from that, is saved as it is.
_OF_SOFTMAX = {_aten.exp.default, _aten._softmax.default, _aten._log_softmax.default, _aten.log.default}
#: Products in high precision. An input of the graph that one of them reads may be a weight.
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default}
_CASTS = {torch.ops.prims.convert_element_type.default, _aten._to_copy.default}
#: How many nodes are followed from a value to ops of attention, or back to a softmax.
_STEPS = 12


def is_view(node: Any) -> bool:
    """Whether a node is a view of its first argument."""
    target = getattr(node, "target", None)
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is _aten._unsafe_view.default)


def root_of(node: fx.Node) -> fx.Node:
    """Return the node whose memory a view reads."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_dynamic(node: fx.Node) -> bool:
    """Whether a value is a matrix, in high precision, of a size that is not known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2 or value.shape[-1] == 1:
        return False
    return not all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def is_mask(node: fx.Node, reader: fx.Node, activations: Activations) -> bool:
    """Whether one bit says all that backward reads of an element: it is a bool, or the result of a ReLU that is only compared
    with zero."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or is_dynamic(node):
        return False
    if value.dtype == torch.bool:
        return activations.whole and value.numel() >= choice.FEWEST_ELEMENTS
    if activations.inner is None or not (has_size(value) and is_rectified(node)):
        return False
    return all(user.target is _aten.le.Scalar and user.args[1] == 0 for user in _users(reader))


def is_rectified(node: fx.Node) -> bool:
    """Whether a value was made by a ReLU, and perhaps cast."""
    node = root_of(node)
    while node.target in _CASTS:
        node = root_of(node.args[0])  # type: ignore[arg-type]
    return node.target is _aten.relu.default


def bits_of(node: fx.Node, reader: fx.Node, activations: Activations) -> int | None:
    """Return the bits in which an element of a saved value is kept; None to save it as it is.

    Args:
        node: the value, in forward.
        reader: the placeholder of it, in backward.
        activations: the bits of each kind of value.
    """
    if is_mask(node, reader, activations):
        return 1
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or is_dynamic(node) or not has_size(value):
        return None
    maker = root_of(node)
    while maker.target in _CASTS:
        maker = root_of(maker.args[0])  # type: ignore[arg-type]
    result = _of_attention(maker)
    if result is not None and result > 0:  # the logarithms of sums, on which all probabilities of a row depend
        return None
    if result == 0 or any(_of_attention(user) is not None for user in _readers(reader)):
        return activations.attention
    if maker.op == "placeholder":
        return None if any(map(_reads_weight, (*_users(maker), *_users(reader)))) else activations.norms
    if maker.target not in _MADE_BY and not _is_plain_forward(maker):
        return None
    if any(source.target in _OF_SOFTMAX for source in _sources(maker)):
        return None
    is_stream = maker.target in (_aten.add.Tensor, _aten.embedding.default, _aten.convolution.default)
    return activations.norms if is_stream else activations.inner


def _reads_weight(node: fx.Node) -> bool:
    """Whether a node may read a weight: a product in high precision, or a quantisation in rows only, as of a weight that holds
    no codes. Compilers know parameters of modules, but not those that are arguments of a function."""
    is_quantised = node.target is torch.ops.halo.rotate_quantize.default and tuple(node.args[7:9]) == (True, False)
    return node.target in _PRODUCTS or is_quantised


def _is_plain_forward(node: fx.Node) -> bool:
    """Whether a node is the output of a converted layer whose forward is plain: the same X is quantised for grad_weight."""
    if node.target not in (_aten.mm.default, _aten.addmm.default):
        return False
    x = root_of(node.args[-2])  # type: ignore[arg-type]
    return any(is_ours(user) for user in _users(x))


def is_ours(node: fx.Node) -> bool:
    """Whether a node is an op of this library. What else reads X of a layer in high precision makes an operand of it."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "halo"


def _of_attention(node: fx.Node) -> int | None:
    """Return which result of an op of attention a node is, 0 for the op itself; None if it is another node."""
    made = node.target is getitem
    maker = node.args[0] if made else node
    if "_scaled_dot_product_" not in str(getattr(maker, "target", "")):
        return None
    return int(node.args[1]) if made else 0  # type: ignore[arg-type]


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a node's memory, directly or through views."""
    for user in node.users:
        if is_view(user):
            yield from _users(user)
        else:
            yield user


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target.is_view or target in _CASTS or target is _aten.cat.default
    )


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a value, or what elementwise ops make of it alone and of inputs of the graph."""
    waiting, met = [(node, 0)], {node}
    while waiting:
        at, depth = waiting.pop()
        for user in at.users:
            if user in met:
                continue
            met.add(user)
            yield user
            if depth < _STEPS and _is_elementwise(user):
                waiting.append((user, depth + 1))


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and those from which elementwise ops compute it."""
    waiting, met = [(node, 0)], {node}
    while waiting:
        at, depth = waiting.pop()
        yield at
        if depth < _STEPS and _is_elementwise(at):
            new = [used for used in at.all_input_nodes if used not in met]
            met.update(new)
            waiting += [(used, depth + 1) for used in new]
