"""The fused head and loss against PyTorch in float64: values, gradients, memory, compilation, and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from halo_tensor import halo_config, linear_cross_entropy, ops, quantize_
from halo_tensor.ops import loss_parts, loss_passes
from halo_tensor.recipe import INT8, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.loss import Objective
from tests.helpers.recording import OpLog

D, V, TOKENS = 96, 777, 50


def example(tokens=TOKENS, vocabulary=V, dtype=torch.float32, seed=0, ignored=()):
    """Hidden states, a weight, a bias and targets, of which each token is likelier than the others, as a trained model's are."""
    generator = torch.Generator().manual_seed(seed)
    hidden, noise, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, D), (vocabulary, D), (vocabulary,)))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weight = 0.3 * noise
    hidden += 0.6 * weight[targets]
    targets[list(ignored)] = -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, 0.1 * bias)] + [targets]


def exact(hidden, weight, bias, targets, reduction="mean", count=None, softcap=None, scale=1.0, smoothing=0.0, z_loss=0.0):
    """The loss by PyTorch."""
    z = F.linear(hidden, weight, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing)
    losses = losses + torch.where(targets == -100, 0.0, z_loss * z.logsumexp(1) ** 2)
    if reduction == "none":
        return losses
    count = (targets != -100).sum() if count is None and reduction == "mean" else 1 if count is None else count
    return losses.sum() / count


def compare(inputs, options, exact_options, cotangent=None):
    """The error of the loss relative to its size, or to 0.1; and of each gradient 1 − cos and the ratio of its norm."""
    hidden, weight, bias, targets = inputs
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, **options)
    others = [t.detach().to(torch.float64).requires_grad_() for t in (hidden, weight, bias)]
    expected = exact(*others, targets, **exact_options)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent
    made = torch.autograd.grad(loss, (hidden, weight, bias), cotangent)
    wanted = torch.autograd.grad(expected, others, cotangent.double())
    angles = [1 - F.cosine_similarity(a.double().flatten(), b.flatten(), 0).item() for a, b in zip(made, wanted, strict=True)]
    norms = [(a.double().norm() / b.norm()).item() for a, b in zip(made, wanted, strict=True)]
    return ((loss - expected).abs().max() / expected.abs().max().clamp_min(0.1)).item(), angles, norms


