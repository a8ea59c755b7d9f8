"""Gradients of any order, only those asked for, and every way in which autograd may call."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tconv
from tconv import functional as TF
from tconv.launching import launch
from tests import cases, oracle, parity

TINY = [
    oracle.Case("1-D, strided", (2, 2, 5), 2, (3,), stride=2, padding=1),
    oracle.Case("2-D, groups, same", (1, 2, 3, 3), 2, (2, 2), padding="same", groups=2),
    oracle.Case("3-D", (1, 1, 2, 3, 2), 2, (2, 1, 2), padding=1, stride=2),
    oracle.Case("transposed 1-D", (2, 2, 3), 2, (3,), stride=2, output_padding=1, transposed=True),
    oracle.Case("transposed 2-D, uneven groups", (1, 4, 2, 2), 2, (2, 2), stride=2, groups=2, transposed=True),
    oracle.Case("transposed 3-D, depthwise", (1, 2, 2, 1, 2), 2, (2, 1, 2), groups=2, transposed=True),
]


def function(case, torchs=False):
    name = f"conv{'_transpose' if case.transposed else ''}{case.rank}d"
    return getattr(F if torchs else TF, name)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_and_gradgradcheck(case, device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))

    def f(x, w, b):
        return function(case)(x, w, b, **case.arguments)

    with tconv.recording() as calls:
        assert torch.autograd.gradcheck(f, (x, w, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (x, w, b), fast_mode=True)
    assert all(c.ours for c in calls)


@pytest.mark.parametrize("case", [TINY[0], TINY[4]], ids=str)
def test_third_order(case, device):
    """Without output_padding, with which torch 2.13 itself raises in the third derivative; tconv does not."""
    x, w, _ = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))

    def third(f):
        y = f(x, w, None, **case.arguments).pow(3).sum()
        for _ in range(2):
            gx, gw = torch.autograd.grad(y, (x, w), create_graph=True)
            y = gx.square().sum() + gw.square().sum()
        return torch.autograd.grad(y, (x, w))

    for ours, torchs in zip(third(function(case)), third(function(case, torchs=True)), strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_only_what_is_asked_for(transposed, needs, device):
    case = TINY[3] if transposed else TINY[0]
    tensors = oracle.tensors(case, torch.float32, device)
    x, w, b = (t.requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True))
    with tconv.recording() as calls:
        y = function(case)(x, w, b, **case.arguments)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.sum().backward()
    forward, back = ("dgrad", "fprop") if transposed else ("fprop", "dgrad")
    wanted = [forward] + [name for name, n in zip((back, "wgrad", "bias"), needs, strict=True) if n]
    assert [c.operation for c in calls] == wanted
    assert [t.grad is not None for t in (x, w, b)] == [bool(n) for n in needs]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_editing_a_saved_tensor_raises(which, needs, device):
    """Both are saved even if one gradient is wanted, as in torch."""
    x, w, _ = oracle.tensors(TINY[0], torch.float32, device)
    tensors = [t.requires_grad_(n) for t, n in zip((x, w), needs, strict=True)]
    y = TF.conv1d(*tensors)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def both(f, *tensors):
    """(result, gradients) of f with tconv's functions, and with torch's."""
    found = []
    for library in (TF, F):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        found.append(f(library, *leaves))
    return found


def assert_same(pair):
    for ours, torchs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, torchs)


X, W, B = (2, 3, 6, 5), (4, 3, 3, 3), (4,)


@pytest.fixture
def xwb(device):
    return [torch.randn(s, device=device, dtype=torch.float64) for s in (X, W, B)]


def test_expanded_and_permuted_upstream_gradients(xwb):
    def f(library, x, w, b):
        y = library.conv2d(x, w, b, padding=1)
        first = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)  # an expanded scalar
        g = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(3)).to(y.device).permute(3, 2, 1, 0)
        return *first, *torch.autograd.grad(y, (x, w, b), g)

    assert_same(both(f, *xwb))


def test_one_weight_used_twice_and_a_graph_kept(xwb):
    def f(library, x, w, b):
        y = library.conv2d(library.conv2d(x, w[:3], padding=1), w, b).square().sum()
        once = torch.autograd.grad(y, (x, w, b), retain_graph=True)
        return *once, *torch.autograd.grad(y, (x, w, b))

    assert_same(both(f, *xwb))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, xwb):
    def f(library, *leaves):
        y = checkpoint(library.conv2d, *leaves, use_reentrant=reentrant)
        y.square().sum().backward()
        return y, *(t.grad for t in leaves)

    assert_same(both(f, *xwb))


def test_saved_tensor_hooks_see_input_and_weight(xwb):
    x, w, b = (t.requires_grad_() for t in xwb)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.clone(), lambda t: t):
        y = TF.conv2d(x, w, b)
    assert seen == [x.shape, w.shape]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(F.conv2d(x, w, b).sum(), x)[0])


def test_unbatched(xwb):
    def f(library, x, w, b):
        return torch.autograd.grad(library.conv2d(x, w, b).square().sum(), (x, w, b))

    assert_same(both(f, xwb[0][0], *xwb[1:]))


BATCHED = [
    oracle.Case("a remainder of the stride is padding", (1, 2, 8, 8), 2, (3, 3), stride=2, padding=1),
    oracle.Case("padding beyond the kernel, of a stride", (1, 1, 2), 2, (1,), stride=5, padding=3),
] + [c for c in cases.ALL if c.reason in {
    "same padding, even kernel pads one side more", "stride", "transposed, output padding within dilation",
    "transposed, output padding",
}]  # fmt: skip


@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_batched_gradients_fold_their_batch_and_agree(case, device):
    """is_grads_batched hands a kernel a tensor with a hidden batch; the operators' batching rules take it."""
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))
    found = []
    for torchs in (False, True):
        with tconv.recording() as calls:
            y = function(case, torchs)(x, w, b, **case.arguments)
            g = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype).to(device)
            found.append(torch.autograd.grad(y, (x, w, b), g, is_grads_batched=True))
        if not torchs:
            assert all(c.ours for c in calls)
            assert {c.operation for c in calls} == {"fprop", "dgrad", "wgrad"}
    assert_same(found)


