"""The rates of GPUs, which one is modelled, and what ``report`` and ``calibrate`` recommend for it."""

import sys
from dataclasses import replace

import pytest
import torch
import triton
from torch import nn

from halo_tensor import calibrate, halo_config, report
from halo_tensor.analysis import gpus, roofline
from halo_tensor.analysis.ceilings import H100, H200
from halo_tensor.calibration.candidates import CANDIDATES
from halo_tensor.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16_ALONE = replace(H100, name="X", products={"bf16": 1e12})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("4090", None),
        ("", None),
    ],
)
def test_names_of_devices_are_recognised(name, expected):
    assert gpus._listed(name) == expected


def test_products_reach_the_modelled_part_of_published_rates_on_an_h100():
    """An H100 modelled from its published rates would be close to the measured one."""
    published = gpus.GPUS["H100"]
    for unit, rate in H100.products.items():
        assert rate == pytest.approx(getattr(published, unit) * 1e12 * gpus.PRODUCTS_REACH, rel=0.09)
    assert 0.8 * published.bandwidth < H100.copy / 1e12 < published.bandwidth
    assert gpus.ceilings_of("H100") is H100
    h200 = gpus.ceilings_of("H200")
    assert h200 is H200 and h200.copy == pytest.approx(H100.copy * 4.8 / 3.35, rel=0.06)


def test_the_source_says_that_rates_are_published_and_not_measured():
    for name, published in gpus.GPUS.items():
        if published.capability != (9, 0):
            ceilings = gpus.ceilings_of(name)
            assert "published" in ceilings.source and "not measured" in ceilings.source and published.sheet in ceilings.source
            assert ("fp8" in ceilings.products) == (published.capability >= (8, 9)), name


@pytest.mark.parametrize(
    ("name", "tensor_cores", "boost_clock"), [("RTX 3090", 328, 1.695), ("RTX 4090", 512, 2.520), ("RTX 5090", 680, 2.407)]
)
def test_published_int8_rates_of_geforce_cards_follow_from_their_clocks(name, tensor_cores, boost_clock):
    """Each tensor core of these generations does 512 int8 operations in a clock cycle."""
    assert gpus.GPUS[name].int8 == pytest.approx(tensor_cores * boost_clock * 512 / 1000, rel=0.003)


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 4090", "RTX 5090"])
def test_float32_accumulation_halves_rates_of_geforce_cards(name):
    ceilings = gpus.ceilings_of(name)
    assert ceilings.products["int8"] == pytest.approx(4 * ceilings.products["bf16"], rel=0.001)
    if "fp8" in ceilings.products:
        assert ceilings.products["fp8"] == pytest.approx(ceilings.products["int8"] / 2, rel=0.001)
    assert "half rate" in ceilings.notes[0] and ("Others measured" in "".join(ceilings.notes)) == (name == "RTX 5090")
    assert "half" not in "".join(gpus.ceilings_of("L40S").notes) and not gpus.ceilings_of("A100").notes


