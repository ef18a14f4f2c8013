"""Fast paths, their switches, and what happens when one fails.

Most fast paths use internals of PyTorch or Triton, which change between versions. For each path there is slower code whose
results are as accurate. If anything goes wrong while a path is prepared, the slower code runs and one warning names the path.
Nothing has been computed by then, so a path never fails half-way.

The environment variable ``HALO_DISABLE`` switches paths off. It holds names of :data:`FAST_PATHS`, separated by commas, for
example ``HALO_DISABLE=gluon,launcher``, and is read once, when the library is imported. The backends of products are among
these names: ``HALO_DISABLE=few_rows,cublas,gluon,tma,sm80`` leaves PyTorch's own products. ``halo_tensor.environment()``
lists the paths, with the reason for each that is off. ``HALO_ENABLE`` switches on those that are off by default.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

#: The first and the last version of each package that the tests ran with.
TESTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9"), "torchao": ("0.17", "0.18")}


class Refusal(RuntimeError):
    """An error that says what the user should change. The slower code would raise it too, so no fast path hides it."""


#: Errors that are not a fast path's fault: a refusal, too little memory, or an earlier kernel that failed.
_NOT_OF_A_PATH = (Refusal, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", Refusal))


class FastPath:
    """A fast path and its state.

    Args:
        name: its name in ``HALO_DISABLE``.
        what: what the path does, for messages.
        cost: what it costs to be without it, for messages.
        package: the package whose internals it uses.
        only_tested: whether it is off under untested versions of that package, because a change there could crash the process
            or give wrong numbers instead of an error.
        by_default: whether it is on unless ``HALO_DISABLE`` names it. Others are on if ``HALO_ENABLE`` names them.

    Attributes:
        disabled: whether ``HALO_DISABLE`` names it.
        enabled: whether ``HALO_ENABLE`` names it, or it is on by default.
        failure: the last error while it was prepared, or None.
    """

    def __init__(self, name: str, what: str, cost: str, package: str, only_tested: bool = False, by_default: bool = True):
        self.name, self.what, self.cost, self.package, self.only_tested = name, what, cost, package, only_tested
        self.disabled, self.enabled = False, by_default
        self.failure: str | None = None
        self._modules: dict[str, ModuleType | None] = {}

    def why_off(self) -> str | None:
        """Return why the path is not used in this process; None if it may be used."""
        if self.disabled:
            return "HALO_DISABLE names it"
        if not self.enabled:
            return f"it is off by default: HALO_ENABLE={self.name} switches it on"
        if installed(self.package) is None:
            return f"{self.package} is not installed"
        if self.only_tested and not is_tested(self.package):
            return f"it was tested with {_tested(self.package)} only"
        return None

    def attempt(self, prepare: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return ``prepare(*args, **kwargs)``; None if the path is off or ``prepare`` raises an error.

        The first error gives a warning. ``prepare`` must leave nothing behind that would make the slower code wrong.

        Raises:
            Refusal, torch.OutOfMemoryError, torch.AcceleratorError: if ``prepare`` does.
        """
        if self.why_off() is not None:
            return None
        try:
            return prepare(*args, **kwargs)
        except _NOT_OF_A_PATH:
            raise
        except Exception as error:
            self.fail(error)
            return None

    def load(self, module: str) -> ModuleType | None:
        """Return a module of the path, imported at the first call; None if that failed, and then it is not tried again."""
        if module not in self._modules:
            self._modules[module] = self.attempt(import_module, module)
        return self._modules[module]

    def fail(self, error: Exception) -> None:
        """Note that the path could not be prepared, and warn if it is the first time."""
        known, self.failure = self.failure, f"{type(error).__name__}: {error}".splitlines()[0]
        if known is None:
            warnings.warn(
                f"halo_tensor: the fast path {self.name!r} ({self.what}) could not be prepared with {self.package} "
                f"{installed(self.package)}: {self.failure}. Results are as accurate without it, but {self.cost}. "
                f"HALO_DISABLE={self.name} switches the path off, and this warning",
                stacklevel=3,
            )

    def state(self) -> str:
        """Return "on", or "off: " and the reason, in which names of files are left out."""
        if (reason := self.why_off()) is not None:
            return f"off: {reason}"
        if self.failure is not None:
            return "off, at least once: " + re.sub(r"\S*[/\\]\S*", "…", self.failure)
        return "on"


