"""Fast paths fall back, with one warning, whatever goes wrong while they are prepared. tests/integration/test_aot.py has those of a GPU."""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import nn
from torch._inductor import config, lowering
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention, silu

import halo_tensor
from halo_tensor import environment, halo_config, quantize_
from halo_tensor.compiler import inductor, joint_graph
from halo_tensor.fences import fast_paths as fences
from halo_tensor.fences.fast_paths import FAST_PATHS, INDUCTOR, JOINT_GRAPH, PRODUCERS, FastPath, Refusal
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.generated_code import lowered_again
from tests.helpers.interpreter import DEVICE, INTERPRETED, runs_kernels
from tests.helpers.recording import OpLog

ERRORS = [AttributeError, TypeError, RuntimeError]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=30)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    for path in FAST_PATHS.values():
        monkeypatch.setattr(path, "failure", None)
        monkeypatch.setattr(path, "_modules", {})


@contextmanager
def warned():
    """The texts of this library's warnings."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if "halo_tensor" in str(w.message)]


def raising(error):
    def broken(*args, **kwargs):
        raise error("broken on purpose")

    return broken


# A path by itself.


@pytest.mark.parametrize("error", [*ERRORS, ImportError, KeyError, AssertionError, NotImplementedError])
def test_whatever_goes_wrong_is_one_warning(error):
    path = FastPath("pony", "launches on horseback", "they go on foot", "torch")
    with warned() as texts:
        assert path.attempt(lambda x: x + 1, 2) == 3 and path.state() == "on"
        assert path.attempt(raising(error)) is None and path.attempt(raising(error)) is None
    (text,) = texts
    for part in ("'pony'", "on horseback", "on foot", f"torch {torch.__version__}", error.__name__, "HALO_DISABLE=pony"):
        assert part in text
    assert path.state().startswith("off, at least once: ") and error.__name__ in path.state()
    assert path.attempt(lambda: 5) == 5, "what can be prepared is"


@pytest.mark.parametrize("error", [Refusal, torch.OutOfMemoryError, torch.AcceleratorError, KeyboardInterrupt])
def test_what_is_not_the_paths_fault_surfaces(error):
    path = FastPath("pony", "", "", "torch")
    with warned() as texts, pytest.raises(error):
        path.attempt(raising(error))
    assert not texts and path.state() == "on"


def test_a_module_is_imported_once():
    path = FastPath("pony", "", "", "torch")
    with warned() as texts:
        assert path.load("halo_tensor.no_such_module") is path.load("halo_tensor.no_such_module") is None
        assert path.load("halo_tensor.recipe") is halo_tensor.recipe
    assert len(texts) == 1 and "No module named" in texts[0]


def test_a_state_names_no_files():
    path = FastPath("pony", "", "", "torch")
    with warned():
        path.fail(OSError("cannot open /home/someone/lib.so"))
    assert path.state() == "off, at least once: OSError: cannot open …"


def test_paths_are_switched_off(monkeypatch):
    for path in FAST_PATHS.values():
        monkeypatch.setattr(path, "disabled", False)
    monkeypatch.setenv("HALO_DISABLE", " gluon, joint_graph,")
    fences._switch("HALO_DISABLE", "disabled")
    assert fences.disabled() == ["gluon", "joint_graph"]
    assert JOINT_GRAPH.attempt(raising(AssertionError)) is None, "nothing is tried, and nobody warned"
    assert environment()["fast paths"]["joint_graph"] == "off: HALO_DISABLE names it"
    assert "fast path joint_graph: off: HALO_DISABLE names it" in str(environment())
    monkeypatch.setenv("HALO_DISABLE", "glue")
    with pytest.raises(ValueError, match="HALO_DISABLE: there is no fast path 'glue'; there are gluon, precompiled, launcher"):
        fences._switch("HALO_DISABLE", "disabled")


def test_paths_are_switched_on(monkeypatch):
    """Those that are off by default."""
    off = [name for name, path in FAST_PATHS.items() if not path.enabled]
    assert off == ["ahead"] and fences.AHEAD.state() == "off: it is off by default: HALO_ENABLE=ahead switches it on"
    assert fences.AHEAD.attempt(raising(AssertionError)) is None
    monkeypatch.setattr(fences.AHEAD, "enabled", False)
    monkeypatch.setenv("HALO_ENABLE", "ahead")
    fences._switch("HALO_ENABLE", "enabled")
    assert fences.AHEAD.why_off() is None


@pytest.mark.skipif(INTERPRETED, reason="the same process once more")
def test_the_environment_variable_is_read():
    code = "import halo_tensor; print(halo_tensor.environment()['fast paths']['launcher'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HALO_DISABLE": "launcher"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "off: HALO_DISABLE names it\n", done.stderr


def test_environment_says_why_a_path_is_off(monkeypatch):
    states = environment()["fast paths"]
    assert set(states) == set(FAST_PATHS) and states["joint_graph"] == "on"
    if not torch.cuda.is_available():
        assert states["gluon"] == "off: no GPU of compute capability 9.0" and states["launcher"] == "off: no CUDA device"
        for name in ("inductor", "tma", "sm80"):
            assert states[name] == ("on" if INTERPRETED else "off: no device that runs kernels")
    monkeypatch.setattr(JOINT_GRAPH, "_modules", {})
    monkeypatch.setitem(sys.modules, "halo_tensor.compiler.joint_graph", None)
    with warned():
        assert environment()["fast paths"]["joint_graph"].startswith("off, at least once: ModuleNotFoundError: ")


# Versions.


def versions(monkeypatch, **found):
    known = fences.installed
    monkeypatch.setattr(fences, "installed", lambda package: found.get(package, known(package)))
    fences.warn_of_untested_versions.cache_clear()


def test_an_untested_version_is_one_notice(monkeypatch):
    versions(monkeypatch, torch="2.16.0.dev20270101+cu130", triton="3.10.0")
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    with warned() as texts:
        quantize_(model, halo_config(1, "int8"))
        quantize_(model, halo_config(2, "int8"))
    (text,) = texts
    for part in (
        "torch 2.11 to 2.15, triton 3.6 to 3.9",
        "triton 3.10.0 is installed",
        "gluon (",
        "launcher (",
        "twice as much",
    ):
        assert part in text
    assert fences.LAUNCHER.why_off() == fences.GLUON.why_off() == "it was tested with triton 3.6 to 3.9 only"
    assert INDUCTOR.why_off() is None, "where a change would be an error, not a crash"
    fences.warn_of_untested_versions.cache_clear()


@pytest.mark.parametrize(("torch", "triton"), [("2.11.0", "3.6.0"), ("2.13.0+cpu", None), ("2.15.1", "3.9.2")])
def test_tested_versions_are_no_notice(monkeypatch, torch, triton):
    versions(monkeypatch, torch=torch, triton=triton, torchao="0.18.0")
    with warned() as texts:
        fences.warn_of_untested_versions()
    assert not texts
    assert fences.LAUNCHER.why_off() == (None if triton else "triton is not installed")
    fences.warn_of_untested_versions.cache_clear()


# The core, with each path broken: what is converted trains, in eager mode and compiled, to the same numbers.


class Block(nn.Module):
    """What every path has something to do for: attention, whose result is saved, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.v, self.o, self.gate, self.up, self.down = (nn.Linear(128, 128, bias=False) for _ in range(5))

    def forward(self, x):
        v = self.v(x).unflatten(-1, (2, 64)).transpose(1, 2)
        x = x + self.o(scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))
        return x + self.down(silu(self.gate(x)) * self.up(x))


