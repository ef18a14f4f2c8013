"""Pickles of operands that 0.1.0 wrote."""

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
