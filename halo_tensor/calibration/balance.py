"""``balance_``: scale columns of X and W against each other, so that neither loses much to rounding.

X Wᵀ = (X / s)(W s)ᵀ for every s [in_features]. Let x² and w² be the mean squares of the columns of X and W. All columns of
X / s are rounded with errors of one size, which grows with Σ x²/s²; the errors of W s grow with Σ w² s². The squared relative
errors that these cause in ``output``, ``grad_input`` and ``grad_weight`` add up to

    F (Σ x²/s²)(Σ w² s²) / Σ x² w²  +  (Σ 1/s²)(Σ w² s²) / Σ w²  +  (Σ x²/s²)(Σ s²) / Σ x²

where F weights the error of the forward product. Add a fourth term, (Σ 1/s²)(Σ s²)·Σ x² w² / (F Σ x² Σ w²), which is smallest
without a balance. The sum is then a product of two sums, and by the Cauchy-Schwarz inequality it is smallest at

    s⁴ = (x² + ⟨x² w²⟩ / (F ⟨w²⟩)) / (w² + ⟨x² w²⟩ / (F ⟨x²⟩))

where ⟨⟩ is the mean over columns. s is rounded to powers of two, so that multiplying by it is exact.

The layer divides and multiplies when it quantises (:mod:`halo_tensor.operand.gains`). Weights, gradients, optimisers and
state dicts do not see s, so the model that is trained stays the same. SmoothQuant rescales the weights themselves, which
changes what Adam does to them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from halo_tensor.analysis.capture import hooked
from halo_tensor.analysis.trial_run import untouched
from halo_tensor.layers import kinds as layers
from halo_tensor.operand import gains
from halo_tensor.weight.sharded_parameters import is_sharded
from halo_tensor.weight.tensor import dense_value

#: The weight F of forward's error, which reaches all later layers. With values from 2 to 128 gradients differ no more than
#: they differ between seeds of the rotation (docs/notes/accuracy.md).
FORWARD = 8
#: The exponents of s are clamped to ± this value.
LARGEST_EXPONENT = 8


def balance_(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Balance every converted ``nn.Linear`` whose recipe quantises ``output``, in place. An earlier balance is replaced.

    ``model(*args, **kwargs)`` runs once, without gradients and in evaluation mode; layers that it does not reach are left as
    they are. Layers that read the same tensor (q, k and v; gate and up) get one s, so that X is still quantised once.

    Call it after ``quantize_`` and before FSDP and before CUDA graphs are captured. It may come before or after the optimiser
    is made and ``torch.compile`` is called. A weight that is held as codes only is rounded a second time. To round it once,
    convert with ``frozen=False``, balance, and convert again with ``frozen=True``: ``quantize_`` keeps a balance, and
    ``dequantize_`` removes it. State dicts of trained weights do not contain the balance; copies and pickles of the model do.

    A balance helps int8. Floating-point formats keep small values beside large ones without it.

    Args:
        model: a converted model.
        *args: positional arguments for the model: some thousand tokens of training data.
        **kwargs: keyword arguments for the model.

    Returns:
        the number of layers that were balanced.

    Raises:
        ValueError: FSDP has sharded the model; it is on the meta device; it holds no codes (``keep_codes=False``); no layer
            that can be balanced was reached; or an input or a weight of such a layer has a NaN or Inf. No layer is changed.

    Example:
        >>> import torch
        >>> from halo_tensor import balance_, halo_config, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
        >>> conversion = quantize_(model, halo_config(level=1, dtype="int8"))
        >>> balance_(model, torch.randn(64, 128))
        2
    """
    return balance_over(model, [(args, kwargs)])


@torch.inference_mode(False)  # tensors made in inference mode could not be trained
def balance_over(model: nn.Module, calls: Iterable[tuple[tuple, Mapping[str, Any]]]) -> int:
    """Balance as :func:`balance_` does, on several batches: the positional and keyword arguments of each call of the model."""
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and _is_eligible(name, m)}
    with observed(chosen) as statistics, untouched(model), torch.no_grad():
        for args, kwargs in calls:
            model(*args, **kwargs)
    if not statistics.squares:
        raise ValueError(
            f"no layer of this {type(model).__name__} was balanced: of {len(chosen)} converted nn.Linear layers whose recipe "
            "quantises output, none was called with any tokens. Convert it with quantize_, and pass what its forward takes"
        )
    weights: dict[str, Any] = {name: chosen[name].weight for name in statistics.squares}
    pairs = gains_of(weights, statistics)
    for weight, pair in {id(weight): (weight, pairs[name]) for name, weight in weights.items()}.values():
        set_gains(weight, pair)
    return len(weights)


@torch.no_grad()
def set_gains(weight: Any, pair: gains.Gains) -> None:
    """Set the gains ``pair`` = (s, 1 / s), each [in], of a converted ``weight`` [out, in] and quantise it again."""
    dense = weight.dequantize()
    weight.operand.gains = gains.moved(pair, weight.device)  # set on the object that aliases of the weight share
    weight.requantize(dense)


def _is_eligible(name: str, module: nn.Linear) -> bool:
    """Whether a layer can be balanced. Raises ValueError if it is converted, but in a state that prevents it."""
    weight: Any = module.weight
    if is_sharded(weight):
        raise ValueError(
            f"{name} is sharded by FSDP; call balance_ before fully_shard or parallelize_module, with the same batch on every "
            "rank"
        )
    recipe = layers.recipe_of(module)
    if recipe is not None and weight.is_meta:
        raise ValueError(f"{name} is on the meta device; load the model's weights before balance_")
    eligible = recipe is not None and recipe.output.left.format is not None
    if eligible and weight.operand is None:
        raise ValueError(f"{name} holds no codes, which a balance needs; convert it with keep_codes=True and memory='speed'")
    return eligible


class Statistics:
    """Statistics of the inputs of layers.

    Attributes:
        squares: name -> Σ x² over all rows, float32 [in].
        rows: name -> number of rows.
        same: pairs of names of layers that read the same X.
    """

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self.same: list[tuple[str, str]] = []
        # X -> its version, the first layer that read it, and its sums of squares. An entry dies with its X.
        self._seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def hook(self, name: str) -> Callable:
        """Return a forward pre-hook that records the inputs of the layer ``name``."""

        def observe(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
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
    """Yield statistics of the inputs that reach ``modules`` in the forwards inside the block."""
    statistics = Statistics()
    with hooked(modules, statistics.hook, before=True):
        yield statistics


def gains_of(weights: Mapping[str, torch.Tensor], statistics: Statistics) -> dict[str, gains.Gains]:
    """Return the pair (s, 1 / s) of each layer, by name. Layers that read one X or hold one weight get the same pair.

    Args:
        weights: name -> weight [out, in], dense or converted.
        statistics: contains all of these layers.

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
    """Group the names of layers that read one X or hold one weight."""
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
    """Return log₂ s of a group of layers, whole numbers in float32 [in]."""
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
    # A common factor of s cancels. Dividing by it keeps scales and gains near their old size.
    exponents = (exponents - exponents[used].mean()).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return exponents.where(used, 0.0).float()


def fourth_power(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return s⁴ [in], up to a factor, for mean squares of the columns of X and W, float [in].

    Some column has to be nonzero in both.
    """
    xw, x_mean, w_mean = (x * w).mean(), x.mean(), w.mean()
    return (x + xw / (FORWARD * w_mean)) / (w + xw / (FORWARD * x_mean))
