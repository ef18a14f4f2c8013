"""What ``import halo_tensor`` prints: nothing."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from halo_tensor.fences import pytorch as internals


def test_importing_prints_nothing():
    command = [sys.executable, "-c", "import halo_tensor"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONWARNINGS": ""}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_other_messages_are_printed(caplog):
    """Only the known messages are dropped, only from the loggers that log them, and only during the import."""
    known = [
        ("torchao", "Failed to load /lib/torchao/_C_mxfp8.so: no such symbol"),
        ("torch.utils._pytree", "<enum 'E'> is an Enum subclass and is now natively supported by torch.compile as an opaque"),
    ]
    others = [("torchao", "the GPU is on fire"), ("torch.utils._pytree", "E is already registered"), ("mine", known[0][1])]
    for name in ("torchao", "torch.utils._pytree"):  # PyTorch's own loggers do not propagate to pytest's
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        with internals._without_messages():
            for name, message in [*known, *others]:
                logging.getLogger(name).warning(message)
        assert {(r.name, r.getMessage()) for r in caplog.records} == set(others)
        caplog.clear()
        for name, message in known:
            logging.getLogger(name).warning(message)
        assert {(r.name, r.getMessage()) for r in caplog.records} == set(known)
    finally:
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).removeHandler(caplog.handler)


def test_integers_are_multiplied_without_int_mm(monkeypatch):
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((5, 3000), (3000, 7)))
    expected = internals.multiply_integers(a, b)
    monkeypatch.delattr(torch, "_int_mm")
    found = internals.multiply_integers(a, b)
    assert found.dtype == expected.dtype == torch.int32 and torch.equal(found, expected)
