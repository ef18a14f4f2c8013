"""The function that repeats a recording: which calls it makes, with which arguments. Kernels are functions that note them."""

import pytest
import torch

pytest.importorskip("triton")

from halo_tensor.fences.triton_launch import Bound, Encoded
from halo_tensor.kernels import repeating
from halo_tensor.kernels.launch import SizedLaunch
from halo_tensor.kernels.repeating import Argument, Program

DEVICE, STREAM = torch.device("cpu", 0), 77


class Noting(SizedLaunch):
    """A launch that can be called with tensors, and bound. Both note what they get."""

    def __init__(self, calls: list, described: int = 0, spread: bool = True):
        self.calls, self.described, self.spread, self.encoded = calls, described, spread, []

    def __call__(self, *tensors):
        self.calls.append(("tensors", [t.data_ptr() for t in tensors], [(t.shape, t.stride(), t.dtype) for t in tensors]))

    def bound(self):
        def encode(pointer):
            self.encoded.append(pointer)
            return "descriptor of", pointer

        function = lambda *args: self.calls.append(args)  # noqa: E731
        return Bound(function, (3, 2, 1), ("head",), [Encoded(encode) for _ in range(self.described)], (5, 6), self.spread)


def argument(storage: int, offset: int = 0, shape=(4,), dtype=torch.float32) -> Argument:
    return Argument(storage, offset, shape, (1,) * len(shape), dtype)


def program(calls: list, n: int = 64, **how) -> Program:
    """Two arguments, the second of which is not read; two results with None between them; a temporary; a constant."""
    constant = torch.ones(4)
    launches = [
        (Noting(calls, **how), (argument(0), argument(2), argument(4, 256))),
        (Noting(calls), (argument(4, 256), argument(3, dtype=torch.int8), argument(0, 32), argument(5))),
    ]
    results = [((n,), (1,), torch.float32), None, ((n, 2), (2, 1), torch.int8)]
    made = Program(DEVICE, 2, results, 512, [constant], launches)
    made.constant = constant
    return made


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The current device and its stream, as they are on a GPU. Returns what sets the device."""
    current = [0]
    monkeypatch.setattr(repeating, "current_device", lambda: current[0])
    monkeypatch.setattr(repeating, "current_raw_stream", lambda index: STREAM + index)
    return current


@pytest.mark.parametrize("spread", [True, False])
def test_calls_of_the_c_function(spread):
    calls: list = []
    repeated, x = program(calls, described=1, spread=spread), torch.randn(16)
    (one, two), at = [step.launch for step in repeated.steps], x.data_ptr()
    for _ in range(4):
        calls.clear()
        first, nothing, second = repeated.repeat(x, None)
        assert nothing is None and first.shape == (64,) and second.shape == (64, 2) and second.dtype == torch.int8
        (*before, arguments), last = (calls[0] if not spread else (*calls[0][:5], calls[0][5:])), calls[1]
        assert before == [3, 2, 1, STREAM, "head"] and last[:5] == (3, 2, 1, STREAM, "head")
        described, pointer, of_first, temporary, *tail = arguments
        assert (described, pointer, of_first, tail) == ("descriptor of", at, first.data_ptr(), [5, 6])
        assert last[5:] == (temporary, second.data_ptr(), at + 32, repeated.constant.data_ptr(), 5, 6)
        assert temporary % 16 == 0
    assert one.encoded == [at] and two.encoded == []


def test_nothing_is_done_on_another_device_or_with_other_pointers(on_a_gpu):
    calls: list = []
    repeated, memory = program(calls), torch.randn(17)
    for _ in range(2):
        assert repeated.repeat(memory[1:], None) is None
        on_a_gpu[0] = 1
        assert repeated.repeat(memory[:16], None) is None
        on_a_gpu[0] = 0
        assert not calls and repeated.repeat(memory[:16], None) is not None and len(calls) == 2
        calls.clear()


def test_hooks_get_tensors(monkeypatch):
    """While somebody observes launches, Triton makes them."""
    calls: list = []
    repeated, x, observed = program(calls), torch.randn(16), []
    monkeypatch.setattr(repeating, "is_observed", lambda: bool(observed))
    for who in ([], ["somebody"], []):
        observed[:] = who
        calls.clear()
        _, _, second = repeated.repeat(x, None)
        assert len(calls) == 2 and all((call[0] == "tensors") == bool(who) for call in calls)
        if who:
            _, pointers, seen = calls[1]
            assert pointers[1:] == [second.data_ptr(), x.data_ptr() + 32, repeated.constant.data_ptr()]
            assert seen == [((4,), (1,), dtype) for dtype in (torch.float32, torch.int8, torch.float32, torch.float32)]


def test_zeroed_memory_is_taken_of_what_was_filled(monkeypatch):
    """And not while a graph is captured or hooks observe launches. A launch that cannot be bound needs the one that fills."""
    calls: list = []
    launches = [
        (Noting(calls), (argument(2, shape=(64,), dtype=torch.int32),)),
        (Noting(calls), (argument(0), argument(2, 128, dtype=torch.int32), argument(2, 256), argument(1))),
    ]
    taken, watching = [], {"is_capturing": False, "is_observed": False}
    monkeypatch.setattr(repeating.zeros, "take", lambda *how: (taken.append(how), (None, 4096))[1])
    for who in watching:
        monkeypatch.setattr(repeating, who, lambda who=who: watching[who])
    x = torch.randn(16)
    repeated = Program(DEVICE, 1, [((4,), (1,), torch.float32)], 512, [], launches, 256)
    for _ in range(4):
        calls.clear()
        (made,) = repeated.repeat(x)
        ((*_, first, zeroed, temporary, result, _, _),) = calls
        assert (first, zeroed, result) == (x.data_ptr(), 4096 + 128, made.data_ptr())
        assert taken.pop() == (DEVICE, STREAM, 256) and temporary not in (zeroed, 4096 + 256)
    for who in watching:
        watching[who] = True
        assert repeated.repeat(x) is None and not taken
        watching[who] = False
    monkeypatch.setattr(Noting, "bound", lambda self: None)
    calls.clear()
    assert Program(DEVICE, 1, [((4,), (1,), torch.float32)], 512, [], launches, 256).repeat(x) is not None
    assert [call[0] for call in calls] == ["tensors"] * 2 and not taken


def test_a_launch_that_cannot_be_bound_gets_tensors(monkeypatch):
    calls: list = []
    monkeypatch.setattr(Noting, "bound", lambda self: None)
    repeated, x = program(calls), torch.randn(16)
    for _ in range(5):
        calls.clear()
        first, *_ = repeated.repeat(x, None)
        assert [call[0] for call in calls] == ["tensors"] * 2 and calls[0][1][:2] == [x.data_ptr(), first.data_ptr()]


def test_recordings_of_other_sizes_share_their_code():
    calls: list = []
    functions = []
    for n in (64, 96):
        repeated = program(calls, n)
        assert repeated.repeat(torch.randn(16), None)[0].shape == (n,)
        functions.append(repeated.repeat)
    assert functions[0] is not functions[1] and functions[0].__code__ is functions[1].__code__


def test_few_descriptors_are_remembered():
    encoded = Encoded(lambda pointer: (pointer, []))
    assert encoded[16] is encoded[16] and len(encoded) == 1
    for pointer in range(0, 16 * 2000, 16):
        assert encoded[pointer][0] == pointer
    assert len(encoded) < 1000
