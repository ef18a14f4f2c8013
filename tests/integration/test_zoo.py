"""Every architecture of ``tests/helpers/architectures.py``: what is converted, that it trains like its unconverted twin, and that
it exports plain weights.

``python -m pytest tests/integration/test_zoo.py -k Llama`` runs one.
"""

import re
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from tests.helpers.architectures import BOUNDS, CASES, LEFT, expected_share
from tests.helpers.zoo import Case, examine, main_reason, multiplied


@pytest.fixture(autouse=True)
def _surroundings():
    """Without transformers' notices about tiny configurations, and on one thread: two wait for each other at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_an_architecture(case: Case):
    found = examine(case)
    share, reason = expected_share(case)
    if share == 0:
        assert found.report is None and found.refused.startswith("no layer of this ")
        assert f": {reason}" in found.refused and "Pass filter_fn" in found.refused
        return
    report = found.report
    assert report is not None, found.refused
    assert report.share == pytest.approx(share, abs=0.001)
    assert report.share < found.share + 0.02, "no more is said to be converted than a forward multiplies in int8"
    assert reason is None or main_reason(report) == reason
    if report.share < 0.5:
        (message,) = found.warned
        assert re.match(r"only \d+ % of the parameters in the linear layers of this", message) and f": {reason} (" in message
    else:
        assert not found.warned
    assert found.products == found.called >= 2, "each converted layer multiplies in int8 whenever it is called"
    again = case.model.startswith("Reformer")  # its layers are reversible: backward computes the forward anew
    assert 2 * found.called <= found.trained <= (4 if again else 3) * found.called, "and so does its backward"
    cosine, difference, noise = BOUNDS.get(case.model, BOUNDS[""])
    assert cosine < found.cosine < 1 - 1e-9
    assert 0 < found.difference < difference
    for losses in zip(*found.losses, strict=True):
        assert losses[-1] < losses[0]
    assert found.exported and 1e-5 < found.noise < noise


def test_the_table_is_of_this_zoo():
    models = [case.model for case in CASES]
    assert len(models) == len(set(models)) >= 200
    listed = [model for models in LEFT.values() for model in models]
    assert len(listed) == len(set(listed)) and set(listed) | (BOUNDS.keys() - {""}) <= set(models)
    kinds = {kind: sum(case.kind == kind for case in CASES) for kind in {case.kind for case in CASES}}
    assert min(kinds.values()) >= 3, kinds


def test_what_a_forward_multiplies_is_found():
    """The measure of the share itself: of a layer, of a parameter that is no layer's, and of one that is not used."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.matrix, self.gain = torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(32, 16))

        def forward(self, x):
            return (self.layer(x) @ self.matrix * self.gain[0]).sum()

    assert multiplied(Model(), {"x": torch.randn(4, 32)}) == {"layer.weight": 1024, "matrix": 512}
