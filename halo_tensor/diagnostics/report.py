"""``report``: which recipe a model can be trained with, by measuring every product of every layer, and the whole gradient."""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite, sqrt
from time import perf_counter
from typing import Any

import torch
from torch import nn

from halo_tensor.analysis import gpus, measure, roofline
from halo_tensor.analysis.measure import Fidelity, LossFn, Operands
from halo_tensor.analysis.roofline import Ceilings
from halo_tensor.calibration import balance
from halo_tensor.config import Balanced, LinearConfig, halo_config
from halo_tensor.convert import CHOICE, Conversion, layer_filter, survey, warn_of_share
from halo_tensor.diagnostics.result import HIGH_PRECISION, CandidateReport, LayerReport, Report
from halo_tensor.kernels.device import check_device, runs
from halo_tensor.layers.kinds import features
from halo_tensor.recipe import DIMENSIONS, PRODUCTS, Recipe, Rotation

#: Two modelled speeds that differ by less are equal: tests bound the model's own error by 8 %.
SPEED_MARGIN = 0.05
#: As are two cosines: another seed of a rotation changes them by a few 1e-4.
COSINE_MARGIN = 0.001
CANDIDATES: dict[str, LinearConfig] = {
    **{f"int8 HALO-{level}": halo_config(level, "int8") for level in (0, 1, 2)},
    **{f"fp8 HALO-{level}": halo_config(level, "fp8") for level in (0, 1)},
}
Candidate = LinearConfig | Balanced