@pytest.mark.parametrize("case", [BATCHED[0], BATCHED[-1]], ids=str)
def test_batched_second_derivatives(case, device):
    x, w, _ = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))
    found = []
    for torchs in (False, True):
        y = function(case, torchs)(x, w, None, **case.arguments)
        gx, _ = torch.autograd.grad(y.pow(3).sum(), (x, w), create_graph=True)
        g = torch.randn(2, *gx.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype).to(device)
        found.append(torch.autograd.grad(gx, (x, w), g, is_grads_batched=True, retain_graph=True))
    assert_same(found)


def test_threads(xwb):
    """Layers of the same and of different kinds, forward and backward, from several threads."""
    x, w, b = xwb
    right = F.conv2d(x, w, b)
    failures = []

    def work():
        try:
            for _ in range(3):
                wg = w.clone().requires_grad_()
                y = TF.conv2d(x, wg, b)
                y.sum().backward()
                torch.testing.assert_close(y, right)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_same_bits_every_time(xwb):
    def run():
        x, w, b = (t.clone().requires_grad_() for t in xwb)
        y = TF.conv2d(x, w, b, stride=2)
        return y, *torch.autograd.grad(y.square().sum(), (x, w, b))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_inference_mode(xwb):
    with torch.inference_mode():
        torch.testing.assert_close(TF.conv2d(*xwb), F.conv2d(*xwb))


def test_functional_transforms_agree(xwb):
    x, w, b = xwb
    with tconv.recording() as calls:
        ours = torch.func.vmap(torch.func.grad(lambda w, x: TF.conv2d(x, w, b).sum()), (None, 0))(w, x)
    torch.testing.assert_close(ours, torch.func.vmap(torch.func.grad(lambda w, x: F.conv2d(x, w, b).sum()), (None, 0))(w, x))
    assert [c.operation for c in calls if c.ours] == ["fprop", "wgrad"]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(lib.conv2d(dual, w, b)).tangent for lib in (TF, F)]
    torch.testing.assert_close(*tangents)


