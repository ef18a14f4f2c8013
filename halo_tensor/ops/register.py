"""Declare ops of ``torch.ops.halo``: each is one typed function, and its signature gives everything else.

::

    @op("rotate")
    def rotate(x: Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None) -> Tensor: ...


    @fake("rotate")
    def _(x: Tensor, row_rotation: Rotation | None, column_rotation: Rotation | None) -> Tensor: ...

:func:`op` defines the schema, registers the body for every device and returns the function that callers use. That function
takes rotations, formats and layouts of scales as objects. The dispatcher passes lists of integers and strings, and the body
gets objects again. :func:`fake` registers what a compiler computes with: shapes, dtypes and strides.

``torch.library.custom_op`` does the same for fewer types. It has no types of its own, infers ``SymInt[]`` where launches need
integers, and adds microseconds to each call.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from halo_tensor.recipe import FORMATS, Format, Gate, Rotation, Scales

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("halo", "DEF")

#: Called with the device of an op whenever one is traced. :mod:`halo_tensor.compiler` adds what prepares a compiler.
WHEN_TRACED: list[Callable[[torch.device], None]] = []


def encode(rotation: Rotation | None) -> list[int]:
    """Return a rotation as integers: [] for None, [block, seed], with seed −1 for no signs, or [block, seed, rank]."""
    if rotation is None:
        return []
    code = [rotation.edge, -1 if rotation.seed is None else rotation.seed]
    return code if rotation.rank is None else [*code, rotation.rank]


def decode(code: Sequence[int]) -> Rotation | None:
    """Return the rotation that :func:`encode` wrote as ``code``."""
    return _rotation(*code) if code else None


@lru_cache(maxsize=256)
def _rotation(block: int, seed: int, rank: int | None = None) -> Rotation:
    return Rotation(block, None if seed < 0 else seed, rank)


def _name(format: Format) -> str:
    return format.name


#: How the dispatcher declares a parameter of each type.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    Rotation | None: "int[]",
    Format: "str",
    Scales: "str",
    Gate: "str",
    str: "str",
    int: "SymInt",
    bool: "bool",
    Sequence[int]: "SymInt[]",
    Sequence[float]: "float[]",
    torch.dtype: "ScalarType",
}
#: How values cross the dispatcher, if not as they are: type -> (to its representation, and back).
_CONVERSIONS: dict[Any, tuple[Callable, Callable]] = {
    Rotation | None: (encode, decode),
    Format: (_name, FORMATS.__getitem__),
    Scales: (str, Scales.of),
    Gate: (str, Gate.of),
}


class _Declared(NamedTuple):
    """An op: the names of its parameters, and its body, which takes the values that the dispatcher passes."""

    names: tuple[str, ...]
    decoders: tuple[tuple[int, Callable], ...]
    body: Callable[..., Any]


_OPS: dict[str, _Declared] = {}


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare ``torch.ops.halo.<name>`` by a function.

    Args:
        name: of the op.
        mutates: the parameters, tensors or lists of tensors, that the body writes to.

    Returns:
        A decorator. The decorated function calls the op; the function itself becomes the op's implementation on every
        device, and asks ``runs_kernels(device)`` whether to launch kernels. Rotations and formats must be passed by position.
        Parameters of an op have no defaults, and those of the function are filled in before the dispatcher is called.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = [*signature.parameters.values()]
        # Strides reach the kernels as a graph was traced with them: a transposed matrix of codes must stay one.
        LIBRARY.define(_schema(name, signature, mutates), tags=(torch.Tag.needs_exact_strides,))
        converted = [(i, *_CONVERSIONS[p.annotation]) for i, p in enumerate(parameters) if p.annotation in _CONVERSIONS]
        encoders = tuple((i, encoder) for i, encoder, _ in converted)
        decoders = tuple((i, decoder) for i, _, decoder in converted)
        defaults = [(i, p.name, p.default) for i, p in enumerate(parameters) if p.default is not p.empty]
        count, overload = len(parameters), getattr(torch.ops.halo, name).default

        def body(*args: Any) -> R:
            return function(*_decoded(decoders, args))  # type: ignore[call-arg]

        # This runs in every eager call, so it does no more than it must. Dynamo traces it.
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given: list[Any] = [*args]
            for i, encoder in encoders:
                given[i] = encoder(given[i])
            if len(given) < count:
                kwargs = {name: value for i, name, value in defaults if i >= len(given)} | kwargs  # type: ignore[assignment]
            return overload(*given, **kwargs)

        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        _OPS[name] = _Declared(tuple(signature.parameters), decoders, body)
        if signature.return_annotation is None:
            fake(name)(lambda: None)
        return call

    return declare


def _schema(name: str, signature: inspect.Signature, mutates: tuple[str, ...]) -> str:
    """Return the schema of an op, as the dispatcher reads it."""
    declared, aliases = [], iter("abcdef")
    for parameter in signature.parameters.values():
        kind = _SCHEMA_TYPES[parameter.annotation]
        if parameter.name in mutates:
            kind = kind.replace("Tensor", f"Tensor({next(aliases)}!)")
        declared.append(f"{kind} {parameter.name}")
    returned = signature.return_annotation
    results = () if returned is None else get_args(returned) or (returned,)
    return f"{name}({', '.join(declared)}) -> ({', '.join(_SCHEMA_TYPES[result] for result in results)})"


def _decoded(decoders: tuple[tuple[int, Callable], ...], args: tuple) -> list[Any]:
    """Return what the dispatcher passes with its rotations and formats as objects."""
    given = [*args]
    for i, decoder in decoders:
        given[i] = decoder(given[i])
    return given


def fake(name: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Register how the results of ``torch.ops.halo.<name>`` look: shapes, dtypes and strides, for a compiler.

    The decorated function names, in any order, those parameters of the op that it needs. An op that returns nothing has its
    fake implementation already.
    """

    def register(function: Callable[..., R]) -> Callable[..., R]:
        declared = _OPS[name]
        needed = [declared.names.index(parameter) for parameter in inspect.signature(function).parameters]

        def run(*args: Any) -> R:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            for prepare in WHEN_TRACED:
                prepare(first.device)
            given = _decoded(declared.decoders, args)
            return function(*(given[i] for i in needed))

        torch.library.register_fake(f"halo::{name}", run, lib=LIBRARY)
        return function

    return register


def body_of(name: str) -> Callable[..., Any]:
    """Return the implementation of ``torch.ops.halo.<name>``, which takes arguments as the dispatcher passes them."""
    return _OPS[name].body
