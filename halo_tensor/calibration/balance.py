"""``balance_``: share out between X and W what either would lose to rounding.

X Wᵀ = (X / s)(W s)ᵀ for every s [in_features]. With x² and w² the mean squares of X's and W's columns, codes of X / s err by
as much as Σ x²/s² says, in all columns alike, and codes of W s by Σ w² s². So of the squared relative errors that ``output``,
``grad_input`` and ``grad_weight`` have by them, the sum is

    F (Σ x²/s²)(Σ w² s²) / Σ x² w²  +  (Σ 1/s²)(Σ w² s²) / Σ w²  +  (Σ x²/s²)(Σ s²) / Σ x²

where F says how much more forward's counts. With a fourth term, (Σ 1/s²)(Σ s²)·Σ x² w² / (F Σ x² Σ w²), which is least without
a balance, it is a product of two sums, and by Cauchy and Schwarz least at

    s⁴ = (x² + ⟨x² w²⟩ / (F ⟨w²⟩)) / (w² + ⟨x² w²⟩ / (F ⟨x²⟩))

with ⟨⟩ the mean over columns. Of powers of two, to which s is rounded, products are exact.

The layer divides and multiplies on its way to codes (:mod:`halo_tensor.operand.gains`). Weights, gradients, optimisers and
state dicts never see s: what is trained stays the same model, where Adam would move SmoothQuant's rescaled weights otherwise.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.analysis.measure import untouched
from halo_tensor.layers import kinds as layers
from halo_tensor.operand import gains
from halo_tensor.weight.fsdp import is_sharded
from halo_tensor.weight.tensor import dense_value

#: How much more an error of forward's product counts than one of backward's: all that follows is off by it. From 2 to 128
#: gradients are as good within what draws of signs differ by (docs/notes/accuracy.md).
FORWARD = 8
#: s is a power of two with an exponent of at most this size.
LARGEST_EXPONENT = 8


@torch.inference_mode(False)  # or the model could not be trained outside of it
def balance_(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Run ``model(*args, **kwargs)`` once, without gradients and in evaluation mode, and balance every converted ``nn.Linear``
    that it reaches and whose recipe quantises ``output``: in place, replacing an earlier balance.

    Layers that read the very same tensor (q, k and v; gate and up) get one s, so that X is still quantised once. Call it after
    ``quantize_`` and before FSDP; before or after making the optimiser and ``torch.compile`` makes no difference. A weight
    held as codes only is rounded a second time; to round it once, convert with ``frozen=False``, balance, and convert again
    with ``frozen=True``: ``quantize_`` keeps a balance, and ``dequantize_`` removes it. State dicts of trained weights do not
    hold it; copies and pickles of the model do. CUDA graphs are to be captured after it.

    It is meant for int8: floating numbers keep small values beside large ones without it.

    Args:
        model: converted. args, kwargs: what to run it on, some thousand tokens of training data.

    Returns:
        the number of layers that were balanced.

    Raises:
        ValueError: FSDP has sharded the model, it is on the meta device, or holds no codes (``keep_codes=False``); no layer
            was reached that can be balanced; or an input or a weight of one has a NaN or Inf. No layer has been changed then.
    """
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and _is_eligible(name, m)}
    with observed(chosen) as statistics, untouched(model), torch.no_grad():
        model(*args, **kwargs)
    if not statistics.squares:
        raise ValueError(
            f"no layer of this {type(model).__name__} was balanced: of {len(chosen)} converted nn.Linear layers whose recipe "
            "quantises output, none was called with any tokens. Convert it with quantize_, and pass what its forward takes"
        )
    weights: dict[str, Any] = {name: chosen[name].weight for name in statistics.squares}
    pairs = gains_of(weights, statistics)
    for weight, pair in {id(weight): (weight, pairs[name]) for name, weight in weights.items()}.values():
        give(weight, pair)
    return len(weights)


@torch.no_grad()
def give(weight: Any, pair: gains.Gains) -> None:
    """Let the layer of a converted ``weight`` [out, in] use ``pair`` = (s, 1 / s), each [in], from now on."""
    dense = weight.dequantize()
    weight.operand.gains = gains.moved(pair, weight.device)  # of the object, which the weight's aliases hold too
    weight.requantize(dense)


