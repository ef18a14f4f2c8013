"""FSDP2 in eager code: gathered weights take the eager path, and an optimiser's step quantises all shards in one launch.

The ranks run Triton's interpreter on a CPU, in a process that has chosen it; see tests/helpers/interpreter.py.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from halo_tensor import halo_config, hot_config, quantize_
from halo_tensor.kernels.launch import Launch
from halo_tensor.products import eager, eager_backward
from halo_tensor.weight.requantize import requantize_all
from halo_tensor.weight.sharded_parameters import shard_of
from tests.helpers import interpreter
from tests.helpers.interpreter import INTERPRETED, runs_the_others
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded import shard

interpreted = pytest.mark.skipif(not INTERPRETED, reason="see test_in_the_interpreter")


@runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=4)


def model_of(dtype: str) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False))
    quantize_(model, halo_config(1, dtype, min_features=0), filter_fn=lambda *_: True)
    return model


def train(model: nn.Module, steps: int = 3) -> tuple[list[float], list[str]]:
    """Return the losses, and the names of the kernels that the optimiser launched in its last step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    x, launched, call = torch.randn(4, 64, generator=torch.Generator().manual_seed(7)), [], Launch.__call__

    def noting(self, sizes, *tensors):
        launched.append(self.kernel.fn.__name__)
        call(self, sizes, *tensors)

    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        launched.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "__call__", noting)
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, launched


@on_ranks(2)
@interpreted
@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp6"])
def test_gathered_weights_take_the_eager_path(world, dtype):
    """The same batch on every rank, so that each rank's loss is that of one process."""
    alone, _ = train(model_of(dtype))
    model, made, linear = shard(model_of(dtype)), [], eager.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "linear", lambda *args: (made.append((args[1], linear(*args))), made[-1][1])[1])
        losses, launched = train(model)
    assert len(made) == 3 * 3 and all(y is not None for _, y in made)
    assert all(weight.is_gathered and weight.operand.is_packed == (dtype == "fp6") for weight, _ in made)
    # The interpreter multiplies fp8 codes in float32. On some CPUs the last bit depends on where operands lie in memory.
    assert losses == pytest.approx(alone, rel=1e-6) and losses[0] != losses[1] != losses[2]
    assert losses == alone or dtype != "int8"
    assert launched.count("whole_rows_of_many") == 1, "two weights with rows of 64"
    assert "pack_kernel" not in launched or dtype == "fp6"


@on_ranks(2)
@interpreted
def test_gathered_weights_of_hot_take_the_eager_path(world):
    """FSDP2 sends the master, which backward quantises."""

    def model_of_hot() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 16))
        quantize_(model, hot_config(rounding="nearest", min_features=0), filter_fn=lambda *_: True)
        return model

    alone, _ = train(model_of_hot(), 2)
    made, linear = [], eager_backward.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_backward, "linear", lambda *args: (made.append((args[1], linear(*args))), made[-1][1])[1])
        losses, launched = train(shard(model_of_hot()), 2)
    assert len(made) == 2 and all(weight.is_gathered and y is not None for weight, y in made) and not launched
    assert losses == pytest.approx(alone, rel=1e-6) and losses[0] != losses[1]


@on_ranks(2)
@interpreted
def test_fp6_shards_are_packed_by_the_launch_that_quantises_them(world):
    model = shard(model_of("fp6"))
    shards = [shard_of(layer.weight) for layer in (model[0], model[1])]
    before, launched, call = [s.operand.codes.clone() for s in shards], [], Launch.__call__
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for s in shards:
            s.master.mul_(-1)
        patch.setattr(Launch, "__call__", lambda self, *args: (launched.append(self.kernel.fn.__name__), call(self, *args)))
        requantize_all([(s, s.master) for s in shards])
    assert launched == ["whole_rows_of_many"]
    for s, codes in zip(shards, before, strict=True):
        assert s.operand.is_packed and not torch.equal(s.operand.codes, codes)
