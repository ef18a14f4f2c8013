"""Passes over a compiled graph of forward and backward, before it is partitioned.

1. Where X is saved in any case, its codes are not. Forward quantises X for its own product, and saves the transposed codes for
   grad_weight instead of X. But attention's backward saves attention's result, which is the X of o_proj. There the transposed
   codes are computed in backward, from X. That costs one more pass over X and saves a byte per element.
2. Two gradients E that elementwise operations compute from the same matrices, as in the backward of a gated MLP, are quantised
   by one op. Its kernels compute both, so that neither is written to memory
   (:mod:`halo_tensor.kernels.quantize.two_gradients`).
3. Seeds of stochastic rounding are read where Inductor draws them, in one launch for the whole graph. Otherwise, Inductor
   would make each of them a random number of its own, in a launch of its own.
4. What is made of weights alone, and costs memory when it is saved, is made in backward.

Private API: ``torch._inductor.config.joint_custom_post_pass``, ``custom_graph_pass.CustomGraphPass``, ``inductor_prims``
(lookup_seed, randint) and ``pattern_matcher.stable_topological_sort``; ``torch._functorch.partitioners``
(get_default_op_list, must_recompute); the names "tangents" of AOTAutograd's placeholders; ``recompute`` and
``eager_input_vals`` in a node's ``meta``. Tested with torch 2.11 to 2.15 (:data:`halo_tensor.fences.fast_paths.JOINT_GRAPH`).
A graph on which a pass fails stays as it is.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list, must_recompute
from torch._inductor import config, inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils.checkpoint import CheckpointPolicy

from halo_tensor.fences.fast_paths import AHEAD, JOINT_GRAPH, disabled
from halo_tensor.kernels.device import PRODUCER_INPUTS, runs_kernels
from halo_tensor.version import fingerprint

#: Switches of the two passes, for comparisons. They are part of the key of cached graphs. But AOTAutograd's key is made before
#: ``options`` of torch.compile take effect, so it lacks them if a pass is set there.
REPEAT_FOR_BACKWARD = QUANTIZE_TWO_AT_ONCE = True
_QUANTIZE = torch.ops.halo.rotate_quantize.default
_CODES_T = 1  # the index of the transposed codes among its results
_PAIR, _PAIRS = torch.ops.halo.quantize_pair.default, torch.ops.halo.quantize_pairs.default
_BOTH = torch.ops.halo.quantize_both.default
_TURN_STACK = torch.ops.halo.turn_stack.default
#: The position of the seed among the arguments.
_SEED = {_QUANTIZE: 9, _BOTH: 7}
_QUANTISERS = _QUANTIZE, _PAIR, _PAIRS, _BOTH


def quantize_again_in_backward(graph: fx.Graph) -> None:
    """Split each quantisation into one for forward and one for backward, if backward has X and gets exactly the same codes."""
    if not (_tangents(graph) and graph.find_nodes(op="call_function", target=_QUANTIZE)):
        return
    graph.eliminate_dead_code()  # the partitioner does it too, and dead nodes save nothing
    backward = _after(graph, _tangents(graph))
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        arguments: Any = node.args
        x, row_rotation, *_, fold_rows, fold_columns, rows, columns, seed, _, _ = arguments
        # With a rotation of rows, kernels may take other tiles if only the transpose is wanted, and a code may differ.
        repeatable = not row_rotation and fold_rows is None and fold_columns is None and seed is None
        tagged = "recompute" in node.meta  # by activation checkpointing
        if rows and columns and repeatable and not tagged and node not in backward and _keeps(x, backward):
            transposed = [user for user in node.users if user.args[1] == _CODES_T]
            if transposed and all(reader in backward for codes_t in transposed for reader in _readers(codes_t, backward)):
                _split(node, transposed)


def make_codes_again_in_backward(graph: fx.Graph) -> None:
    """Mark what is made of weights alone, so that backward makes it and forward does not save it: the codes of weights that
    hold none, and the codes of frozen experts in the order that grad_input reads.

    A weight that holds no codes is recognised by the layout: of a matrix that enters the graph, only codes in rows are made,
    for both passes.
    """
    tangents = _tangents(graph)
    if not tangents:
        return
    if turned := graph.find_nodes(op="call_function", target=_TURN_STACK):
        backward = _after(graph, tangents)
        for node in turned:
            if node not in backward:
                node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        arguments: Any = node.args
        x, (rows, columns, seed) = arguments[0], arguments[7:10]
        if rows and not columns and seed is None and _root(x).op == "placeholder" and "recompute" not in node.meta:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _root(node: Any) -> fx.Node:
    """Return the node whose memory a view reads."""
    while _is_view(node) or node.target is torch.ops.aten.detach.default:
        node = node.args[0]
    return node


def _tangents(graph: fx.Graph) -> list[fx.Node]:
    """Return the placeholders for the gradients of the graph's results, by AOTAutograd's names."""
    return [node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)]


def _after(graph: fx.Graph, nodes: list[fx.Node]) -> set[fx.Node]:
    """Return these nodes and all nodes that depend on them."""
    after = set(nodes)
    for node in graph.nodes:
        if node.op != "output" and any(used in after for used in node.all_input_nodes):
            after.add(node)
    return after


def _keeps(x: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether the partitioner saves x in any case: backward reads it, and an op that is not recomputed made it."""
    base: Any = x
    while _is_view(base):
        base = base.args[0]
    made_by = base.args[0] if base.target is operator.getitem else base
    if made_by.op != "call_function" or _dtype(base) != _dtype(x):
        return False
    recomputed = get_default_op_list().is_recomputable(made_by) or must_recompute(made_by) or must_recompute(base)
    return not recomputed and any(reader in backward for reader in _readers(base, backward))


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is torch.ops.aten._unsafe_view.default)


