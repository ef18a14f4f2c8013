"""Small zeroed memory for recordings, a part of a larger one that one launch has filled.

Quantisers raise magnitudes in zeroed memory, of a few bytes if one scale serves a matrix. Filling it is a launch, which takes
the CPU as long as any other. Each part is handed out once. When all are, new memory is allocated; the old one is freed as
any other tensor of the stream is, after the launches that use it.
"""

import threading

import torch

#: The bytes that one launch fills, and the most that are taken of them at once.
SIZE, LARGEST = 2**20, 2**14


class _Memory:
    """Memory of which the bytes from ``used`` on are zero."""

    __slots__ = ("pointer", "tensor", "used")

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.pointer, self.used = tensor, tensor.data_ptr(), 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[int | None, int], _Memory] = {}


_thread = _Thread()


def take(device: torch.device, stream: int, nbytes: int) -> tuple[torch.Tensor, int]:
    """Return zeroed memory for launches on the current stream: a tensor to be held until they are made, and an address in it.

    No graph may be captured: its replays would not fill the memory again.

    Args:
        device: the current one.
        stream: its current stream.
        nbytes: at most LARGEST, a multiple of the alignment that launches need.
    """
    key = device.index, stream
    memory = _thread.memory.get(key)
    if memory is None or memory.used + nbytes > SIZE:
        memory = _thread.memory[key] = _Memory(torch.zeros(SIZE, dtype=torch.uint8, device=device))
    start = memory.used
    memory.used = start + nbytes
    return memory.tensor, memory.pointer + start