def report(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    candidates: Mapping[str, Candidate] | Iterable[Candidate] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    min_cosine: float = 0.97,
    min_sqnr: float = 20.0,
    tokens: int = 128,
    step_tokens: int | None = None,
    gpu: str | None = None,
    ceilings: Ceilings | None = None,
) -> Report:
    """Measure what each candidate recipe does to a model's gradient, and recommend one.

    The model runs forward and backward once exactly, in its own dtype, and once under every candidate, converted as
    ``quantize_`` would. Besides, each layer's three products are computed from sampled rows of the exact X and E, by the
    very autograd function that training runs, and compared with float32's. The time on a GPU is modelled, not measured
    (``diagnostics/roofline.py``).

    The rule: a candidate is faithful if the cosine of the whole gradient with the exact one is at least ``min_cosine``. Of the
    faithful ones the fastest by the model is recommended, unless another, less than 5 % slower, has half its 1 − cosine or
    less, and a cosine higher by more than 0.001; and so on from that one. But a layer of which one product has an SQNR below
    ``min_sqnr`` under that recipe takes the fastest candidate that keeps all above, or high precision if none does. If no
    candidate is faithful, the one with the highest cosine is tried with such exceptions; if that is not faithful either, or
    leaves no layer, high precision is recommended. Of two candidates as fast, a balanced one comes second: it has to halve the
    error. If one is recommended, ``balance_`` will reach the exceptions too, so they are chosen among the balanced.

    Args:
        model: plain, or converted already (then its dense weights are measured, and not a balance it has). It is left as it
            was: parameters, gradients, modes, hooks and random state, also after an error. It runs in evaluation mode.
        batch: called as ``model(**batch)``, ``model(*batch)`` or ``model(batch)`` for a mapping, a tuple and anything else.
            The loss is the output's ``loss``, or the output itself. Time is that of 1 + candidates forwards and backwards.
        loss_fn: ``(model, batch) -> scalar``, for models that return no loss.
        candidates: configs, by name if it is a mapping; by default int8 HALO-0, 1, 2 and fp8 HALO-0, 1, those the device runs
            and the modelled GPU multiplies faster than bf16: fp8 alone on a B300, int8 alone on an A100.
            With ``halo_config(dtype="bf16")`` among them, high precision competes in speed as well. ``Balanced(config)`` is
            that config and then ``balance_`` on the batch, whose X is taken from the exact run.
        filter_fn: ``(module, qualified name) -> bool``, as in ``quantize_``.
        min_cosine: of the whole gradient; 0.97 is a relative error of 24 %, about what lies between the exact gradients of two
            batches of a thousand tokens.
        min_sqnr: of each product of a layer, in dB; 20 is a relative error of 10 %.
        tokens: rows of X and E, evenly spaced, that each layer's own products are measured with. Of SmolLM2's 210 layers, 128
            rows give SQNRs that differ from those of all 512 by 0.06 dB in output and 0.2 in grad_input (int8 HALO-1;
            medians). Of grad_weight, which contracts the sampled rows only, they are 1.8 dB higher: pass more for its sake.
        step_tokens: in a training step, for the model of time, if the batch is only a sample of one.
        gpu: the GPU to model, "RTX 4090" for example; by default the model's own, or the one that this machine has, or an
            H100. Of an H100 the rates were measured, of the others NVIDIA publishes them (``diagnostics/gpus.py`` lists
            them). One that is not listed is modelled as another of its generation; the report says so.
        ceilings: rates of your own, instead of ``gpu``.

    Raises:
        TypeError: a candidate is no such config.
        ValueError: no scalar, finite loss; no eligible layer (the message says why each was left alone), or no candidate;
            ``gpu`` is not known, or ``ceilings`` are given too.
        RuntimeError: the device, or the modelled GPU, cannot run one of the ``candidates`` passed.
    """
    start = perf_counter()
    model = getattr(model, "_orig_mod", model)
    if ceilings is None:
        ceilings = gpus.modelled(gpu, next(model.parameters()).device)
    elif gpu is not None:
        raise ValueError("gpu and ceilings both say what to model: pass one of them")
    configs, balanced = _candidates(candidates, model, ceilings)
    accepted, covered = _accepted(model, configs, filter_fn)
    warn_of_share(model, covered, stacklevel=3)
    names = covered.converted
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}

    with (
        measure.untouched(model),
        measure.swapped(model, dense := measure.dense_parameters(model)),
        measure.calling_linear(layers.values()),
    ):
        transposed = {name for name in names if not isinstance(layers[name], nn.Linear)}  # Conv1D's [in, out]
        weights = {name: _rows(dense[_weight(name)], name in transposed) for name in names}
        trained = {name: p for name, p in dense.items() if p.requires_grad}
        compared = {_weight(name) for name in names} & trained.keys()
        gradient_of = "the converted weights" if compared else "all trainable parameters (no converted weight is trained)"
        with measure.captured(layers, tokens) as operands:
            with balance.observed(layers if balanced else {}) as statistics:
                loss = measure.loss_of(model, batch, loss_fn)
            exact = measure.gradients(loss, trained)  # of all, so that backward comes to every layer that training's does
            if not all(t.isfinite().all() for t in (loss, *exact.values())):
                raise ValueError(
                    f"the loss is {loss.item()}, or a gradient is not finite: halo_tensor.find_nonfinite(model) names where "
                    "that begins"
                )
        if not operands:
            raise ValueError("the batch reaches none of the eligible layers")
        exact = {name: gradient for name, gradient in exact.items() if name in (compared or trained)}

        def convert(recipes: dict[str, Recipe], earlier: dict[str, nn.Parameter], balancing: bool) -> dict[str, nn.Parameter]:
            """The weights of layers under their recipes, by qualified name, as ``balance_`` leaves them if ``balancing``; tied
            weights stay tied. Consumes ``earlier``."""
            found = [x for x in statistics.squares if x in recipes and recipes[x].output.left.format is not None]
            found = [x for x in found if x not in transposed]  # as balance_
            gains = balance.gains_of({x: weights[x] for x in found}, statistics) if balancing and found else {}
            made: dict[tuple, nn.Parameter] = {}
            for x, recipe in recipes.items():
                if (weights[x], recipe) not in made:
                    before = earlier.pop(_weight(x), None)
                    made[weights[x], recipe] = measure.converted(weights[x], recipe, gains.get(x), before)
            return {_weight(x): made[weights[x], recipe] for x, recipe in recipes.items()}

        def whole(
            name: str,
            config: LinearConfig | None,
            recipes: dict[str, Recipe],
            swap: dict[str, nn.Parameter],
            balancing: bool,
        ) -> CandidateReport:
            held = {_weight(x) for x in transposed}
            swap = {key: weight for key, weight in swap.items() if key not in held}
            following = {layers[x]: recipe for x, recipe in recipes.items() if x in transposed and not recipe.is_identity}
            with measure.swapped(model, swap), measure.following(following):
                quantized_loss = measure.loss_of(model, batch, loss_fn)
                found = measure.gradients(quantized_loss, {key: swap.get(key, dense[key]) for key in exact})
            change = (quantized_loss - loss).item()
            finite = change if isfinite(change) else None
            return CandidateReport(name, config, _cosine(found, exact), finite, 1.0, balancing)

        rotation = _rotation(configs)
        reached = [_layer(name, layers[name], operands, weights[name], rotation) for name in names if name in operands]
        total = max(own.tokens for own in operands.values())
        for layer in reached:
            recipes = {name: config.recipe for name, config in configs.items() if layer.name in accepted[name]}
            step = round(layer.tokens * (step_tokens or total) / total)
            _model_time(layer, recipes, step, weights[layer.name].requires_grad, ceilings)
        alone = {layer.name: _exact(layer, operands[layer.name], weights[layer.name]) for layer in reached}
        measured: list[CandidateReport] = []
        swap: dict[str, nn.Parameter] = {}
        for name, config in configs.items():
            balancing = name in balanced
            chosen = dict.fromkeys(accepted[name], config.recipe)
            swap = convert(chosen, swap, balancing)
            for layer in reached:
                if layer.name in accepted[name]:
                    weight = swap[_weight(layer.name)]
                    layer.fidelity[name] = _fidelity(layer, operands[layer.name], weight, alone[layer.name])
            measured.append(whole(name, config, chosen, swap, balancing))
        del swap
        for candidate in measured:
            candidate.speed = _speed(reached, dict.fromkeys(names, candidate.name))

        def mixture(chosen: dict[str, str], balancing: bool) -> CandidateReport:
            recipes = {k: configs[c].recipe for k, c in chosen.items()}
            return whole("as recommended", None, recipes, convert(recipes, {}, balancing), balancing)

        found = Report(
            type(model).__name__,
            loss.item(),
            total,
            step_tokens or total,
            max(len(o.x) for o in operands.values() if o.x is not None),
            reached,
            measured,
            min_cosine,
            min_sqnr,
            ceilings,
            0.0,
            gradient_of,
            share=covered.share,
            left_alone=covered.reasons,
            _by_name=filter_fn is not None,
        )
        _recommend(found, mixture)
    found.seconds = perf_counter() - start
    return found


