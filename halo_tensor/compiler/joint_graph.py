"""What is done to a compiled graph of forward and backward, before it is cut in two.

Nothing of X is saved beside X itself. Forward makes X's codes for its own product, and their transpose for grad_weight, which
is saved instead of X. But some X is saved in any case: attention's backward wants its result, which is what o_proj reads.
There the transpose is made in backward, from X again. That costs one more pass over X, and saves a byte an element.

Two E that elementwise operations make from the same matrices, as a gated MLP's backward does, are quantised by one op, so that
neither need be written: see two_gradients.

This is written against AOTAutograd's partitioner and Inductor's joint passes as of torch 2.11–2.15
(:data:`halo_tensor.fences.fast_paths.JOINT_GRAPH`). A graph that they cannot be run on stays as it is.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list, must_recompute
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils.checkpoint import CheckpointPolicy

from halo_tensor.fences.fast_paths import JOINT_GRAPH, disabled
from halo_tensor.kernels.device import PRODUCER_INPUTS, runs_kernels
from halo_tensor.version import fingerprint

#: For comparison: without them, the transpose is always saved, and each E quantised alone. They are part of the key of cached
#: graphs, but not of AOTAutograd's where a pass comes through torch.compile's ``options``, which take effect after that key is
#: made.
REPEAT_FOR_BACKWARD = QUANTIZE_TWO_AT_ONCE = True
_QUANTIZE = torch.ops.halo.rotate_quantize.default
_CODES_T = 1  # of its outputs
_PAIR, _PAIRS = torch.ops.halo.quantize_pair.default, torch.ops.halo.quantize_pairs.default


def quantize_again_in_backward(graph: fx.Graph) -> None:
    """Split each quantisation in two, one for forward and one for backward, where backward has X and can repeat it exactly."""
    if not (_tangents(graph) and graph.find_nodes(op="call_function", target=_QUANTIZE)):
        return
    graph.eliminate_dead_code()  # as the partitioner will: what it drops keeps nothing
    backward = _after(graph, _tangents(graph))  # what cannot be run before there is a gradient
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        arguments: Any = node.args
        x, left, *_, fold_rows, fold_columns, rows, columns, seed, _ = arguments
        # A left rotation may run on other tiles where no rows are wanted, and then a code may differ.
        repeatable = not left and fold_rows is None and fold_columns is None and seed is None
        tagged = "recompute" in node.meta  # by someone's checkpointing
        if rows and columns and repeatable and not tagged and node not in backward and _keeps(x, backward):
            transposed = [user for user in node.users if user.args[1] == _CODES_T]
            if transposed and all(reader in backward for codes_t in transposed for reader in _readers(codes_t, backward)):
                _split(node, transposed)


def _tangents(graph: fx.Graph) -> list[fx.Node]:
    """The gradients that enter, as AOTAutograd names them."""
    return [node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)]


def _after(graph: fx.Graph, nodes: list[fx.Node]) -> set[fx.Node]:
    """These nodes, and what cannot be run before them."""
    after = set(nodes)
    for node in graph.nodes:
        if node.op != "output" and any(used in after for used in node.all_input_nodes):
            after.add(node)
    return after


def _keeps(x: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether the memory of x is saved in any case: something in backward reads it as it is, and it is the result of an op
    that the partitioner does not run twice."""
    base: Any = x
    while _is_view(base):
        base = base.args[0]
    made_by = base.args[0] if base.target is operator.getitem else base
    if made_by.op != "call_function" or _dtype(base) != _dtype(x):
        return False
    runs_twice = get_default_op_list().is_recomputable(made_by) or must_recompute(made_by) or must_recompute(base)
    return not runs_twice and any(reader in backward for reader in _readers(base, backward))


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is torch.ops.aten._unsafe_view.default)