def _is_eligible(name: str, module: nn.Linear) -> bool:
    weight: Any = module.weight
    if is_sharded(weight):
        raise ValueError(f"{name} is sharded by FSDP; call balance_ before fully_shard, with the same batch on every rank")
    recipe = layers.recipe_of(module)
    if recipe is not None and weight.is_meta:
        raise ValueError(f"{name} is on the meta device; load the model's weights before balance_")
    eligible = recipe is not None and recipe.output.left.format is not None
    if eligible and weight.operand is None:
        raise ValueError(f"{name} holds no codes, whose s a balance is; convert it with keep_codes=True before balance_")
    return eligible


class Statistics:
    """What reaches layers: sums of squares and counts of rows of X, and which layers read the same X."""

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}  # name -> float32 [in]
        self.rows: dict[str, int] = {}
        self.same: list[tuple[str, str]] = []
        # X -> its version, the first layer that read it, and its squares. An entry dies with its X.
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def hook(self, name: str):
        def observe(module, args, kwargs):
            x = layers.input_of(args, kwargs)
            if x.numel() == 0:
                return
            now = 0 if x.is_inference() else x._version
            version, first, squares = self._seen.get(x, (None, name, None))
            if version != now:
                with torch.autocast(x.device.type, enabled=False):
                    first, squares = name, x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
                self._seen[x] = now, first, squares
            self.same.append((first, name))
            self.squares[name] = squares + self.squares.get(name, 0)
            self.rows[name] = self.rows.get(name, 0) + x.numel() // x.shape[-1]

        return observe


@contextmanager
def observed(modules: Mapping[str, nn.Linear]) -> Iterator[Statistics]:
    """Yields what reaches ``modules`` in the forwards inside the block."""
    statistics = Statistics()
    hooks = [m.register_forward_pre_hook(statistics.hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


def gains_of(weights: Mapping[str, torch.Tensor], statistics: Statistics) -> dict[str, gains.Gains]:
    """The pairs (s, 1 / s) of layers, by name: the same for those that read one X or hold one weight.

    Args:
        weights: name -> [out, in], dense or converted, of layers that are all in ``statistics``.

    Raises:
        ValueError: an input or a weight has a NaN or Inf.
    """
    device = next(iter(weights.values())).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        groups = [
            (names, gains.of_exponents(_exponents(names, weights, statistics))) for names in _groups(weights, statistics)
        ]
    return {name: pair for names, pair in groups for name in names}


def _groups(weights: Mapping[str, torch.Tensor], statistics: Statistics) -> list[list[str]]:
    """Names of layers, together where they read one X or hold one weight."""
    group = {name: [name] for name in statistics.squares}
    holder: dict[int, str] = {}
    tied = [(holder.setdefault(id(weight), name), name) for name, weight in weights.items()]
    for a, b in [*statistics.same, *tied]:
        if group[a] is not group[b]:
            group[a] += group[b]
            for name in group[b][:]:
                group[name] = group[a]
    distinct = {id(names): names for names in group.values()}.values()
    return [own for names in distinct if (own := [name for name in names if name in weights])]


def _exponents(group: list[str], weights: Mapping[str, torch.Tensor], statistics: Statistics) -> torch.Tensor:
    """log₂ s, whole numbers, float32 [in], of layers that have one s."""
    device = weights[group[0]].device
    x = torch.stack([statistics.squares[name].to(device) for name in group]).sum(0)
    x = x / sum(statistics.rows[name] for name in group)
    own = {id(weights[name]): weights[name] for name in group}.values()
    w = torch.stack([dense_value(weight).float().square().sum(0).to(device) for weight in own]).sum(0)
    w = w / sum(weight.shape[0] for weight in own)
    for what, squares in (("input", x), ("weight", w)):
        if not squares.isfinite().all():
            raise ValueError(f"the {what} of {group[0]} has a NaN or Inf, so it cannot be balanced")
    used = (x > 0) & (w > 0)
    if not used.any():
        return torch.zeros_like(x)
    exponents = fourth_power(x.double(), w.double()).log2() / 4
    # A common factor cancels; without one, scales of codes and gains stay near where they were.
    exponents = (exponents - exponents[used].mean()).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return exponents.where(used, 0.0).float()


def fourth_power(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """s⁴ [in], up to a factor, from mean squares of X's columns and of W's, float [in]; some column has to be in both."""
    xw, x_mean, w_mean = (x * w).mean(), x.mean(), w.mean()
    return (x + xw / (FORWARD * w_mean)) / (w + xw / (FORWARD * x_mean))
