"""The cross-entropy of a language model's head, part by part of the vocabulary: the definition that kernels are tested on.

A part is some columns of the logits of all tokens, from column ``first`` on. The first pass over the parts gathers what the
loss of each token needs (:func:`update_statistics_`, then :func:`losses`). The second computes the gradient E of each part
(:func:`gradient`), and its codes for both products of backward (:func:`quantize_gradient`).

For a token with logits l, target y and weight g in the sum of all losses:

    z    = softcap · tanh(scale · l / softcap)                                  or scale · l without a softcap
    lse  = log Σ exp(z_v)
    loss = lse − (1 − ε) z_y − ε mean(z) + z_loss · lse²                        ε is the label smoothing
    E_v  = g (p_v (1 + 2 z_loss · lse) − ε / V − (1 − ε) [v = y]) dz/dl         p = exp(z − lse)
"""

from typing import NamedTuple

import torch

from halo_tensor.recipe import FP8_E4M3
from halo_tensor.reference.codes import round_to
from halo_tensor.reference.ops import SMALLEST_SCALE

#: Rows of the statistics: the largest logit, the sum of exp(z − largest), the largest logit but the target's, the target's,
#: and the sum of all.
MOST, TOTAL, OTHER, CHOSEN, SUM = range(5)
#: Rows of the factors of a gradient: lse / log 2, what multiplies p, what is subtracted from every column, what is subtracted
#: from the target's, and the inverse of the scale of the token's codes.
LSE, SLOPE, UNIFORM, ONE_HOT, INVERSE = range(5)
LOG2_E = 1.4426950408889634


class Objective(NamedTuple):
    """What is computed of the logits.

    Attributes:
        scale: multiplies the logits.
        softcap: bounds the scaled logits by a tanh; 0 for none.
        smoothing: of the labels, from 0 to below 1.
        z_loss: the factor of lse².
        ignore_index: the target of tokens without a loss.
    """

    scale: float = 1.0
    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100


def fresh_statistics(tokens: int, device: torch.device) -> torch.Tensor:
    """Return the statistics [5, tokens] of no logits. A target that is in no part leaves its logit NaN, and so its loss."""
    statistics = torch.zeros(5, tokens, device=device)
    for row, value in ((MOST, -torch.inf), (OTHER, -torch.inf), (CHOSEN, torch.nan)):
        statistics[row].fill_(value)  # a copy of numbers from the CPU would wait for the GPU
    return statistics


def scores(logits: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Return z of logits, in float32."""
    z = logits.to(torch.float32)
    z = z if objective.scale == 1 else z * objective.scale
    return z if objective.softcap == 0 else objective.softcap * torch.tanh(z * (1 / objective.softcap))


def update_statistics_(
    statistics: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, first: int, objective: Objective
) -> None:
    """Add one part of the logits to the statistics.

    Args:
        statistics: float32 [5, tokens]. The sum of all logits is gathered only with label smoothing.
        logits: [tokens, columns] of any floating dtype.
        targets: int64 [tokens].
        first: the part's first column.
        objective: what is computed of the logits.
    """
    z = scores(logits, objective)
    columns = torch.arange(first, first + z.shape[1], device=z.device)
    mine = columns == targets.unsqueeze(1)
    most, total, other, chosen, summed = statistics.unbind()
    top = torch.maximum(most, z.amax(1))
    safe = torch.where(top == -torch.inf, 0, top)
    total.copy_(total * torch.exp(most - safe) + torch.exp(z - safe.unsqueeze(1)).sum(1))
    most.copy_(top)
    other.copy_(torch.maximum(other, z.masked_fill(mine, -torch.inf).amax(1)))
    chosen.copy_(torch.where(mine.any(1), z.masked_fill(~mine, 0).sum(1), chosen))
    if objective.smoothing:
        summed.add_(z.sum(1))


def losses(statistics: torch.Tensor, targets: torch.Tensor, vocabulary: int, objective: Objective) -> torch.Tensor:
    """Return the loss of each token, float32 [tokens], from the statistics of all parts; 0 where the target is ignored."""
    lse = statistics[MOST] + statistics[TOTAL].log()
    loss = lse - statistics[CHOSEN]
    if objective.smoothing:
        loss = lse - (1 - objective.smoothing) * statistics[CHOSEN] - objective.smoothing / vocabulary * statistics[SUM]
    if objective.z_loss:
        loss = loss + objective.z_loss * lse * lse
    return torch.where(targets == objective.ignore_index, 0.0, loss)


def gradient_factors(
    statistics: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, vocabulary: int, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the gradient of each token's logits depends on.

    Args:
        statistics: float32 [5, tokens] of all parts.
        targets: int64 [tokens].
        weights: float32 [tokens], the factor of each token's loss in the sum of all.
        vocabulary: V.
        objective: what is computed of the logits.

    Returns:
        The factors, float32 [5, tokens], and the scale of each token's codes, [tokens]: a bound of the magnitudes of E_v,
        divided by 448. Without softcap and smoothing it is the largest of them.
    """
    weights = torch.where(targets == objective.ignore_index, 0.0, weights)
    lse = statistics[MOST] + statistics[TOTAL].log()
    slope = weights if objective.z_loss == 0 else weights * (1 + 2 * objective.z_loss * lse)
    uniform, one_hot = weights * (objective.smoothing / vocabulary), weights * (1 - objective.smoothing)
    at_target = slope * torch.exp(statistics[CHOSEN] - lse) - uniform - one_hot
    bound = torch.maximum((slope * torch.exp(statistics[OTHER] - lse)).abs(), at_target.abs())
    bound = torch.maximum(bound, uniform.abs()) * abs(objective.scale)
    bound = torch.where(weights == 0, 0.0, bound)
    scale = (bound * (1 / FP8_E4M3.max)).clamp_min(SMALLEST_SCALE)
    lse = torch.where(weights == 0, torch.inf, lse)  # so that p is 0
    slope = torch.where(weights == 0, 0.0, slope)
    return torch.stack([lse * LOG2_E, slope, uniform, one_hot, 1 / scale]), scale


def gradient(
    logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor, first: int, objective: Objective
) -> torch.Tensor:
    """Return E of one part, float32 [tokens, columns]."""
    z = scores(logits, objective)
    lse, slope, uniform, one_hot, _ = factors.unsqueeze(2)
    e = slope * torch.exp2(z * LOG2_E - lse)
    if objective.smoothing:
        e = e - uniform
    columns = torch.arange(first, first + z.shape[1], device=z.device)
    e = torch.where(columns == targets.unsqueeze(1), e - one_hot, e)
    if objective.softcap:
        e = e * (1 - (z * (1 / objective.softcap)).square())
    return e if objective.scale == 1 else e * objective.scale


def quantize_gradient(
    logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor, first: int, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return E of one part in fp8 e4m3, for both products of backward.

    Returns:
        Codes [tokens, columns] with the scales of tokens that ``factors`` has the inverse of, transposed codes
        [columns, tokens], their float32 scales [columns], the largest magnitude of a column divided by 448, and the sums of
        columns, float32 [columns], of which a bias gets its gradient.
    """
    e = gradient(logits, targets, factors, first, objective)
    codes = round_to(e * factors[INVERSE].unsqueeze(1), FP8_E4M3)
    scales = (e.abs().amax(0) * (1 / FP8_E4M3.max)).clamp_min(SMALLEST_SCALE)
    return codes, round_to(e * (1 / scales), FP8_E4M3).t().contiguous(), scales, e.sum(0)