@pytest.mark.parametrize(
    ("name", "version", "units"),
    [
        ("A100", "3.6.0", {"int8"}),
        ("RTX 3090", "3.6.0", {"int8"}),
        ("RTX 4090", "3.6.0", {"int8", "fp8"}),
        ("L40S", "3.6.0", {"int8", "fp8"}),
        ("RTX 5090", "3.6.0", {"int8", "fp8"}),
        ("H100", "3.6.0", {"int8", "fp8"}),
        ("H200", "3.7.1", {"int8", "fp8"}),
        ("B200", "3.6.0", {"fp8"}),
        ("B200", "3.7.1", {"fp8"}),
        ("B200", "3.8.0", {"int8", "fp8"}),
        ("B200", "3.10.0", {"int8", "fp8"}),
        ("B300", "3.6.0", {"fp8"}),
        ("B300", "3.8.0", {"fp8"}),
    ],
)
def test_which_number_formats_are_faster_than_bf16(name, version, units, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    ceilings = gpus.ceilings_of(name)
    ordered = roofline.fastest_first(CANDIDATES.values(), ceilings)
    assert {config.dtype for config in ordered} == units
    times = [roofline.seconds(config.recipe, roofline.TYPICAL, ceilings=ceilings) for config in ordered]
    assert times == sorted(times) and times[-1] < roofline.seconds(Recipe(), roofline.TYPICAL, ceilings=ceilings)
    said = "no default candidates" in " ".join(ceilings.notes)
    assert said == (units == {"fp8"})
    assert ("mma.sync" in " ".join(ceilings.notes)) == (name == "B200" and said)
    if name.startswith("RTX"):
        assert ordered[0].dtype == "int8"


def test_rates_are_known_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpus.ceilings_of("B200").notes == ()


def test_the_gpu_of_this_machine_is_modelled(machine, monkeypatch):
    machine("NVIDIA GeForce RTX 4090", (8, 9))
    for device in (CUDA, CPU):
        assert gpus.modelled(None, device).name == "RTX 4090"
    assert gpus.modelled("B300", CUDA).name == "B300"
    machine("NVIDIA GeForce RTX 4070", (8, 9))
    found = gpus.modelled(None, CUDA)
    assert found.name == "RTX 4090" and found.notes[0] == (
        "The rates of NVIDIA GeForce RTX 4070 are not known, and RTX 4090, of the same generation, is modelled."
    )
    assert found.notes[1:] == gpus.ceilings_of("RTX 4090").notes
    machine("NVIDIA H100 PCIe", (9, 0))
    assert gpus.modelled(None, CUDA).products == H100.products
    machine("NVIDIA Thor", (11, 0))
    found = gpus.modelled(None, CUDA)
    assert found.name == H100.name and "NVIDIA Thor are not known" in found.notes[0] and not H100.notes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in gpus.modelled(None, CPU).notes[0]
    with pytest.raises(ValueError, match=r"gpu='RTX 4070' is not known; known are A100, .*RTX 5090. Pass ceilings="):
        gpus.modelled("RTX 4070", CPU)


def loss(model, x):
    return model(x).square().sum()


def test_report_recommends_by_the_gpu():
    torch.manual_seed(0)
    model, x = nn.Linear(512, 512), torch.randn(64, 512)
    options = {"loss_fn": loss, "step_tokens": 8192, "min_gain": 0}
    found = {name: report(model, x, gpu=name, **options) for name in ("RTX 4090", "B300", "A100")}
    assert found["B300"].recommended.startswith("fp8") and "on a B300" in found["B300"].verdict
    assert "B300 has nearly no int8 (150 TFLOP/s where bf16 has 2250)" in str(found["B300"])
    assert {c.name[:4] for c in found["B300"].candidates} == {"fp8 "} and {c.name[:4] for c in found["A100"].candidates} == {
        "int8"
    }
    assert found["RTX 4090"].recommended.startswith("int8") and "on an RTX 4090" in found["RTX 4090"].verdict
    assert len(found["RTX 4090"].candidates) == len(CANDIDATES) and "half rate" in found["RTX 4090"].to_markdown()
    own = report(model, x, ceilings=H100, candidates=[halo_config(1, "int8")], **options)
    assert own.ceilings is H100 and f"({H100.source})." in str(own)


def test_report_refuses_formats_that_the_gpu_lacks():
    model, x = nn.Linear(128, 128), torch.randn(16, 128)
    with pytest.raises(RuntimeError, match="an A100 cannot multiply fp8: leave out HaloConfig"):
        report(model, x, gpu="A100", candidates=[halo_config(0, "fp8")], loss_fn=loss)
    with pytest.raises(ValueError, match="pass one of them"):
        report(model, x, gpu="A100", ceilings=H100, loss_fn=loss)
    with pytest.raises(ValueError, match="no candidate recipe to measure on cpu that an X runs faster"):
        report(model, x, ceilings=BF16_ALONE, loss_fn=loss)


def test_calibrate_orders_by_the_gpu(machine):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(128, 128)), torch.randn(64, 128)

    def chosen(**options):
        return calibrate(model, [batch], level="auto", loss=loss, **options).layers["0"]

    assert chosen(target=0, gpu="H100") == chosen(target=0, gpu="A100") == halo_config(1, "int8")
    assert chosen(target=0, gpu="B300") == chosen(target=1.0, gpu="B300") == halo_config(0, "fp8")
    assert chosen(target=0, gpu="B300", candidates=None) != chosen(target=0, candidates=[halo_config(2, "int8")])
    with pytest.raises(ValueError, match="pass it without candidates"):
        chosen(gpu="H100", candidates=[halo_config(2, "int8")])
    with pytest.raises(ValueError, match="pass it without candidates"):
        calibrate(model, [batch], loss=loss, gpu="H100")
    with pytest.raises(ValueError, match="gpu='X' is not known"):
        chosen(gpu="X")
    machine("NVIDIA B300 SXM6 AC", (10, 3))
    assert chosen(target=0) == halo_config(0, "fp8")