def _recommend(found: Report, measure_mixture: Callable[[dict[str, str], bool], CandidateReport]) -> None:
    """Apply the rule of :func:`report`. ``measure_mixture`` runs the model with layer -> candidate, all balanced or none."""
    converting = [c for c in found.candidates if any(c.name in layer.fidelity for layer in found.layers)]
    faithful = [c for c in converting if c.cosine >= found.min_cosine]
    best = _fastest(faithful) if faithful else max(converting, key=lambda c: c.cosine)
    # balance_ will reach exceptions too, so they are judged by how they are with it.
    eligible = {c.name for c in found.candidates if c.balanced == best.balanced}
    for layer in found.layers:
        fit = [c for c in layer.fidelity if c in eligible and layer.worst(c)[0] >= found.min_sqnr]
        if best.name in fit:
            layer.recommended = best.name
        elif best.name in layer.fidelity and fit:
            layer.recommended = min(fit, key=layer.seconds.__getitem__)
    found.recommended, found.result = best.name, best
    if found.exceptions:
        chosen = {x.name: x.recommended for x in found.layers if x.recommended != HIGH_PRECISION}
        found.result = measure_mixture(chosen, best.balanced)
        found.result.speed = _speed(found.layers, {x.name: x.recommended for x in found.layers})
    if not found.result.cosine >= found.min_cosine or all(x.recommended == HIGH_PRECISION for x in found.layers):
        found.verdict = (
            f"none of the candidates is faithful: the best, {best.name}, has a gradient cosine of {best.cosine:.4f} where "
            f"{found.min_cosine} is wanted, and a product below {found.min_sqnr:g} dB in {len(found.exceptions)} of "
            f"{len(found.layers)} layers. Keep high precision, or lower min_cosine and min_sqnr"
        )
        found.recommended = found.result = None
        for layer in found.layers:
            layer.recommended = HIGH_PRECISION
        return
    speed = found.result.speed
    found.verdict = (
        f"{best.name}: gradient cosine {found.result.cosine:.4f} (at least {found.min_cosine} wanted), modelled at "
        f"{speed:.2f}× bf16's speed on {found.ceilings.a_name}"
        + ("" if speed > 1 else ", so at these shapes it saves memory, and no time")
        + ("; call balance_ after quantize_" if best.balanced else "")
    )


