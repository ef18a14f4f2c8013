"""The rule by which a report recommends a candidate, on made-up measurements."""

import pytest

from halo_tensor.analysis.ceilings import H100
from halo_tensor.analysis.fidelity import Fidelity
from halo_tensor.diagnostics.reports.data import HIGH_PRECISION, CandidateReport, LayerReport, ReportData
from halo_tensor.diagnostics.reports.recommendation import fastest, recommend, speed_of
from halo_tensor.diagnostics.reports.text import reason

SECONDS = {HIGH_PRECISION: 8.0, "fast": 2.0, "middle": 4.0, "slow": 5.0}


def layer(name: str, **sqnr: float) -> LayerReport:
    """Return a layer with these SQNRs of grad_weight under candidates."""
    fidelity = {c: {"output": Fidelity(1.0, 60.0), "grad_weight": Fidelity(1.0, db)} for c, db in sqnr.items()}
    return LayerReport(name, 128, 128, 64, ("output", "grad_weight"), 1, {}, fidelity, dict(SECONDS))


def recommended(layers, candidates, mixture=0.99, min_cosine=0.97, min_gain=0.0):
    found = ReportData("Model", 1.0, 64, 64, 64, layers, candidates, min_cosine, 20.0, H100, 0.0, "the converted weights")
    found.min_gain = min_gain
    asked = []

    def measure(chosen, balanced):
        asked.append((chosen, balanced))
        return CandidateReport("as recommended", None, mixture, 0.0, 1.0, balanced)

    recommend(found, measure)
    return found, asked


def candidates(*cosines, balanced=()):
    names = ("fast", "middle", "slow")
    speeds = (4.0, 2.0, 1.6)
    return [CandidateReport(n, None, c, 0.0, s, n in balanced) for n, c, s in zip(names, cosines, speeds, strict=True)]


def test_an_exception_takes_the_fastest_recipe_above_the_threshold():
    layers = [layer("a", fast=30, middle=30, slow=30), layer("b", fast=10, middle=25, slow=40), layer("c", fast=19.9, slow=20)]
    layers += [layer("d", fast=10, middle=10), layer("e", middle=30)]
    found, asked = recommended(layers, candidates(0.98, 0.985, 0.988))
    assert found.recommended == "fast"
    chosen = {x.name: x.recommended for x in layers}
    # b: middle is faster than slow. c: 20 dB are enough, 19.9 are not. d: no candidate is above 20 dB. e: fast leaves it alone.
    assert chosen == {"a": "fast", "b": "middle", "c": "slow", "d": HIGH_PRECISION, "e": HIGH_PRECISION}
    assert asked == [({"a": "fast", "b": "middle", "c": "slow"}, False)]
    assert found.result.speed == pytest.approx(5 * 8 / (2 + 4 + 5 + 8 + 8)) == pytest.approx(speed_of(layers, chosen))
    assert [x.name for x in found.exceptions] == ["b", "c", "d", "e"]


def slowed(layer: LayerReport, **seconds: float) -> LayerReport:
    """Give a layer other predicted times; high precision takes 8."""
    layer.seconds |= seconds
    return layer


def test_a_layer_that_would_be_slower_takes_another_candidate_or_high_precision():
    layers = [layer("a", fast=30, middle=30, slow=30)]
    layers += [slowed(layer("b", fast=30, middle=30, slow=30), fast=9.0, middle=8.5, slow=8.0)]
    layers += [slowed(layer("c", fast=30, middle=30, slow=10), fast=9.0, middle=8.5, slow=8.0)]
    found, asked = recommended(layers, candidates(0.98, 0.985, 0.988), min_gain=1.0)
    assert {x.name: x.recommended for x in layers} == {"a": "fast", "b": "slow", "c": HIGH_PRECISION}
    assert asked == [({"a": "fast", "b": "slow"}, False)] and found.recommended == "fast"
    assert reason(layers[2], found) == "fast is modelled at 0.89× bf16's speed there"
    everywhere, asked = recommended(layers, candidates(0.98, 0.985, 0.988))
    assert not everywhere.exceptions and not asked, "min_gain=0"