def test_backward_inside_a_dispatch_mode(xwb):
    """A mode active only in backward: the gradients are the registered operators', and are the same."""
    from torch.utils.flop_counter import FlopCounterMode

    def f(library, x, w, b):
        y = library.conv2d(x, w, b, stride=2, padding=1)
        with FlopCounterMode(display=False):
            return torch.autograd.grad(y.square().sum(), (x, w, b))

    assert_same(both(f, *xwb))


def test_a_default_device_is_no_reason_to_decline(xwb, device):
    with torch.device(device), tconv.recording() as calls:
        TF.conv2d(*xwb)
    assert [c.ours for c in calls] == [True]


def test_a_zero_tensor_gradient(xwb):
    def f(library, x, w, b):
        y = library.conv2d(x, w, b)
        return torch.autograd.grad(y, (x, w, b), torch._efficientzerotensor(y.shape, device=y.device))

    assert_same(both(f, *xwb))


def test_a_gradient_as_a_weight_is_addressed_like_one(device, monkeypatch):
    """In the backward of wgrad, the gradient of dw is the weight; kernels address weights in 32 bits."""
    x, w = (torch.randn(s, device=device, requires_grad=True) for s in ((2, 3, 6, 6), (4, 3, 3, 3)))
    dy = torch.randn(2, 4, 4, 4, device=device, requires_grad=True)
    gw = torch.randn(4, 3, 9, 9, device=device)[:, :, ::4, ::4]  # it reaches farther than w
    results = []
    for limit in (launch.LIMIT, 4 * 3 * 9):
        monkeypatch.setattr(launch, "LIMIT", limit)
        monkeypatch.setattr(launch, "_prepared", {})
        (dw,) = torch.autograd.grad(TF.conv2d(x, w), w, dy, create_graph=True)
        with tconv.recording() as calls:
            results.append(torch.autograd.grad(dw, (dy, x), gw))
        assert [c.ours for c in calls] == [limit > 4 * 3 * 9] * 2
    for got, right in zip(*results, strict=True):
        parity.assert_same(got, right)


ASKED = {
    "x": (lambda y, x, layer: torch.autograd.grad(y, x), ["dgrad"]),
    "w": (lambda y, x, layer: torch.autograd.grad(y, layer.weight), ["wgrad"]),
    "x and w": (lambda y, x, layer: torch.autograd.grad(y, (x, layer.weight)), ["dgrad", "wgrad"]),
    "x, accumulated": (lambda y, x, layer: y.backward(inputs=[x]), ["dgrad"]),
    "all": (lambda y, x, layer: y.backward(), ["dgrad", "wgrad", "bias"]),
    "x, differentiably": (lambda y, x, layer: torch.autograd.grad(y, x, create_graph=True), ["dgrad"]),
}


@pytest.mark.parametrize("before", [lambda x: x, lambda x: 2 * x], ids=["leaf", "inner"])
@pytest.mark.parametrize("what", ASKED)
def test_only_the_gradients_that_are_asked_for_are_computed(what, before, device):
    """A gradient penalty, say, is not after the weights'."""
    layer, x = tconv.Conv2d(2, 3, 3, device=device), torch.randn(1, 2, 5, 5, device=device, requires_grad=True)
    ask, passes = ASKED[what]
    if what == "w" and before(x) is x:
        passes = ["dgrad", "wgrad"]  # of a pass that asks for a leaf's gradient no other leaf is asked after
    for _ in range(3):  # the long way, and the short one of repeated calls
        y = layer(before(x)).sum()
        with tconv.recording() as calls:
            ask(y, x, layer)
        assert [c.operation for c in calls] == passes
        with tconv.recording() as calls:  # by the operators, which have no pass for the bias
            torch.func.grad(lambda v: layer(before(v)).sum())(x)
        assert [c.operation for c in calls] == ["fprop", "dgrad"]
