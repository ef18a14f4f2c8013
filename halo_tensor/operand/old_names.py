"""Names of 0.1.0: in pickles of operands, and as keywords and attributes that are deprecated until 0.4."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from halo_tensor.recipe import UNIT, Scales


def present_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a pickled operand under their present names."""
    if "scale_along" not in state:
        return state
    granularity = "32x32" if state["scale_along"] == "block" else state["scale_along"]
    return state | {
        "granularity": UNIT if state["scale"] is None else Scales.of(granularity),
        "row_rotation": state["left"],
        "column_rotation": state["right"],
        "gain_axis": f"{state['gain_along']}s" if state.get("gain_along") else None,
    }


#: The names of 0.1.0 -> the present ones.
_RENAMED = {"scale": "granularity", "left": "row_rotation", "right": "column_rotation"}


def _warn(old: str, new: str) -> None:
    message = f"HadamardQuantTensor: {old} is called {new} now, and the old name goes in halo_tensor 0.4"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def accepts_old_names(function: Callable) -> Callable:
    """Decorate a constructor: keywords of 0.1.0 are passed on under their present names, with a warning."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        for old in _RENAMED.keys() & options.keys():
            _warn(old, _RENAMED[old])
            value = options.pop(old)
            options[_RENAMED[old]] = "32x32" if value == "block" else value
        return function(*args, **options)

    return run


def old_attribute(old: str, new: str) -> Any:
    """Return a property that reads an attribute by its name of 0.1.0, with a warning."""

    def read(operand: Any) -> Any:
        _warn(old, new)
        value = getattr(operand, new)
        return value.name if new == "granularity" else value

    return property(read, doc=f"The name of ``{new}`` in 0.1.0; deprecated.")
