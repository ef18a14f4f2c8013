"""Mixtures whose experts are quantised as they are loaded."""

import pytest
import torch

from tests.helpers.errors import relative_error
from tests.helpers.moe_models import FAMILIES, IDS, experts_of, mixture
from tests.helpers.recording import OpLog

transformers = pytest.importorskip("transformers")

from halo_tensor import HaloWeight, halo_config, quantize_  # noqa: E402
from halo_tensor.transformers import HaloQuantConfig  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_quantised_while_they_are_loaded(family, tmp_path):
    """They hold the codes that ``quantize_`` would make, and no high-precision values."""
    mixture(family).save_pretrained(tmp_path)
    config = HaloQuantConfig(level=1, dtype="int8", min_features=16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    (name,) = experts_of(model)
    module = experts_of(model)[name]
    report = model.hf_quantizer.report
    assert name in report.converted and report.share == 1 and name not in report.skipped
    for weight in (module.gate_up_proj, module.down_proj):
        assert isinstance(weight, HaloWeight) and weight.master is None and not weight.requires_grad
    expected = mixture(family).eval()
    quantize_(expected, halo_config(1, "int8", min_features=16, frozen=True))
    with torch.no_grad(), OpLog() as log:
        logits = model(IDS).logits
    assert [n for n, _ in log.calls].count("grouped_mm") == 2
    assert torch.equal(logits, expected(IDS).logits)
    (other,) = experts_of(expected).values()
    assert torch.equal(module.down_proj.codes, other.down_proj.codes)
    plain = model.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert 1e-4 < relative_error(logits, loaded(IDS).logits) < 0.2