def _fastest(faithful: list[CandidateReport]) -> CandidateReport:
    by_speed = sorted(faithful, key=lambda c: (-c.speed, c.balanced, -c.cosine))
    best = by_speed[0]
    for other in by_speed[1:]:
        as_fast = other.speed > (1 - SPEED_MARGIN) * best.speed
        if as_fast and other.cosine > best.cosine + COSINE_MARGIN and 1 - other.cosine <= (1 - best.cosine) / 2:
            best = other
    return best


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _candidates(given, model: nn.Module, ceilings: Ceilings) -> tuple[dict[str, LinearConfig], set[str]]:
    """Configs by name, and the names of those that are balanced."""
    device = next(model.parameters()).device
    if given is None:
        able = {name: config for name, config in CANDIDATES.items() if runs(config.recipe.formats, device)}
        named: dict[str, Candidate] = {name: c for name, c in able.items() if roofline.gains(c.recipe, ceilings)}
    else:
        named = dict(given) if isinstance(given, Mapping) else {str(config): config for config in given}
    configs = {name: c.config if isinstance(c, Balanced) else c for name, c in named.items()}
    for config in configs.values():
        if not isinstance(config, LinearConfig):
            raise TypeError(f"a candidate is a config of halo_config or recipe_config, or Balanced(config); got {config!r}")
        check_device(config.recipe.formats, device)
        if lacking := roofline.lacking(config.recipe, ceilings):
            raise RuntimeError(f"{ceilings.a_name} cannot multiply {', '.join(sorted(lacking))}: leave out {config!r}")
    if not configs:
        raise ValueError(f"there is no candidate recipe to measure on {device} that {ceilings.a_name} runs faster than bf16")
    balanced = {name for name, c in named.items() if isinstance(c, Balanced)}
    if useless := [name for name in balanced if configs[name].recipe.output.left.format is None]:
        raise ValueError(f"{useless[0]} quantises no output, so there is nothing to balance: pass the config itself")
    return configs, balanced


