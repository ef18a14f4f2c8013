"""Small zeroed memory for recordings."""

import threading

import torch

from halo_tensor.kernels import zeros

DEVICE = torch.device("cpu")


def test_each_part_is_handed_out_once(monkeypatch):
    monkeypatch.setattr(zeros, "SIZE", 1024)
    zeros._thread.memory.clear()
    taken = [zeros.take(DEVICE, 5, nbytes) for nbytes in (256, 512, 256, 512)]
    first, *_, last = (tensor for tensor, _ in taken)
    assert [pointer - tensor.data_ptr() for tensor, pointer in taken] == [0, 256, 768, 0]
    assert first is taken[2][0] is not last, "the first memory is used up"
    assert first.shape == (1024,) and not first.any() and not last.any()
    zeros._thread.memory.clear()


def test_streams_and_threads_have_memory_of_their_own():
    zeros._thread.memory.clear()
    found = [zeros.take(DEVICE, stream, 256)[0] for stream in (1, 2, 1)]
    thread = threading.Thread(target=lambda: found.append(zeros.take(DEVICE, 1, 256)[0]))
    thread.start()
    thread.join()
    assert found[0] is found[2] and len({id(tensor) for tensor in found}) == 3
    zeros._thread.memory.clear()
