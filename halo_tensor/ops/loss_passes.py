"""The passes of ``linear_cross_entropy`` over a vocabulary. Logits exist for one part of it at a time.

Tokens are taken in chunks, and the vocabulary in parts. For each chunk a first pass over the parts computes logits and gathers
what the losses need; a second one has the logits of each part again, makes E of them, and multiplies it. So the gradient of a
part of the weight is one product over all tokens of the chunk. As many parts as there is room for keep their logits from the
first pass; those of the others are multiplied again, and on SM 9.0 the first pass does not even write them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halo_tensor.fences.fast_paths import GLUON
from halo_tensor.kernels.device import runs_kernels
from halo_tensor.ops.loss_parts import GROUP, Plan, plan_for
from halo_tensor.ops.quantizers import empty_codes, rotate_quantize
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference import loss as reference
from halo_tensor.reference import ops as reference_ops
from halo_tensor.reference.loss import Objective


class Head(NamedTuple):
    """A head and what its products read.

    Attributes:
        weight: [V, D].
        codes, scales, undo_gain: int8 codes of the rotated weight, their scales [V] and what multiplies the columns of hidden
            states before they are rotated; each may be None.
        bias: [V], or None.
        forward: "int8" or "bf16", which is the dtype of the tensors.
        backward: "fp8", or "bf16" likewise.
        rotation: of in_features, in the forward product.
        dtype: of products that are not quantised.
        objective: what is computed of the logits.
    """

    weight: Tensor
    codes: Tensor | None
    scales: Tensor | None
    undo_gain: Tensor | None
    bias: Tensor | None
    forward: str
    backward: str
    rotation: Rotation | None
    dtype: torch.dtype
    objective: Objective

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]


class Gradients(NamedTuple):
    """What backward returns of a head: the gradients of hidden states, of the weight and of the bias; None if not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Chunk:
    """Some tokens: their losses, and what they add to the gradients."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, plan: Plan, keeps: bool):
        self.head, self.hidden, self.targets, self.plan = head, hidden, targets, plan
        self.x: Any = None
        if head.forward == "int8":
            self.x = rotate_quantize(hidden, None, head.rotation, INT8, "row", gain=head.undo_gain)
        self.parts = plan.parts(head.vocabulary)
        self.keep = {part.start for part in self.parts[-plan.kept :]} if keeps and plan.kept else set()
        self.kept: dict[int, Tensor] = {}
        self.statistics = reference.fresh_statistics(hidden.shape[0], hidden.device)

    def losses(self) -> Tensor:
        """Return the loss of each token, after the first pass over the parts."""
        done = self._reduce_products()
        for part in self.parts[done:]:
            logits = self._logits(part)
            _update_statistics_(self.statistics, logits, self.targets, part.start, self.head.objective)
            if part.start in self.keep:
                self.kept[part.start] = logits
            del logits  # its memory serves the next part
        return reference.losses(self.statistics, self.targets, self.head.vocabulary, self.head.objective)

    def _reduce_products(self) -> int:
        """Gather statistics without writing logits, of the parts that keep none; return of how many, which may be 0."""
        count, head = len(self.parts) - len(self.keep), self.head
        if head.forward != "int8" or not count or not runs_kernels(self.hidden.device):
            return 0
        kernels = GLUON.load("halo_tensor.kernels.loss_sm90")
        columns = self.parts[count - 1].stop
        if kernels is None or kernels.why_not(self.hidden.device, len(self.hidden), columns, head.objective) is not None:
            return 0
        codes, _, scales = self.x
        for start in range(0, columns, GROUP):
            span = slice(start, min(start + GROUP, columns))
            bias = None if head.bias is None else head.bias[span]
            w = self._weight(span)
            kernels.update_statistics_(self.statistics, codes, w[0], scales, w[1], bias, self.targets, start, head.objective)
        return count

    def add_gradients(self, weights: Tensor, gradients: Gradients, is_first: bool) -> None:
        """Add to the gradients, in the second pass. The first chunk overwrites those of the weight and the bias. The gradient
        of the hidden states is that of this chunk.

        Args:
            weights: float32 [tokens], the factor of each token's loss in the sum of all.
        """
        head = self.head
        factors = reference.gradient_factors(self.statistics, self.targets, weights, head.vocabulary, head.objective)
        kind = _QuantizedBackward if head.backward == "fp8" else _DenseBackward
        backward = kind(head, self.hidden, self.targets, self.plan, factors, gradients, is_first)
        for part in reversed(self.parts):  # the last ones are kept
            backward.add(partial(self._take, part), part)
        backward.finish()

    def _take(self, part: slice) -> Tensor:
        """Return the logits of one part, which are no longer kept."""
        logits = self.kept.pop(part.start, None)
        return self._logits(part) if logits is None else logits

    def _logits(self, part: slice) -> Tensor:
        """Return the logits of one part, in float16 if they are products of codes: that is 8 times as fine as bfloat16."""
        head = self.head
        bias = None if head.bias is None else head.bias[part]
        if head.forward != "int8":
            hidden, weight = self.hidden.to(head.dtype), head.weight[part].to(head.dtype)
            return torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(head.dtype))
        codes, _, scales = self.x
        w_codes, w_scales = self._weight(part)
        out = self.hidden.new_empty((codes.shape[0], w_codes.shape[0]), dtype=torch.float16)
        return multiply_into(out, codes, w_codes, scales, w_scales, bias)

    def _weight(self, columns: slice) -> tuple[Any, Tensor]:
        """Return the int8 codes and scales of some rows of the weight."""
        head = self.head
        if head.codes is not None and head.scales is not None:
            return head.codes[columns], head.scales[columns]
        codes, _, scales = rotate_quantize(head.weight[columns], None, head.rotation, INT8, "row")
        return codes, scales


class _Backward:
    """The second pass over the parts of a vocabulary, from the last one to the first.

    Args:
        factors: of :func:`halo_tensor.reference.loss.gradient_factors`, with the scales of tokens.
        is_first: whether the gradients of the weight and the bias are overwritten.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        targets: Tensor,
        plan: Plan,
        factors: tuple[Tensor, Tensor],
        gradients: Gradients,
        is_first: bool,
    ):
        self.head, self.hidden, self.targets, self.plan = head, hidden, targets, plan
        self.factors, self.row_scales = factors
        self.gradients, self.is_first = gradients, is_first
        #: The gradient of the hidden states so far, in float32.
        self.total: Tensor | None = None

    def add_to_hidden(self, product: Tensor) -> None:
        """Add to the gradient of the hidden states."""
        if self.total is None:
            self.total = product.to(torch.float32)
        else:
            self.total.add_(product)

    def add_to_bias(self, part: slice, sums: Tensor) -> None:
        """Add to the gradient of the bias."""
        bias = self.gradients.bias
        assert bias is not None
        bias[part].copy_(sums) if self.is_first else bias[part].add_(sums)

    def finish(self) -> None:
        """Write the gradient of the hidden states."""
        if self.gradients.hidden is not None:
            assert self.total is not None
            self.gradients.hidden.copy_(self.total)


