"""What ``report`` recommends for each layer, by its rule, on made-up measurements."""

import pytest

from halo_tensor.analysis.measure import Fidelity
from halo_tensor.analysis.roofline import H100
from halo_tensor.diagnostics.report import _fastest, _recommend, _speed
from halo_tensor.diagnostics.result import HIGH_PRECISION, CandidateReport, LayerReport, Report

SECONDS = {HIGH_PRECISION: 8.0, "fast": 2.0, "middle": 4.0, "slow": 5.0}


def layer(name: str, **sqnr: float) -> LayerReport:
    """A layer whose products have such SQNRs under candidates."""
    fidelity = {c: {"output": Fidelity(1.0, 60.0), "grad_weight": Fidelity(1.0, db)} for c, db in sqnr.items()}
    return LayerReport(name, 128, 128, 64, ("output", "grad_weight"), 1, {}, fidelity, dict(SECONDS))


def recommend(layers, candidates, mixture=0.99, min_cosine=0.97):
    found = Report("Model", 1.0, 64, 64, 64, layers, candidates, min_cosine, 20.0, H100, 0.0, "the converted weights")
    asked = []

    def measure(chosen, balanced):
        asked.append((chosen, balanced))
        return CandidateReport("as recommended", None, mixture, 0.0, 1.0, balanced)

    _recommend(found, measure)
    return found, asked


def candidates(*cosines, balanced=()):
    names = ("fast", "middle", "slow")
    speeds = (4.0, 2.0, 1.6)
    return [CandidateReport(n, None, c, 0.0, s, n in balanced) for n, c, s in zip(names, cosines, speeds, strict=True)]


def test_an_exception_gets_the_fastest_recipe_that_fits_it():
    layers = [layer("a", fast=30, middle=30, slow=30), layer("b", fast=10, middle=25, slow=40), layer("c", fast=19.9, slow=20)]
    layers += [layer("d", fast=10, middle=10), layer("e", middle=30)]
    found, asked = recommend(layers, candidates(0.98, 0.985, 0.988))
    assert found.recommended == "fast"
    chosen = {x.name: x.recommended for x in layers}
    # b: middle is faster than slow; c: 20 dB are enough, 19.9 are not; d: none fits; e: the best leaves it alone.
    assert chosen == {"a": "fast", "b": "middle", "c": "slow", "d": HIGH_PRECISION, "e": HIGH_PRECISION}
    assert asked == [({"a": "fast", "b": "middle", "c": "slow"}, False)]
    assert found.result.speed == pytest.approx(5 * 8 / (2 + 4 + 5 + 8 + 8)) == pytest.approx(_speed(layers, chosen))
    assert [x.name for x in found.exceptions] == ["b", "c", "d", "e"]


def test_exceptions_are_balanced_as_the_rest_is():
    layers = [layer("a", fast=30, middle=30, slow=30), layer("b", fast=10, middle=25, slow=40)]
    found, asked = recommend(layers, candidates(0.98, 0.985, 0.99, balanced=("fast", "slow")))
    assert layers[1].recommended == "slow", "middle is faster, but not balanced"
    assert asked == [({"a": "fast", "b": "slow"}, True)] and "call balance_ after quantize_" in found.verdict


def test_thresholds_of_the_whole_gradient():
    at, _ = recommend([layer("a", fast=30, slow=30)], candidates(0.97, 0.9, 0.985))
    assert at.recommended == "fast", "exactly what is wanted is enough, and twice as faithful is not as fast"
    below, _ = recommend([layer("a", fast=30, slow=30)], candidates(0.96999, 0.9, 0.985))
    assert below.recommended == "slow"
    none, _ = recommend([layer("a", fast=30, slow=30)], candidates(0.5, 0.9, 0.8))
    assert none.recommended is None and none.layers[0].recommended == HIGH_PRECISION and "slow" in none.verdict
    spoilt, _ = recommend([layer("a", fast=30), layer("b", fast=10)], candidates(0.98, 0.1, 0.1), mixture=0.9)
    assert spoilt.recommended is None, "the mixture is what must be faithful"


def test_as_fast_is_within_the_margin():
    def named(name, cosine, speed):
        return CandidateReport(name, None, cosine, 0.0, speed)

    best = named("best", 0.98, 2.0)
    assert _fastest([best, named("twice", 0.99, 1.91)]).name == "twice"
    assert _fastest([best, named("twice", 0.99, 1.89)]).name == "best", "more than 5 % slower"
    assert _fastest([best, named("less than twice", 0.9899, 1.91)]).name == "best"
    assert _fastest([named("bare", 0.98, 2.0), named("tied, less faithful", 0.979, 2.0)]).name == "bare"