GLUON = FastPath(
    "gluon",
    "matrix products in Gluon on GPUs of compute capability 9.0",
    "larger int8 products take 6 to 19 % longer, and those that undo a rotation more",
    "triton",
    only_tested=True,
)
PRECOMPILED = FastPath(
    "precompiled",
    "kernels compiled once for each class of shapes, and launched without Triton's dispatch",
    "a launch costs the CPU some 200 µs instead of 10",
    "triton",
)
LAUNCHER = FastPath(
    "launcher",
    "kernels launched through the C function beneath Triton's launcher",
    "a launch costs the CPU about twice as much",
    "triton",
    only_tested=True,
)
INDUCTOR = FastPath(
    "inductor",
    "kernels launched by the code that Inductor generates",
    "compiled models call ops, each of which costs the CPU some 80 µs",
    "torch",
)
FOREACH = FastPath(
    "foreach",
    "optimisers that write all weights by one op, where they choose so themselves",
    "a step of an optimiser without foreach=True or fused=True takes the CPU several times longer",
    "torch",
)
PRODUCERS = FastPath(
    "producers",
    "elementwise operations computed inside of the quantiser that reads their result",
    "compiled models write these results to memory and read them again",
    "torch",
)
JOINT_GRAPH = FastPath(
    "joint_graph",
    "passes over compiled graphs of forward and backward",
    "compiled models save a byte more for each element that attention returns, and quantise each gradient alone",
    "torch",
)
SAVED = FastPath(
    "saved",
    "8-bit activations in compiled graphs, for configs that ask for them",
    "compiled models save them in high precision, and need the memory for that",
    "torch",
)
AHEAD = FastPath(
    "ahead",
    "kernels of a compiled graph compiled in threads, while PyTorch compiles the graph",
    "the first step of a compiled model takes longer",
    "triton",
    by_default=False,  # the threads were not run on a GPU yet
)
FEW_ROWS = FastPath(
    "few_rows",
    "matrix products of at most 64 rows, as in generation, in Triton",
    "they take 1.1 to 3.2 times as long",
    "triton",
)
CUBLAS = FastPath(
    "cublas",
    "cuBLAS for large fp8 products on GPUs of compute capability 9.0",
    "these products take 3 to 15 % longer",
    "torch",
)
TMA = FastPath(
    "tma",
    "matrix products in Triton on GPUs with TMA, of compute capability 9.0 and newer",
    "they run as on older GPUs, and slower",
    "triton",
)
SM80 = FastPath(
    "sm80",
    "matrix products in Triton on GPUs of compute capability 8.0 to 8.9, and on newer ones without 'tma'",
    "they run in plain PyTorch, several times slower",
    "triton",
)
DERIVED = FastPath(
    "derived",
    "a search of compiled graphs for products with values computed from converted weights",
    "such a product runs in high precision without a warning",
    "torch",
)
_PATHS = (
    GLUON, PRECOMPILED, LAUNCHER, INDUCTOR, FOREACH, PRODUCERS, JOINT_GRAPH, SAVED, AHEAD, FEW_ROWS, CUBLAS, TMA, SM80,
    DERIVED,
)  # fmt: skip
FAST_PATHS = {path.name: path for path in _PATHS}


def _switch(variable: str, attribute: str) -> None:
    """Set an attribute of the paths that an environment variable names."""
    for name in filter(None, map(str.strip, os.environ.get(variable, "").split(","))):
        if name not in FAST_PATHS:
            raise ValueError(f"{variable}: there is no fast path {name!r}; there are {', '.join(FAST_PATHS)}")
        setattr(FAST_PATHS[name], attribute, True)


_switch("HALO_DISABLE", "disabled")
_switch("HALO_ENABLE", "enabled")


def disabled() -> list[str]:
    """Return the names of the paths that are switched off."""
    return [path.name for path in FAST_PATHS.values() if path.disabled]


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    module = sys.modules.get(package)
    if isinstance(found := getattr(module, "__version__", None), str):
        return str(found)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the major and the minor number of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def is_tested(package: str) -> bool:
    """Whether the installed version of a package is one that the tests ran with."""
    first, last = TESTED[package]
    found = installed(package)
    return found is not None and _numbers(first) <= _numbers(found) <= _numbers(last)


def _tested(package: str) -> str:
    return f"{package} {' to '.join(TESTED[package])}"


@cache
def warn_of_untested_versions() -> None:
    """Give one warning that names the packages in untested versions and the fast paths that are off because of them."""
    untested = [package for package in TESTED if installed(package) is not None and not is_tested(package)]
    if not untested:
        return
    off = [path for path in FAST_PATHS.values() if path.only_tested and path.package in untested and not path.disabled]
    found = ", ".join(f"{package} {installed(package)}" for package in untested)
    message = f"halo_tensor was tested with {', '.join(map(_tested, untested))}, but {found} is installed."
    if off:
        message += f" Off for that reason: {'; '.join(f'{path.name} ({path.what}): {path.cost}' for path in off)}."
    warnings.warn(f"{message} halo_tensor.environment() lists the fast paths", stacklevel=3)
