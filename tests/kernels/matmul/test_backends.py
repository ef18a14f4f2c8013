"""Which backend serves a product, what the others answer, and how ``HALO_DISABLE`` switches them off."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from halo_tensor import ops
from halo_tensor.fences.fast_paths import FAST_PATHS
from halo_tensor.kernels.launch import Planned
from halo_tensor.kernels.matmul import backends, cublas, sm80, tma
from halo_tensor.kernels.matmul.pytorch import PyTorchProduct
from halo_tensor.kernels.stand_ins import Memory, StandIn, Unsupported
from halo_tensor.ops.register import body_of
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from halo_tensor.reference import ops as reference
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, INTERPRETED, runs_kernels
from tests.helpers.launches import switch

NAMES = ["few_rows", "cublas", "gluon", "tma", "sm80", "pytorch"]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=7)


@pytest.fixture
def switch_off(monkeypatch):
    with switch(monkeypatch) as switch_off:
        yield switch_off


@pytest.fixture
def answers(monkeypatch):
    """A function that gives the answers on a GPU of some compute capability."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(cublas, "_multiplies", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def answers(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return backends.answers(torch.device("cuda"))

    return answers


def serving(found: dict[str, str | None]) -> dict[str, str]:
    """The backend that serves each format."""
    return dict(name.split(" by ") for name, reason in found.items() if reason is None)


@pytest.mark.skipif(INTERPRETED, reason="nothing is launched")
@pytest.mark.parametrize(
    ("capability", "off", "expected"),
    [
        ((8, 0), (), {"int8": "sm80"}),
        ((8, 9), (), {"int8": "sm80", "fp8_e4m3": "sm80"}),
        ((9, 0), (), {"int8": "gluon", "fp8_e4m3": "cublas"}),
        ((9, 0), ("cublas",), {"int8": "gluon", "fp8_e4m3": "tma"}),
        ((9, 0), ("gluon", "tma"), {"int8": "sm80", "fp8_e4m3": "cublas"}),
        ((10, 0), (), {"int8": "tma", "fp8_e4m3": "tma"}),
        ((12, 0), ("tma",), {"int8": "sm80", "fp8_e4m3": "sm80"}),
        ((12, 0), ("sm80", "tma"), {"int8": "pytorch", "fp8_e4m3": "pytorch"}),
    ],
)
def test_which_backend_serves_a_product(answers, switch_off, capability, off, expected):
    switch_off(*off)
    found = answers(*capability)
    assert serving(found) == expected
    assert list(found) == [f"{format} by {name}" for format in expected for name in NAMES]
    for name, reason in found.items():
        backend = name.partition(" by ")[2]
        assert (reason == "HALO_DISABLE names it") == (backend in off)
        if reason is not None and backend == "pytorch":
            assert reason == f"{expected[name.partition(' by ')[0]]} serves it"


def test_a_backend_that_cannot_be_imported_declines(answers, monkeypatch):
    without = tuple(b._replace(module=None) if b.name == "gluon" else b for b in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", without)
    assert answers(9, 0)["int8 by gluon"] in ("it could not be imported", FAST_PATHS["gluon"].why_off())


def test_every_backend_but_pytorch_has_a_switch():
    assert [backend.name for backend in backends.BACKENDS] == NAMES
    assert {name for name in NAMES if name in FAST_PATHS} == {*NAMES} - {"pytorch"}


@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("off", [("gluon", "cublas"), ("gluon", "cublas", "tma"), ("gluon", "cublas", "tma", "sm80")])
def test_products_without_backends(monkeypatch, switch_off, off, format):
    """Every backend gives the reference's product. Codes are small integers, so sums of their products are exact."""
    served = []
    call = Planned.__call__
    monkeypatch.setattr(
        Planned, "__call__", lambda self, *args: (served.append(self.variant(args[0]).launch), call(self, *args))[1]
    )
    switch_off(*off)
    a, b_t = (torch.randint(-4, 5, (rows, 80), device=DEVICE).float() for rows in (72, 128))
    a, b_t = (t.to(torch.int8 if format is INT8 else torch.float8_e4m3fn) for t in (a, b_t))
    scale, gain, bias = (torch.exp2(torch.randint(-2, 3, (n,), device=DEVICE).float()) for n in (72, 128, 128))
    arguments = a, b_t, scale, None, bias, None, Rotation(64), (72, 128), torch.float32, gain
    y = ops.scaled_mm(*arguments)
    (launch,) = served
    kernel = getattr(launch, "kernel", None)
    if "sm80" in off:
        assert isinstance(launch, PyTorchProduct)
    elif "tma" in off or not tma.has_tma(a.device):
        assert kernel is sm80.mma_kernel
    else:
        assert kernel is tma.scaled_mm_kernel
    torch.testing.assert_close(y, reference.scaled_mm(*arguments), rtol=1e-5, atol=1e-4)
    assert y.abs().mean() > 1


@runs_kernels
def test_a_product_in_pytorch_stays_an_op_in_graphs(switch_off):
    switch_off("gluon", "cublas")
    assert launches(recording := []) is not None and len(recording) == 1
    switch_off("few_rows", "tma", "sm80")
    with pytest.raises(Unsupported):
        launches([])


def launches(recording: list) -> StandIn:
    """Run the op's body as Inductor does."""
    codes = StandIn(recording, Memory((64, 64), (64, 1), torch.int8, torch.device(DEVICE)))
    return body_of("scaled_mm")(codes, codes, None, None, None, [], [], [64, 64], torch.float32, None)