def train(compile: bool) -> tuple[list[torch.Tensor], int]:
    """A step of a converted block: its output, the gradients and the weights; and how many ops the generated code calls."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Block().to(DEVICE, torch.bfloat16)
    quantize_(model, halo_config(1, "int8"))
    x = torch.randn(1, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        y = (torch.compile(model, fullgraph=True) if compile else model)(x)
        y.float().pow(2).mean().backward()
        return y.detach()

    if compile:
        with lowered_again():
            y, code = run_and_get_code(step)
        lines = [line for source in code for line in source.splitlines() if not line.lstrip().startswith("#")]
        ops = sum("torch.ops.halo." in line for line in lines)
    else:
        with OpLog() as log:
            y, ops = step(), 0
        assert len(log.products()) == 14, "three of each layer, but of the first no E_X"
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return [y, *gradients, *(p.master.detach().clone() for p in model.parameters())], ops


@pytest.fixture(scope="module")
def whole():
    """What is computed with every path on."""
    with warned() as texts:
        eager, (compiled, ops) = train(False)[0], train(True)
    assert not texts and ops == 0
    # Where producers hand values on in float32, they are not rounded to bfloat16 first.
    assert all(relative_error(a, b) < 0.05 for a, b in zip(compiled, eager, strict=True))
    return compiled


def no_lowerings(patch, error):
    for op in ("rotate_quantize", "quantize_both", "quantize_pair", "quantize_pairs", "scaled_mm", "rotate", "unrotate"):
        patch.delitem(lowering.lowerings, getattr(torch.ops.halo, op).default, raising=False)
    patch.setitem(sys.modules, "halo_tensor.compiler.inductor", None)


def every_fifth(patch, error):
    """In the midst of an op's launches: what was added to the graph must be taken out again."""
    template, calls = inductor._Call._template, count(1)
    patch.setattr(
        "halo_tensor.compiler.inductor._Call._template",
        lambda *args: raising(error)() if next(calls) % 5 == 0 else template(*args),
    )