def _readers(node: fx.Node, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """What reads a node's memory, looked at through forward's views of it."""
    for user in node.users:
        if _is_view(user) and user not in backward:
            yield from _readers(user, backward)
        else:
            yield user


def _split(node: fx.Node, transposed: list[fx.Node]) -> None:
    arguments: Any = node.args
    *same, _, _, seed, gain = arguments
    codes, codes_t, scales = node.meta["val"]
    nothing = codes.new_empty(0)
    with node.graph.inserting_before(node):
        again = node.graph.node_copy(node)
    node.args, node.meta["val"] = (*same, True, False, seed, gain), (codes, nothing, scales)
    again.args, again.meta["val"] = (*same, False, True, seed, gain), (nothing, codes_t, scales)
    again.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE  # the partitioner neither saves it nor runs it in forward
    for codes_t in transposed:
        codes_t.replace_input_with(node, again)


def quantize_two_gradients_at_once(graph: fx.Graph) -> None:
    """Merge quantisations of two E that are made elementwise of as many matrices as a kernel takes, one of them in common."""
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
            stable_topological_sort(graph)  # what reads the first of them may stand before both


def _is_computed(pair: fx.Node) -> bool:
    """Whether E is the result of elementwise operations that nothing else reads, and is quantised as it is."""
    arguments: Any = pair.args
    e, left, _, *folds = arguments
    known = all("val" in used.meta for used in pair.all_input_nodes)
    if left or None in folds or not known or not runs_kernels(e.meta["val"].device):
        return False
    while _is_view(e) and len(e.users) == 1:
        e = e.args[0]
    return _is_elementwise(e) and len(e.users) == 1


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _belong_together(graph: fx.Graph, a: fx.Node, b: fx.Node) -> bool:
    """Whether the quantisations a and, later in the graph, b can be one."""
    sources = [_sources(node.args[0]) for node in (a, b)]
    if not sources[0] & sources[1] or len(sources[0] | sources[1]) > PRODUCER_INPUTS:
        return False
    one, other = (node.args[0].meta["val"] for node in (a, b))  # type: ignore[union-attr]
    # Without a guard: of symbols, and of sizes that depend on data.
    alike = one.dtype == other.dtype and statically_known_true(sym_eq(one.shape, other.shape))
    if a.args[2] != b.args[2] or not alike:
        return False
    later = _after(graph, [a])
    return not any(used in later for used in b.all_input_nodes)


def _sources(e: Any) -> set[fx.Node]:
    """What e is made of by elementwise operations."""
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
    e_a, _, format, *folds_a = a.args
    e_b, _, _, *folds_b = b.args
    with b.graph.inserting_before(b):
        both = b.graph.call_function(_PAIRS, (e_a, e_b, format, *folds_a, *folds_b))
    inputs = tuple(x.meta["val"] if isinstance(x, fx.Node) else x for x in both.args)  # whose strides Inductor keeps
    both.meta = b.meta | {"val": (*a.meta["val"], *b.meta["val"]), "eager_input_vals": (inputs, {})}
    for pair, first in ((a, 0), (b, len(a.meta["val"]))):
        for made in list(pair.users):
            made.args = (both, first + made.args[1])  # type: ignore[operator]
        b.graph.erase_node(pair)


def _rewrite(graph: fx.Graph) -> None:
    """Run the passes, first on a copy: where they fail, ``graph`` is not left half rewritten."""
    stable_topological_sort(graph)  # passes before these put nodes where they can, and Inductor sorts after them
    trial = fx.Graph(graph.owning_module)
    trial.output(trial.graph_copy(graph, {}))
    for each in (trial, graph):
        if REPEAT_FOR_BACKWARD:
            quantize_again_in_backward(each)
        if QUANTIZE_TWO_AT_ONCE:
            quantize_two_gradients_at_once(each)


class _Pass(CustomGraphPass):
    """And before it the passes that were there: not every version of Inductor takes a list."""

    def __init__(self, others: Sequence):
        self.others = others

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.others:
            other(graph)
        if any(node.target in (_QUANTIZE, _PAIR) for node in graph.nodes):
            JOINT_GRAPH.attempt(_rewrite, graph)

    def uuid(self) -> tuple | None:
        """None, and then graphs are not cached, if one of the others has none."""
        others = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        state = fingerprint(), *disabled(), REPEAT_FOR_BACKWARD, QUANTIZE_TWO_AT_ONCE
        return ("halo_tensor", *state, *others) if all(others) else None


def install() -> None:
    """Last of Inductor's joint passes: earlier ones find attention in products, and put a kernel in its place. To be called in
    the thread that compiles, for every graph: torch's configuration is each thread's own, and may have been set anew. Models
    compiled later in this thread, converted or not, have it in their keys, and are otherwise left alone."""
    current = config.joint_custom_post_pass
    others = () if current is None else current if isinstance(current, list | tuple) else (current,)
    if not any(isinstance(other, _Pass) for other in others):
        config.joint_custom_post_pass = _Pass(others)
