"""The rule by which a report recommends a candidate. The docstring of ``report`` states it."""

from collections.abc import Callable

from halo_tensor.diagnostics.reports.data import HIGH_PRECISION, CandidateReport, LayerReport, ReportData

#: Two predicted speeds that differ by less count as equal. Tests bound the error of the prediction by 8 %.
SPEED_MARGIN = 0.05
#: Two cosines that differ by less count as equal. Another seed of a rotation changes them by a few 1e-4.
COSINE_MARGIN = 0.001


def recommend(found: ReportData, run_mixture: Callable[[dict[str, str], bool], CandidateReport]) -> None:
    """Fill in the recommendation of a report.

    Args:
        found: has all measurements. ``recommended``, ``result``, ``verdict`` and those of its layers are set.
        run_mixture: runs the model with layer -> candidate, balanced or not.
    """
    converting = [c for c in found.candidates if any(c.name in layer.fidelity for layer in found.layers) and c.has_kernels]
    if not converting:
        _recommend_high_precision(found, "none of the candidates runs on a GPU: no kernel computes with their scales")
        return
    faithful = [c for c in converting if c.cosine >= found.min_cosine]
    best = fastest(faithful) if faithful else max(converting, key=lambda c: c.cosine)
    _choose_for_layers(found, best)
    found.recommended, found.result = best.name, best
    chosen = {x.name: x.recommended for x in found.layers if x.recommended != HIGH_PRECISION}
    if found.exceptions and chosen:
        found.result = run_mixture(chosen, best.balanced)
        found.result.speed = speed_of(found.layers, {x.name: x.recommended for x in found.layers})
    if not found.result.cosine >= found.min_cosine:
        _recommend_high_precision(found, _unfaithful(found, best))
    elif all(x.recommended == HIGH_PRECISION for x in found.layers):
        slow = all(best.name not in x.fidelity or x.speed(best.name) < found.min_gain for x in found.layers)
        _recommend_high_precision(found, _too_slow(found, best) if slow else _unfaithful(found, best))
    else:
        found.verdict = _verdict(found, best, found.result)


def _choose_for_layers(found: ReportData, best: CandidateReport) -> None:
    """Give each layer ``best``, or the fastest candidate that suits it, or high precision.

    A candidate suits a layer if it keeps all products above ``min_sqnr`` and is predicted to reach ``min_gain``.
    """
    # balance_ reaches the exceptions too, so they are judged by their balanced measurements.
    eligible = {c.name for c in found.candidates if c.balanced == best.balanced and c.has_kernels}
    for layer in found.layers:
        fit = [
            c
            for c in layer.fidelity
            if c in eligible and layer.worst(c)[0] >= found.min_sqnr and layer.speed(c) >= found.min_gain
        ]
        if best.name in fit:
            layer.recommended = best.name
        elif best.name in layer.fidelity and fit:
            layer.recommended = min(fit, key=layer.seconds.__getitem__)


def _recommend_high_precision(found: ReportData, verdict: str) -> None:
    found.verdict = verdict
    found.recommended = found.result = None
    for layer in found.layers:
        layer.recommended = HIGH_PRECISION


def _unfaithful(found: ReportData, best: CandidateReport) -> str:
    return (
        f"none of the candidates is faithful: the best, {best.name}, has a gradient cosine of {best.cosine:.4f} where "
        f"{found.min_cosine} is wanted, and a product below {found.min_sqnr:g} dB in "
        f"{sum(x.worst(best.name)[0] < found.min_sqnr for x in found.layers)} of {len(found.layers)} layers. Keep high "
        "precision, or lower min_cosine and min_sqnr"
    )


def _too_slow(found: ReportData, best: CandidateReport) -> str:
    return (
        f"none of the layers gains: {best.name} is modelled at {best.speed:.2f}× bf16's speed on {found.ceilings.a_name} with "
        f"{found.step_tokens} tokens a step, and no layer reaches min_gain={found.min_gain:g}. Keep high precision; or pass "
        "step_tokens, if steps have more tokens than the batch, or min_gain=0, to save memory and no time"
    )


def _verdict(found: ReportData, best: CandidateReport, result: CandidateReport) -> str:
    verdict = (
        f"{best.name}: gradient cosine {result.cosine:.4f} (at least {found.min_cosine} wanted), modelled at "
        f"{result.speed:.2f}× bf16's speed on {found.ceilings.a_name}"
    )
    if not result.speed > 1:
        verdict += ", so at these shapes it saves memory, and no time"
    if best.balanced:
        verdict += "; call balance_ after quantize_"
    return verdict


def fastest(faithful: list[CandidateReport]) -> CandidateReport:
    """Return the fastest candidate, or one that is about as fast and has at most half of its error."""
    by_speed = sorted(faithful, key=lambda c: (-c.speed, c.balanced, -c.cosine))
    best = by_speed[0]
    for other in by_speed[1:]:
        as_fast = other.speed > (1 - SPEED_MARGIN) * best.speed
        if as_fast and other.cosine > best.cosine + COSINE_MARGIN and 1 - other.cosine <= (1 - best.cosine) / 2:
            best = other
    return best


def speed_of(layers: list[LayerReport], chosen: dict[str, str]) -> float:
    """Return the predicted speed of all layers together, × high precision, under layer -> candidate."""
    time = sum(layer.seconds[HIGH_PRECISION] / layer.speed(chosen[layer.name]) for layer in layers)
    return sum(layer.seconds[HIGH_PRECISION] for layer in layers) / time