class _QuantizedBackward(_Backward):
    """With E in fp8."""

    codes: Any = None  #: of the group, by tokens
    x: Any = None  #: codes and scales of the hidden states, by columns

    def add(self, logits: Callable[[], Tensor], part: slice) -> None:
        """Multiply with E of one part. ``logits`` returns those of the part, so that they are freed when E is made."""
        head, gradients = self.head, self.gradients
        group = self.plan.group_of(part, head.vocabulary)
        if self.codes is None:
            self.codes = empty_codes(self.hidden, self.hidden.shape[0], group.stop - group.start, FP8_E4M3)
        codes = self.codes[:, part.start - group.start : part.stop - group.start]
        has_bias = gradients.bias is not None
        codes_t, scales, sums = _quantize_gradient(
            logits(), self.targets, self.factors, part.start, head.objective, codes, has_bias
        )
        if has_bias:
            self.add_to_bias(part, sums)
        if gradients.weight is not None:
            self.x = self.x or _by_columns(self.hidden)
            out = gradients.weight[part] if self.is_first else torch.empty_like(gradients.weight[part])
            multiply_into(out, codes_t, self.x[0], scales, self.x[1], None)
            if not self.is_first:
                gradients.weight[part].add_(out)
        del codes, codes_t
        if part.start == group.start:
            if gradients.hidden is not None:
                w_codes, w_scales = _by_columns(head.weight[group])
                out = self.hidden.new_empty(self.hidden.shape)
                self.add_to_hidden(multiply_into(out, self.codes, w_codes, self.row_scales, w_scales, None))
            self.codes = None


