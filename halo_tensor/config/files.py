"""The JSON file of :class:`LayerConfigs`. Files of every earlier version are read.

``{"version": 1, "layers": {name: {"_type": "HaloConfig", "_version": 1, "_data": {field: value}}}, "measured": {name: {…}}}``.
Each config is written as torchao's ``config_to_dict`` writes it. 0.1.0 wrote no "version".
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torchao.core.config import config_to_dict

from halo_tensor.config.base import LinearConfig
from halo_tensor.config.halo import HaloConfig
from halo_tensor.config.methods import METHODS
from halo_tensor.fences.pytorch import ALLOWED_AO_MODULES

_FILE_VERSION = 1

# torchao's config_from_dict finds the classes in these modules.
ALLOWED_AO_MODULES.add("halo_tensor")


def write(path: Path, layers: dict[str, LinearConfig], measured: dict[str, dict[str, float]]) -> None:
    """Write configs and figures of layers."""
    configs = {name: config_to_dict(config) for name, config in layers.items()}
    record = {"version": _FILE_VERSION, "layers": configs, "measured": measured}
    path.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, LinearConfig], dict[str, dict[str, float]]]:
    """Return the configs and figures that a file holds.

    Raises:
        ValueError: see :meth:`LayerConfigs.load`.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, which LayerConfigs.save writes: {error}") from None
    _check_keys(record, str(path), {"layers"}, {"version", "layers", "measured"})
    if (version := record.get("version", 1)) != _FILE_VERSION:
        raise ValueError(
            f"{path} is of version {version!r}, and this halo_tensor reads version {_FILE_VERSION}: read it with the one "
            "that wrote it, or calibrate again"
        )
    for key in ("layers", "measured"):
        if not isinstance(record.get(key, {}), dict):
            raise ValueError(f"{path}: {key!r} must be an object with a value for each layer")
    layers = {name: _config(config, f"{path}, layer {name!r}") for name, config in record["layers"].items()}
    return layers, record.get("measured", {})


def _config(record: Any, where: str) -> LinearConfig:
    """The config that ``record`` holds. Errors begin with ``where``."""
    _check_keys(record, where, {"_type", "_data"}, {"_type", "_version", "_data"})
    methods = {method.__name__: method for method in METHODS}
    method = methods.get(record["_type"])
    if method is None:
        raise ValueError(f"{where}: _type must be one of {', '.join(methods)}; got {record['_type']!r}")
    if (version := record.get("_version", 1)) != method.version:
        raise ValueError(
            f"{where}: a {method.__name__} of _version {version!r}, and this halo_tensor reads _version {method.version}: "
            "read it with the one that wrote it"
        )
    names = {f.name for f in fields(method)} | method.renamed.keys()
    required = {f.name for f in fields(method) if f.default is MISSING}
    if method is HaloConfig:
        required.add("dtype")  # its default was another in 0.1.0, which wrote every field: a file without was made by hand
    _check_keys(record["_data"], where, required, names)
    try:
        return method(**method.present_fields(record["_data"]))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_keys(record: Any, where: str, required: set[str], known: set[str]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(sorted(known))}; got {record!r:.80}")
    if unknown := sorted(record.keys() - known):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; this halo_tensor knows {', '.join(sorted(known))}")
    if missing := sorted(required - record.keys()):
        raise ValueError(f"{where}: the field {missing[0]!r} is missing")