def _readers(node: fx.Node, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes that read a node's memory, directly or through views of it in forward."""
    for user in node.users:
        if _is_view(user) and user not in backward:
            yield from _readers(user, backward)
        else:
            yield user


def _split(node: fx.Node, transposed: list[fx.Node]) -> None:
    """Let a copy of a quantisation, which the partitioner puts into backward, make the transposed codes."""
    arguments: Any = node.args
    *same, _, _, seed, gain, flat = arguments
    codes, codes_t, scales = node.meta["val"]
    nothing = codes.new_empty(0)
    with node.graph.inserting_before(node):
        again = node.graph.node_copy(node)
    node.args, node.meta["val"] = (*same, True, False, seed, gain, flat), (codes, nothing, scales)
    again.args, again.meta["val"] = (*same, False, True, seed, gain, flat), (nothing, codes_t, scales)
    again.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE  # neither saved nor computed in forward
    for codes_t in transposed:
        codes_t.replace_input_with(node, again)


def quantize_two_gradients_at_once(graph: fx.Graph) -> None:
    """Merge the quantisations of two gradients E that elementwise operations compute from common matrices."""
    if len(graph.find_nodes(op="call_function", target=_PAIR)) < 2:
        return
    alone: list[fx.Node] = []
    for node in graph.find_nodes(op="call_function", target=_PAIR):
        if not _is_computed(node):
            continue
        other = next((other for other in alone if _belong_together(graph, other, node)), None)
        if other is None:
            alone.append(node)
        else:
            alone.remove(other)
            _merge(other, node)
            stable_topological_sort(graph)  # readers of the first may stand before the merged op


def read_seeds_where_they_are_drawn(graph: fx.Graph) -> None:
    """Let quantisers read a seed from the vector of Inductor's seeds, which are random 64-bit numbers, instead of a number
    that Inductor draws with it."""
    for node in [n for n in graph.nodes if n.target in _SEED]:
        position = _SEED[node.target]
        drawn = node.args[position]
        if not isinstance(drawn, fx.Node) or drawn.target is not inductor_prims.randint or len(drawn.users) > 1:
            continue
        lookup: Any = drawn.args[3]
        if lookup.target is not inductor_prims.lookup_seed:
            continue
        seeds, index = lookup.args
        with graph.inserting_before(drawn):
            seed = graph.call_function(torch.ops.aten.slice.Tensor, (seeds, 0, index, index + 1))
        seed.meta["val"] = drawn.meta["val"]
        drawn.replace_all_uses_with(seed)
        graph.erase_node(drawn)
        if not lookup.users:
            graph.erase_node(lookup)


def _is_computed(pair: fx.Node) -> bool:
    """Whether E is the result of elementwise operations, read by nothing else, and is not rotated."""
    arguments: Any = pair.args
    e, row_rotation, _, *folds, _ = arguments
    known = all("val" in used.meta for used in pair.all_input_nodes)
    if row_rotation or None in folds or not known or not runs_kernels(e.meta["val"].device):
        return False
    return _is_made_alone(e)


def _is_made_alone(e: Any) -> bool:
    """Whether ``e`` is the result of elementwise operations, and one node reads it."""
    while _is_view(e) and len(e.users) == 1:
        e = e.args[0]
    return _is_elementwise(e) and len(e.users) == 1


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _belong_together(graph: fx.Graph, a: fx.Node, b: fx.Node) -> bool:
    """Whether one op can do the quantisations a and b, of which b is later in the graph."""
    sources = [_sources(node.args[0]) for node in (a, b)]
    if not sources[0] & sources[1] or len(sources[0] | sources[1]) > PRODUCER_INPUTS:
        return False
    one, other = (node.args[0].meta["val"] for node in (a, b))  # type: ignore[union-attr]
    # Sizes may be symbols; these functions add no guards.
    alike = one.dtype == other.dtype and statically_known_true(sym_eq(one.shape, other.shape))
    if a.args[2] != b.args[2] or a.args[-1] != b.args[-1] or not alike:
        return False
    later = _after(graph, [a])
    return not any(used in later for used in b.all_input_nodes)


def _sources(e: Any) -> set[fx.Node]:
    """Return the nodes from which elementwise operations and views compute e."""
    sources, met, waiting = set(), {e}, [e]
    while waiting:
        node = waiting.pop()
        if _is_view(node) or _is_elementwise(node):
            new = [used for used in node.all_input_nodes if used not in met]
            met.update(new)
            waiting += new
        else:
            sources.add(node)
    return sources


def _merge(a: fx.Node, b: fx.Node) -> None:
    """Replace the quantisations a and b by one op in the place of b."""
    e_a, _, format, *folds_a, flat = a.args
    e_b, _, _, *folds_b, _ = b.args
    with b.graph.inserting_before(b):
        both = b.graph.call_function(_PAIRS, (e_a, e_b, format, *folds_a, *folds_b, flat))
    # Inductor keeps the strides of these values for an op that needs exact strides.
    inputs = tuple(x.meta["val"] if isinstance(x, fx.Node) else x for x in both.args)
    both.meta = b.meta | {"val": (*a.meta["val"], *b.meta["val"]), "eager_input_vals": (inputs, {})}
    for pair, first in ((a, 0), (b, len(a.meta["val"]))):
        for made in list(pair.users):
            made.args = (both, first + made.args[1])  # type: ignore[operator]
        b.graph.erase_node(pair)


def _rewrite(graph: fx.Graph) -> None:
    """Run the passes, on a copy first: if one of them fails there, ``graph`` is still whole."""
    stable_topological_sort(graph)  # earlier passes leave nodes unsorted
    trial = fx.Graph(graph.owning_module)
    trial.output(trial.graph_copy(graph, {}))
    for each in (trial, graph):
        make_codes_again_in_backward(each)
        if REPEAT_FOR_BACKWARD:
            quantize_again_in_backward(each)
        read_seeds_where_they_are_drawn(each)
        if QUANTIZE_TWO_AT_ONCE:
            quantize_two_gradients_at_once(each)


def _compile_kernels(graph: fx.Graph) -> None:
    """Start to compile the kernels of all ops, except of those whose input may be computed in the kernel."""
    first = next(n for n in graph.nodes if n.target in _QUANTISERS)
    if runs_kernels(first.args[0].meta["val"].device):
        from halo_tensor.compiler import kernels_ahead  # Triton, which a machine without a GPU may lack

        kernels_ahead.start([n for n in graph.nodes if not _may_have_producer(n)])


def _may_have_producer(node: fx.Node) -> bool:
    """Whether :mod:`halo_tensor.compiler.producers` may let a quantiser's kernel compute its input."""
    if node.target not in _QUANTISERS or node.target is _BOTH:
        return False
    x: Any = node.args[0]
    constant = not any(isinstance(n, torch.SymInt) for n in x.meta["val"].shape)  # else the op stays an op
    return constant and (node.target is _PAIRS or _is_made_alone(x))


class _Pass(CustomGraphPass):
    """The passes of this module, after ``others``.

    Only later versions of Inductor accept a list of passes: https://github.com/pytorch/pytorch/pull/184108.
    """

    def __init__(self, others: Sequence):
        self.others = others

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.others:
            other(graph)
        if any(node.target in _QUANTISERS for node in graph.nodes):
            JOINT_GRAPH.attempt(_rewrite, graph)
            AHEAD.attempt(_compile_kernels, graph)

    def uuid(self) -> tuple | None:
        """Return the part of the key of cached graphs; None, and graphs are not cached, if one of the others has none."""
        others = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        state = fingerprint(), *disabled(), REPEAT_FOR_BACKWARD, QUANTIZE_TWO_AT_ONCE
        return ("halo_tensor", *state, *others) if all(others) else None


def install() -> None:
    """Add the passes to Inductor's configuration, after its other joint passes, one of which recognises attention.

    The thread that compiles calls this for every graph, since the configuration belongs to a thread and may be replaced.
    In graphs without ops of this library, the passes do nothing; they are part of the cache key there too.
    """
    current = config.joint_custom_post_pass
    others = () if current is None else current if isinstance(current, list | tuple) else (current,)
    if not any(isinstance(other, _Pass) for other in others):
        config.joint_custom_post_pass = _Pass(others)