class _DenseBackward(_Backward):
    """With E in the dtype of the tensors."""

    def add(self, logits: Callable[[], Tensor], part: slice) -> None:
        """Multiply with E of one part, whose logits ``logits`` returns."""
        dtype, gradients = self.head.dtype, self.gradients
        e = self._gradient(logits(), part)
        if gradients.hidden is not None:
            self.add_to_hidden(e @ self.head.weight[part].to(dtype))
        if gradients.weight is not None:
            product = e.t() @ self.hidden.to(dtype)
            gradients.weight[part].copy_(product) if self.is_first else gradients.weight[part].add_(product)
        if gradients.bias is not None:
            self.add_to_bias(part, e.sum(0, dtype=torch.float32))

    def _gradient(self, logits: Tensor, part: slice) -> Tensor:
        """Return E of one part, in the memory of the logits if that has room."""
        dtype, objective = self.head.dtype, self.head.objective
        if not runs_kernels(logits.device):
            return reference.gradient(logits, self.targets, self.factors, part.start, objective).to(dtype)
        from halo_tensor.kernels import loss as kernels

        e = logits.view(dtype) if dtype.itemsize == logits.dtype.itemsize else torch.empty_like(logits, dtype=dtype)
        kernels.dense_gradient(logits, self.targets, self.factors, part.start, objective, e)
        return e


def _by_columns(matrix: Tensor) -> tuple[Any, Tensor]:
    """Return the transposed fp8 codes of a matrix, and a scale for each of its columns."""
    _, codes, scales = rotate_quantize(matrix, None, None, FP8_E4M3, "column", rows=False, columns=True)
    return codes, scales


def _update_statistics_(statistics: Tensor, logits: Tensor, targets: Tensor, first: int, objective: Objective) -> None:
    if runs_kernels(logits.device):
        from halo_tensor.kernels import loss as kernels

        kernels.update_statistics_(statistics, logits, targets, first, objective)
    else:
        reference.update_statistics_(statistics, logits, targets, first, objective)


def _quantize_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, first: int, objective: Objective, codes: Tensor, summed: bool
) -> tuple[Any, Any, Any]:
    """Do :func:`halo_tensor.reference.loss.quantize_gradient`; the first result is written to ``codes``."""
    if runs_kernels(logits.device):
        from halo_tensor.kernels import loss as kernels

        return kernels.quantize_gradient(logits, targets, factors, first, objective, codes, summed)
    made, *others = reference.quantize_gradient(logits, targets, factors, first, objective)
    codes.copy_(made)
    return others[0], others[1], others[2]


def multiply_into(out: Tensor, a: Tensor, b_t: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Store diag(a_scale) a b_tᵀ diag(b_scale) + bias, of codes [m, k] and [n, k], to a contiguous ``out`` [m, n]."""
    if out.numel() == 0:
        return out
    if not runs_kernels(a.device):
        return out.copy_(reference_ops.scaled_mm(a, b_t, a_scale, b_scale, bias, None, None, (*out.shape,), out.dtype))  # type: ignore[arg-type]
    from halo_tensor.kernels.matmul import plan

    kinds = 2, 2, False, None if bias is None else bias.dtype
    planned = plan.plan(a.device, a.dtype, b_t.dtype, b_t.shape[0], *kinds, None, None, out.dtype)
    planned((*a.shape, a.shape[0], a.stride(0), b_t.stride(0)), a, b_t, out, a_scale, b_scale, None, bias)
    return out


def run(
    head: Head, hidden: Tensor, targets: Tensor, weights: Tensor, chunk: int, scratch: int, gradients: Gradients
) -> Tensor:
    """Return the loss of each token, float32 [tokens], and overwrite the gradients that are wanted."""
    wanted = any(gradient is not None for gradient in gradients)
    losses = weights.new_empty(hidden.shape[0])
    if hidden.shape[0] == 0:
        for gradient in gradients[1:]:
            None if gradient is None else gradient.zero_()
    # Equal chunks, of multiples of 16: products of other numbers of tokens are slower.
    tokens_each = -(-hidden.shape[0] // max(-(-hidden.shape[0] // chunk), 1) // 16) * 16
    for start in range(0, hidden.shape[0], max(tokens_each, 1)):
        tokens = slice(start, start + tokens_each)
        plan = plan_for(min(tokens_each, hidden.shape[0] - start), head.vocabulary, scratch)
        of_chunk = _Chunk(head, hidden[tokens], targets[tokens], plan, wanted)
        losses[tokens] = of_chunk.losses()
        if wanted:
            rows = None if gradients.hidden is None else gradients.hidden[tokens]
            of_chunk.add_gradients(weights[tokens], gradients._replace(hidden=rows), start == 0)
    return losses
