"""DeepSpeed is refused with one error. What trainers do is in tests/integration/test_trainer.py."""

import pytest

from tests.helpers.training import make

deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")


def test_deepspeed_refuses_a_converted_model():
    model = make(converted=True)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    for args, kwargs in [((), {"model": model}), ((None, model), {})]:
        with pytest.raises(ValueError, match="DeepSpeed replaces and flattens parameters .* train it with FSDP2"):
            deepspeed.initialize(*args, **kwargs, config=config)
    refusing = deepspeed.initialize
    make(converted=True)
    assert deepspeed.initialize is refusing, "it is wrapped once"


def test_the_callback_refuses_deepspeed(tmp_path):
    from types import SimpleNamespace

    from halo_tensor.transformers import HaloCallback

    with pytest.raises(ValueError, match="DeepSpeed"):
        HaloCallback("int8").on_init_end(SimpleNamespace(deepspeed="zero.json"), None, None, model=make(converted=False))