def test_high_precision_is_recommended_if_no_layer_gains():
    layers = [slowed(layer(name, fast=30, middle=30, slow=30), fast=9.0, middle=9.0, slow=9.0) for name in "ab"]
    found, asked = recommended(layers, candidates(0.98, 0.985, 0.988), min_gain=1.0)
    assert found.recommended is None and found.config is None and not asked
    assert found.verdict.startswith("none of the layers gains: fast is modelled at 4.00×") and "step_tokens" in found.verdict
    assert "no layer reaches min_gain=1" in found.verdict and "min_gain=0" in found.verdict
    unfaithful, _ = recommended(layers, candidates(0.5, 0.6, 0.7), min_gain=0.0)
    assert "none of the candidates is faithful" in unfaithful.verdict


def test_what_no_gpu_runs_is_not_recommended():
    layers = [layer("a", fast=30, middle=30, slow=30), layer("b", fast=30, middle=10, slow=30)]
    found = candidates(0.999, 0.98, 0.985)
    found[0].has_kernels = False
    assert recommended(layers, found)[0].recommended == "middle" and layers[1].recommended == "slow"
    for candidate in found:
        candidate.has_kernels = False
    none, asked = recommended(layers, found)
    assert none.recommended is None and "none of the candidates runs on a GPU" in none.verdict and not asked


def test_exceptions_are_chosen_among_balanced_candidates():
    layers = [layer("a", fast=30, middle=30, slow=30), layer("b", fast=10, middle=25, slow=40)]
    found, asked = recommended(layers, candidates(0.98, 0.985, 0.99, balanced=("fast", "slow")))
    assert layers[1].recommended == "slow", "middle is faster, but not balanced"
    assert asked == [({"a": "fast", "b": "slow"}, True)] and "call balance_ after quantize_" in found.verdict


def test_a_cosine_equal_to_the_threshold_is_enough():
    at, _ = recommended([layer("a", fast=30, slow=30)], candidates(0.97, 0.9, 0.985))
    assert at.recommended == "fast", "exactly what is wanted is enough, and twice as faithful is not as fast"
    below, _ = recommended([layer("a", fast=30, slow=30)], candidates(0.96999, 0.9, 0.985))
    assert below.recommended == "slow"
    none, _ = recommended([layer("a", fast=30, slow=30)], candidates(0.5, 0.9, 0.8))
    assert none.recommended is None and none.layers[0].recommended == HIGH_PRECISION and "slow" in none.verdict
    spoilt, _ = recommended([layer("a", fast=30), layer("b", fast=10)], candidates(0.98, 0.1, 0.1), mixture=0.9)
    assert spoilt.recommended is None, "the mixture must be faithful"


def test_the_speed_margin_is_5_percent():
    best = candidate("best", 0.98, 2.0)
    assert fastest([best, candidate("twice", 0.99, 1.91)]).name == "twice"
    assert fastest([best, candidate("twice", 0.99, 1.89)]).name == "best", "more than 5 % slower"
    assert fastest([best, candidate("less than twice", 0.9899, 1.91)]).name == "best"
    assert fastest([candidate("bare", 0.98, 2.0), candidate("tied, less faithful", 0.979, 2.0)]).name == "bare"


def candidate(name, cosine, speed):
    return CandidateReport(name, None, cosine, 0.0, speed)


def test_a_candidate_of_equal_speed_and_half_the_error_replaces_the_fastest():
    slow, fast = candidate("slow", 0.999, 1.2), candidate("fast", 0.98, 1.6)
    assert fastest([slow, fast]) is fast
    close = candidate("close", 0.995, 1.55)
    assert fastest([slow, fast, close]) is close
    closer = candidate("closer", 0.998, 1.5)  # within 5 % of close, not of fast
    assert fastest([slow, fast, close, closer]) is closer and fastest([slow, fast, closer]) is fast
    little = candidate("little better", 0.985, 1.59)
    assert fastest([slow, fast, little]) is fast
    noise = candidate("better by noise", 0.9999, 1.59)
    assert fastest([candidate("faithful", 0.9995, 1.6), noise]).name == "faithful"
    assert fastest([candidate("a", 0.98, 1.6), candidate("b", 0.981, 1.6)]).name == "b"