def half_way(patch, error):
    """The graph is rewritten already when the pass fails: it must be another one than what runs."""
    split = joint_graph._split
    patch.setattr(joint_graph, "_split", lambda *args: (split(*args), raising(error)()))


def attribute(name: str):
    return lambda patch, error: patch.setattr(name, raising(error))


def module(name: str):
    return lambda patch, error: patch.setitem(sys.modules, name, None)


LOWERINGS = {
    "the import": (INDUCTOR, no_lowerings, AttributeError),
    "a tensor": (INDUCTOR, attribute("halo_tensor.compiler.stand_ins.StandIn.of"), TypeError),
    "the result": (INDUCTOR, attribute("torch._inductor.ir.MutationOutput"), RuntimeError),
    "a launch among others": (INDUCTOR, every_fifth, AttributeError),
    "the producers' import": (PRODUCERS, module("halo_tensor.compiler.producers"), TypeError),
    "a producer": (PRODUCERS, attribute("halo_tensor.compiler.producers._Writer.load"), RuntimeError),
}
GRAPHS = {
    "the import": (module("halo_tensor.compiler.joint_graph"), AttributeError),
    "whether it is one": (attribute("halo_tensor.compiler.is_compiled"), TypeError),
    "the settings": (attribute("halo_tensor.compiler.joint_graph.install"), RuntimeError),
    "half-way": (half_way, AttributeError),
}


def check(whole: list[torch.Tensor], path: FastPath) -> int:
    with warned() as texts:
        results, ops = train(True)
    assert len(texts) == 1 and f"fast path {path.name!r}" in texts[0] and path.state().startswith("off, at least once")
    errors = [relative_error(a, b) for a, b in zip(results, whole, strict=True)]
    assert max(errors) < 0.05 and errors[0] < 0.01
    return ops


@runs_kernels
@pytest.mark.parametrize("where", LOWERINGS)
def test_with_a_lowering_broken(whole, monkeypatch, where):
    path, break_, error = LOWERINGS[where]
    break_(monkeypatch, error)
    assert (check(whole, path) > 0) == (path is INDUCTOR)


@runs_kernels
@pytest.mark.parametrize("where", GRAPHS)
def test_with_the_joint_graph_broken(whole, monkeypatch, where):
    break_, error = GRAPHS[where]
    with config.patch(joint_custom_post_pass=None):
        break_(monkeypatch, error)
        check(whole, JOINT_GRAPH)


def test_what_is_written_too_late_says_what_helps(monkeypatch):
    call = inductor._Call.__new__(inductor._Call)
    with pytest.raises(RuntimeError, match="set the environment variable HALO_DISABLE=inductor"):
        call.codegen(None)
