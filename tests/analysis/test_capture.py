"""Which rows are sampled."""

import torch

from halo_tensor.analysis.capture import evenly_spaced


def test_rows_are_evenly_spaced():
    assert evenly_spaced(10, 4, torch.device("cpu")).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4, torch.device("cpu")).tolist() == [0, 1, 2] and not len(evenly_spaced(0, 4, torch.device("cpu")))