def _accepted(
    model: nn.Module, configs: dict[str, LinearConfig], filter_fn: Callable | None
) -> tuple[dict[str, list[str]], Conversion]:
    """Candidate -> the layers that ``quantize_`` would convert; and those of any candidate, with what they leave out."""
    accepted: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    known = [(name, m) for name, m in model.named_modules() if features(m) and not isinstance(m, nn.Conv2d)]
    for candidate, config in configs.items():
        accept = filter_fn or layer_filter(model, config)
        accepted[candidate] = [name for name, module in known if accept(module, name)]
        reasons |= getattr(accept, "reasons", {})
    taken = {name for names in accepted.values() for name in names}
    if not taken:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(reasons.items())[:8]) or ": filter_fn took none"
        raise ValueError(f"no layer of this {type(model).__name__} is eligible{why}")
    reasons |= {name: CHOICE for name, _ in known if name not in taken | reasons.keys()}
    reasons |= {name: "report does not measure convolutions" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    skipped = {name: reason for name, reason in reasons.items() if name not in taken}
    covered = survey(model, None, [name for name, _ in known if name in taken], skipped, configs.values())
    return accepted, covered


def _rows(weight: nn.Parameter, transposed: bool) -> nn.Parameter:
    """A layer's weight as [out, in]."""
    return nn.Parameter(weight.detach().t(), weight.requires_grad) if transposed else weight


def _rotation(configs: dict[str, LinearConfig]) -> Rotation:
    """The one that outliers are shown under: the first that a candidate has, or the default."""
    operands = [side for c in configs.values() for p in PRODUCTS for side in vars(getattr(c.recipe, p)).values()]
    return next((r for o in operands for d in DIMENSIONS if (r := o.rotation(d)) is not None), Rotation())


def _layer(name, module: nn.Module, operands: dict[str, Operands], weight: nn.Parameter, rotation: Rotation) -> LayerReport:
    own = operands[name]
    arrived = own.e is not None
    computed = {
        "output": True,
        "grad_input": arrived and own.needs_grad_input,
        "grad_weight": arrived and weight.requires_grad,
    }
    sides = features(module)
    assert sides is not None
    return LayerReport(
        name,
        *sides,
        own.tokens,
        tuple(product for product in PRODUCTS if computed[product]),
        sum(other.x_group == own.x_group for other in operands.values()),
        measure.outliers(own, weight, rotation),
    )


def _exact(layer: LayerReport, own: Operands, weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """The layer's products in float32, but grad_weight: of every layer that would take as much memory as the model."""
    assert own.x is not None
    wanted = tuple(product for product in layer.products if product != "grad_weight")
    return measure.products(own.x, nn.Parameter(weight.detach().float(), weight.requires_grad), own.e, wanted)


def _fidelity(layer: LayerReport, own: Operands, weight: nn.Parameter, exact: dict[str, torch.Tensor]) -> dict[str, Fidelity]:
    assert own.x is not None
    quantized = measure.products(own.x, weight, own.e, layer.products)
    if "grad_weight" in layer.products:
        assert own.e is not None
        exact = exact | {"grad_weight": measure.grad_weight(own.x, own.e)}
    return {product: Fidelity.of(quantized[product], exact[product]) for product in layer.products}


def _model_time(layer: LayerReport, recipes: dict[str, Recipe], tokens: int, trained: bool, ceilings: Ceilings) -> None:
    sizes = {"tokens": tokens, "in_features": layer.in_features, "out_features": layer.out_features}
    for name, recipe in ({HIGH_PRECISION: Recipe()} | recipes).items():
        layer.seconds[name] = roofline.seconds(
            recipe, sizes, layer.products, trained=trained, sharing=layer.sharing, ceilings=ceilings
        )


def _speed(layers: list[LayerReport], chosen: dict[str, str]) -> float:
    """Of the layers together under layer -> candidate, × high precision."""
    time = sum(layer.seconds[HIGH_PRECISION] / layer.speed(chosen[layer.name]) for layer in layers)
    return sum(layer.seconds[HIGH_PRECISION] for layer in layers) / time


def _cosine(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    sums = [0.0, 0.0, 0.0]
    for name, e in exact.items():
        f = found[name]
        for i, (u, v) in enumerate(((f, e), (f, f), (e, e))):
            sums[i] += float(u @ v)
    product = sums[1] * sums[2]
    return sums[0] / sqrt(product) if 0 < product < float("inf") else 0.0