OPTIONS = st.fixed_dictionaries(
    {
        "softcap": st.sampled_from([None, 3.0, 30.0]),
        "smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        "z_loss": st.sampled_from([0.0, 1e-3]),
        "scale": st.sampled_from([1.0, 0.5, 2.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }
)


@settings(deadline=None, max_examples=25)
@given(
    options=OPTIONS,
    tokens=st.integers(2, 70),
    vocabulary=st.integers(5, 900),
    chunk=st.sampled_from([16, 40, 10**6]),
    scratch=st.sampled_from([1, 2**16, 2**30]),
    ignored=st.sets(st.integers(0, 1)),
    seed=st.integers(0, 99),
)
def test_in_high_precision_it_is_pytorchs_loss(options, tokens, vocabulary, chunk, scratch, ignored, seed):
    """So all of the algebra is right: what the quantised products add is their rounding alone."""
    ignored = ignored if tokens > len(ignored) else ()
    inputs = example(tokens, vocabulary, torch.float32, seed, ignored)
    given_options = {
        "label_smoothing": options["smoothing"], "logit_scale": options["scale"], "softcap": options["softcap"],
        "z_loss": options["z_loss"], "reduction": options["reduction"],
    }  # fmt: skip
    cotangent = torch.randn(tokens) if options["reduction"] == "none" else torch.tensor(-0.7)
    precise = {"forward": "bf16", "backward": "bf16", "chunk": chunk, "scratch": scratch}
    error, angles, norms = compare(inputs, given_options | precise, options, cotangent)
    assert error < 1e-4
    assert max(angles) < 1e-6 and all(abs(norm - 1) < 1e-3 for norm in norms)


@settings(deadline=None, max_examples=15)
@given(options=OPTIONS, scratch=st.sampled_from([2**16, 2**30]), seed=st.integers(0, 99))
def test_errors_of_the_quantised_products(options, scratch, seed):
    """They are those of int8 in the loss and of fp8 in the gradients: there, and no larger."""
    given_options = {
        "label_smoothing": options["smoothing"], "logit_scale": options["scale"], "softcap": options["softcap"],
        "z_loss": options["z_loss"], "reduction": options["reduction"],
    }  # fmt: skip
    error, angles, norms = compare(example(seed=seed), given_options | {"scratch": scratch}, options)
    assert 1e-7 < error < 0.05
    assert all(1e-6 < angle < 4e-3 for angle in angles[:2]) and all(abs(norm - 1) < 0.05 for norm in norms)


def int8_backward(hidden, weight, targets):
    """The gradient of the hidden states if E of the head is quantised to int8, with W's scales folded in, as in other layers."""
    e = torch.softmax(F.linear(hidden, weight), 1) - F.one_hot(targets, weight.shape[0])
    w_codes, w_scale = reference.rotate_quantize(weight, None, None, INT8, "row")
    codes, e_scale = reference.rotate_quantize(e, None, None, INT8, "row", None, w_scale)
    return e_scale.unsqueeze(1) * (codes.float() @ w_codes.float())


def test_an_int8_backward_would_wreck_the_gradient():
    """A study of SmolLM2 found 1 − cos 0.26, folded as in other layers, and 0.13 with out_features rotated. The tail of E, which
    is most of it, is below the int8 grid of its row. fp8 holds it."""
    torch.manual_seed(0)
    vocabulary, tokens = 4096, 64
    weight = torch.randn(vocabulary, D) + 2 * torch.randn(1, D)  # rows of a head share a direction
    hidden, targets = torch.randn(tokens, D), torch.randint(vocabulary, (tokens,))
    hidden = (0.3 * hidden + 0.04 * weight[targets]).requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum"), hidden)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", forward="bf16", backward="fp8")
    (fp8,) = torch.autograd.grad(loss, hidden)

    def angle(gradient):
        return 1 - F.cosine_similarity(gradient.flatten(), wanted.flatten(), 0).item()

    with torch.no_grad():
        folded = angle(int8_backward(hidden, weight, targets))
    assert 1e-5 < angle(fp8) < 3e-3
    assert folded > 0.03
    with pytest.raises(ValueError, match="backward must be 'fp8', 'bf16' or None; got 'int8', whose uniform grid wrecks"):
        linear_cross_entropy(hidden, weight, targets, backward="int8")


def test_rare_words_keep_their_gradient():
    """Columns of E have scales of their own: without, a column far below the largest probability would vanish in fp8."""
    hidden, weight, bias, targets = example()
    with torch.no_grad():
        bias[V // 2 :] -= 25
        targets[:] = targets % (V // 2)
        hidden.copy_(0.1 * hidden)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, forward="bf16")
    (made,) = torch.autograd.grad(loss, weight)
    double = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    (wanted,) = torch.autograd.grad(exact(*double, targets), double[1])
    rare, wanted = made[V // 2 :].double(), wanted[V // 2 :]
    assert wanted.abs().max() < 1e-9
    assert 1e-6 < 1 - F.cosine_similarity(1e15 * rare, 1e15 * wanted).min() < 1e-2


@pytest.mark.parametrize("level", [0, 1])
def test_codes_of_a_converted_head_are_used(level):
    hidden, weight, _, targets = example()
    layer = torch.nn.Linear(D, V, bias=False)
    layer.weight = torch.nn.Parameter(weight.detach().clone())
    quantize_(layer, halo_config(level=level, dtype="int8", min_features=1), filter_fn=lambda module, name: True)
    loss = linear_cross_entropy(hidden, layer.weight, targets)
    loss.backward()
    own = linear_cross_entropy(hidden, weight, targets)
    assert (loss == own) == (level == 1), "a weight without codes is rotated and quantised alike"
    with torch.no_grad():
        layer.weight.mul_(1.5)
        weight.mul_(1.5)
    if level == 1:
        assert linear_cross_entropy(hidden, layer.weight, targets) == linear_cross_entropy(hidden, weight, targets)
    assert layer.weight.grad.shape == (V, D) and type(layer.weight.grad) is torch.Tensor


def test_a_balanced_head():
    hidden, weight, _, targets = example()
    layer = torch.nn.Linear(D, V, bias=False)
    layer.weight = torch.nn.Parameter(weight.detach().clone())
    quantize_(layer, halo_config(min_features=1), filter_fn=lambda module, name: True)
    gain = 2.0 ** torch.arange(-4, 4).repeat(D // 8)
    layer.weight.operand.gains = (gain, 1 / gain)
    layer.weight.requantize()
    loss = linear_cross_entropy(hidden, layer.weight, targets)
    expected = exact(hidden.double(), weight.double(), None, targets)
    assert 0 < abs(loss - expected) < 0.02 * expected


def test_a_frozen_weight_and_a_tied_one():
    hidden, weight, _, targets = example()
    with OpLog() as log:
        linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and log.calls == [("linear_cross_entropy", None), ("scale_", None)]
    ids = torch.arange(TOKENS)
    plain, fused = [], []
    for loss_of, found in ((exact, plain), (lambda h, w, b, y: linear_cross_entropy(h, w, y), fused)):
        loss_of(F.embedding(ids, weight) * 2, weight, None, targets).backward()
        found.append(weight.grad.clone())
        weight.grad = None
    assert 1e-6 < 1 - F.cosine_similarity(plain[0].flatten(), fused[0].flatten(), 0) < 3e-3


def test_accumulated_gradients_and_scaled_losses():
    hidden, weight, _, targets = example()
    linear_cross_entropy(hidden, weight, targets).backward()
    first = weight.grad.clone()
    (4 * linear_cross_entropy(hidden, weight, targets)).backward()
    torch.testing.assert_close(weight.grad, 5 * first)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward has taken them"):
        loss.backward()


def test_float16_gradients_do_not_underflow():
    """A GradScaler multiplies the loss by 2¹⁶. So gradients in float16 are computed when that factor is known."""
    inputs = example(dtype=torch.float16)
    hidden, weight, _, targets = inputs
    factor, items = 2.0**16, 10**6
    (linear_cross_entropy(hidden, weight, targets, num_items_in_batch=items) * factor).backward()
    double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (exact(*double, None, targets, count=items) * factor).backward()
    assert 1 - F.cosine_similarity(weight.grad.double().flatten(), double[1].grad.flatten(), 0) < 3e-3


def test_autocast():
    hidden, weight, _, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, targets, forward="bf16", backward="bf16")
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert 1e-5 < abs(loss - exact(hidden, weight, None, targets)) < 0.05
    with pytest.raises(ValueError, match="must be of one dtype"):
        linear_cross_entropy(hidden.bfloat16(), weight, targets)


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_num_items_in_batch(count, reduction):
    hidden, weight, _, targets = example(ignored=[3])
    loss = linear_cross_entropy(hidden, weight, targets, num_items_in_batch=count, reduction=reduction)
    total = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(loss, total / 7)


def test_edges():
    hidden, weight, _, targets = example(ignored=range(TOKENS))
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isnan(), "the mean of nothing, as PyTorch's"
    loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    empty = linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum")
    weight.grad = None
    empty.backward()
    assert empty == 0 and (weight.grad == 0).all()
    out_of_range = targets.clone()
    out_of_range[0] = V
    assert linear_cross_entropy(hidden, weight, out_of_range, reduction="sum").isnan()
    shaped = linear_cross_entropy(hidden.view(2, -1, D), weight, targets.view(2, -1).int(), reduction="none")
    assert shaped.shape == (2, TOKENS // 2) and (shaped == 0).all()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


# Memory.


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a result."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return made


@pytest.mark.parametrize("backward", ["fp8", "bf16"])
def test_no_tensor_holds_all_logits(backward):
    """Run under the op itself, whose inside a dispatch mode does not see."""
    tokens, vocabulary, scratch = 256, 20000, 2**21
    hidden, weight = torch.randn(tokens, 32), torch.randn(vocabulary, 32)
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.ones(tokens)
    head = loss_passes.Head(weight, None, None, None, None, "int8", backward, Rotation(32), torch.float32, Objective())
    gradients = loss_passes.Gradients(torch.empty_like(hidden), torch.empty_like(weight), None)
    with LargestTensor() as log:
        loss_passes.run(head, hidden, targets, weights, 10**6, scratch, gradients)
    plan = loss_parts.plan_for(tokens, vocabulary, scratch)
    assert plan == (1024, 5, 0)
    assert tokens * plan.width <= log.most <= tokens * plan.width * plan.group < tokens * vocabulary / 3
    assert gradients.weight.isfinite().all()


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 2**34))
def test_parts_fit_the_scratch_memory(tokens, vocabulary, scratch):
    plan = loss_parts.plan_for(tokens, vocabulary, scratch)
    parts = plan.parts(vocabulary)
    assert parts[0].start == 0 and parts[-1].stop == vocabulary
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert plan.group >= 1 and plan.kept >= 0 and plan.width * plan.group <= max(loss_parts.GROUP, vocabulary)
    if plan.width not in (vocabulary, loss_parts.NARROWEST):
        assert tokens * plan.width * (3 + plan.group + 2 * plan.kept) <= scratch
    groups = {plan.group_of(part, vocabulary).start: plan.group_of(part, vocabulary) for part in parts}
    assert sum(group.stop - group.start for group in groups.values()) == vocabulary


def test_flops_are_those_of_three_products():
    hidden, weight, _, targets = example()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert counter.get_total_flops() == 3 * 2 * TOKENS * V * D


# Compiled.


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_compiled(converted):
    layer = torch.nn.Linear(D, V, bias=False)
    if converted:
        quantize_(layer, halo_config(min_features=1), filter_fn=lambda module, name: True)

    def loss_of(hidden, weight, targets):
        return linear_cross_entropy(hidden * 2, weight, targets, softcap=20.0)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for tokens in (32, 48, 50):
        results = []
        for function in (loss_of, compiled):
            hidden, _, _, targets = example(tokens)
            loss = 3 * function(hidden, layer.weight, targets)
            results.append((loss, *torch.autograd.grad(loss, (hidden, layer.weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert counter.frame_count <= 2, "one graph for the first number of tokens, and one for all"


def test_the_op():
    hidden, weight, bias, targets = (t.detach() for t in example(20, 40))
    options = "int8", "fp8", torch.float32, [1.0, 0.0, 0.0, 0.0], -100, 100, 2**20
    arguments = hidden, weight, None, None, None, bias, targets, torch.ones(20), [32, 0], *options
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for wants in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(torch.ops.halo.linear_cross_entropy.default, (*arguments, *wants), test_utils=checks)
    x = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.halo.scale_.default, (x, torch.tensor(2.0)), test_utils=checks)
    expected = x * 3
    ops.scale_(x, torch.tensor(3.0))
    assert torch.equal(x, expected)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
        ({"forward": "fp8"}, "forward must be one of 'int8', 'bf16'; got 'fp8'"),
        ({"reduction": "none", "num_items_in_batch": 3}, "num_items_in_batch divides a sum"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ({"softcap": 0.0}, "softcap above 0 or None"),
        ({"z_loss": -1.0}, "z_loss at least 0"),
        ({"chunk": 0}, "chunk, in tokens, and scratch, in bytes, must be positive"),
        ({"bias": torch.zeros(3)}, r"a bias of \[3\] does not fit a weight of \[777, 96\]"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets \[3\] do not fit hidden states \[50, 96\]"),
        ({"hidden": torch.zeros(50, 95)}, r"hidden states \[50, 95\] do not fit a weight of \[777, 96\]"),
        ({"targets": torch.zeros(50, dtype=torch.long, device="meta")}, "hidden states are on cpu, and other tensors on meta"),
    ],
    ids=str,
)
def test_errors(options, message):
    hidden, weight, _, targets = example()
    given_options = {"hidden": hidden, "weight": weight, "targets": targets} | options
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given_options)


def test_targets_are_indices():
    hidden, weight, _, targets = example()
    with pytest.raises(TypeError, match="targets are indices of the vocabulary; got torch.float32"):
        linear_cross_entropy(hidden, weight, targets.float())


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("scratch", [2**24, 2**30], ids=["logits twice", "logits kept"])
@pytest.mark.parametrize("backward", ["fp8", "bf16"])
@pytest.mark.parametrize("vocabulary", [33000, 32003])
def test_kernels_compute_what_the_reference_does(vocabulary, backward, scratch):
    tokens = 2048
    inputs = [t.detach().bfloat16() if t.is_floating_point() else t for t in example(tokens, vocabulary, ignored=[5])]
    results = []
    for device in ("cpu", "cuda"):
        hidden, weight, bias, targets = (t.to(device) for t in inputs)
        trained = [t.requires_grad_() for t in (hidden, weight, bias)]
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, backward=backward, scratch=scratch)
        results.append([t.detach().cpu().double() for t in (loss, *torch.autograd.grad(loss, trained))])
    (loss, *wanted), (made, *gradients) = results
    assert abs(loss - made) < 1e-4 * loss
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


@pytest.mark.gpu
def test_statistics_straight_from_a_product():
    from halo_tensor.kernels import loss_sm90
    from halo_tensor.reference import loss as definition

    device, objective, columns = torch.device("cuda"), Objective(scale=0.5), 16400
    if reason := loss_sm90.why_not(device, 2048, columns, objective):
        pytest.skip(reason)
    hidden, weight, bias, targets = (t.detach().to(device) for t in example(2048, columns))
    codes, _, scales = ops.rotate_quantize(hidden, None, Rotation(32), INT8, "row")
    w_codes, _, w_scales = ops.rotate_quantize(weight, None, Rotation(32), INT8, "row")
    logits = ops.scaled_mm(codes, w_codes, scales, w_scales, bias, None, None, (2048, columns), torch.float16)
    made, expected = (definition.fresh_statistics(2048, device) for _ in range(2))
    definition.update_statistics_(expected, logits, targets, 0, objective)
    for part in (slice(0, 16384), slice(16384, columns)):
        w = w_codes[part], scales, w_scales[part], bias[part]
        loss_sm90.update_statistics_(made, codes, *w, targets, part.start, objective)
    torch.testing.assert_close(made[:4], expected[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_cpu_waits_for_nothing():
    hidden, weight, _, targets = (t.detach().to("cuda") for t in example(2048, 33000))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, targets, num_items_in_batch=7).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
