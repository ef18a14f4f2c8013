"""What ``import halo_tensor`` prints: nothing."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("has_instruction", [True, False])
def test_integers_are_multiplied_exactly(monkeypatch, has_instruction):
    a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((5, 3000), (3000, 7)))
    expected, called, multiply = torch._int_mm(a, b), [], torch._int_mm
    monkeypatch.setattr(internals, "_multiplies_integers", lambda: has_instruction)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: called.append(a) or multiply(a, b))
    found = internals.multiply_integers(a, b)
    assert found.dtype == expected.dtype == torch.int32 and torch.equal(found, expected)
    assert len(called) == has_instruction
    monkeypatch.delattr(torch, "_int_mm")
    assert torch.equal(internals.multiply_integers(a, b), expected)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (16, 24, 32), (17, 9, 8), (40, 100, 33)])
def test_integers_are_multiplied_with_padding(monkeypatch, size):
    """On a GPU ``_int_mm`` refuses other sizes."""
    m, k, n = size
    a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8).t()
    sizes = []
    multiply = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: sizes.append((*a.shape, b.shape[1])) or multiply(a, b))
    found = internals._multiply_padded(a, b)
    assert found.dtype == torch.int32 and torch.equal(found.double(), a.double() @ b.double())
    ((rows, depth, columns),) = sizes
    assert rows > 16 and depth % 8 == columns % 8 == 0 and (rows, depth, columns) <= (max(m, 17), k + 7, n + 7)
