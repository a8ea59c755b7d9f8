"""functorch's transforms, forward-mode differentiation and dispatch modes: our kernels, and what torch's own would give."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tconv
from tconv import functional as TF
from tests import oracle

CASES = [
    oracle.Case("conv, groups, stride", (2, 4, 5, 4), 6, (3, 2), stride=2, padding=1, groups=2),
    oracle.Case("conv, a remainder unread, 1-D", (2, 2, 8), 3, (3,), stride=2, dilation=2),
    oracle.Case("transposed, groups, stride", (2, 4, 3, 2), 6, (2, 3), stride=2, groups=2, output_padding=1, transposed=True),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def compare(case, device, what, *, ours=True, tensors=None):
    """what(conv, x, w, b) with tconv's function and with torch's."""
    x, w, b = tensors or oracle.tensors(case, torch.float64, device)
    name = f"conv{'_transpose' if case.transposed else ''}{case.rank}d"
    found = []
    with tconv.recording() as calls:
        for library in (TF, F):

            def conv(x, w, b=None, library=library):
                return getattr(library, name)(x, w, b, **case.arguments)

            found.append(what(conv, x, w, b))
    assert calls
    if ours:
        assert all(c.ours for c in calls), [str(c) for c in calls]
    torch.testing.assert_close(*found)


def wave(t):
    return torch.sin(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).view_as(t)


@pytest.mark.parametrize(
    "dims", [(0, None, None), (None, 0, None), (0, 0, None), (1, 2, 0), (None, None, 0), (0, None, 0)], ids=str
)
def test_vmap(case, dims, device):
    def what(conv, x, w, b):
        tensors = [t if d is None else torch.stack([t, t.sin(), t.cos()], d) for t, d in zip((x, w, b), dims, strict=True)]
        return vmap(conv, dims)(*tensors)

    compare(case, device, what)


def test_vmap_of_no_samples(case, device):
    """Nothing for each, and gradients of zeros for what they share. Torch gets the shape wrong, and raises for weights."""
    x, w, b = oracle.tensors(case, torch.float64, device)
    function = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")

    def f(x, w):
        return function(x, w, b, **case.arguments)

    def loss(x, w):
        return f(x, w).sum()

    shape, xs, ws = f(x, w).shape, x[None][:0], w[None][:0]
    for dims, tensors in (((0, None), (xs, w)), ((None, 0), (x, ws)), ((0, 0), (xs, ws))):
        assert vmap(f, dims)(*tensors).shape == (0, *shape)
    assert [g.shape for g in vmap(grad(loss, (0, 1)))(xs, ws)] == [xs.shape, ws.shape]
    assert torch.equal(grad(lambda w: vmap(loss, (0, None))(xs, w).sum())(w), torch.zeros_like(w))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 1)], ids=str)
def test_vmap_of_vjp(case, dims, device):
    """wgrad and dgrad with either argument batched."""

    def what(conv, x, w, b):
        y = conv(x, w, b)
        g = torch.stack([wave(y), wave(y).cos()], dims[0]) if dims[0] is not None else wave(y)
        x = torch.stack([x, x.sin()], dims[1]) if dims[1] is not None else x
        return vmap(lambda g, x: vjp(lambda x, w, b: conv(x, w, b), x, w, b)[1](g), dims)(g, x)

    compare(case, device, what)


def loss(conv):
    return lambda x, w, b: conv(x, w, b).pow(3).sum()


TRANSFORMS = {
    "grad": lambda f, x, w, b: grad(f, (0, 1, 2))(x, w, b),
    "grad(grad)": lambda f, x, w, b: grad(lambda x, w: grad(f)(x, w, b).pow(2).sum(), (0, 1))(x, w),
    "jvp": lambda f, x, w, b: jvp(f, (x, w, b), (wave(x), wave(w), wave(b))),
    "jvp(jvp)": lambda f, x, w, b: jvp(lambda x, w: jvp(lambda x, w: f(x, w, b), (x, w), (wave(x), wave(w)))[1],
                                       (x, w), (x.cos(), w.cos())),
    "jvp(grad)": lambda f, x, w, b: jvp(lambda w: grad(f, (0, 1))(x, w, b), (w,), (wave(w),)),
    "grad(jvp)": lambda f, x, w, b: grad(lambda x, w: jvp(lambda w: f(x, w, b), (w,), (wave(w),))[1], (0, 1))(x, w),
    "hessian": lambda f, x, w, b: hessian(f, 1)(x, w, b),
    "vmap(grad), per sample": lambda f, x, w, b: vmap(grad(lambda w, x: f(x[None], w, b)), (None, 0))(w, x),
    "vmap(jvp)": lambda f, x, w, b: vmap(lambda t: jvp(lambda w: f(x, w, b), (w,), (t,))[1])(torch.stack([wave(w), w])),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(case, name, device):
    compare(case, device, lambda conv, x, w, b: TRANSFORMS[name](loss(conv), x, w, b))


def test_jacobians(case, device):
    compare(case, device, lambda conv, x, w, b: (jacrev(conv, (1, 2))(x, w, b), jacfwd(conv, (1, 2))(x, w, b)))


def test_second_directional_derivative_against_finite_differences(device):
    """jvp(jvp), which is silently wrong where an inner level's mode is not restored."""
    case = CASES[0]
    x, w, _ = oracle.tensors(case, torch.float64, device)

    def f(t):
        return TF.conv2d(x * (1 + t), w * (1 + t).square(), **case.arguments).sin().sum()

    zero, one, h = torch.zeros((), dtype=torch.float64, device=device), torch.ones((), dtype=torch.float64, device=device), 1e-4
    second = jvp(lambda t: jvp(f, (t,), (one,))[1], (zero,), (one,))[1]
    torch.testing.assert_close(second, (f(one * h) - 2 * f(zero) + f(-one * h)) / h**2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(grad(f))(zero), second)


def test_forward_mode(case, device):
    def what(conv, x, w, b):
        with forward_ad.dual_level():
            y = conv(*(forward_ad.make_dual(t, wave(t)) for t in (x, w, b)))
            only = conv(x, w, forward_ad.make_dual(b, wave(b)))
            return forward_ad.unpack_dual(y).tangent, forward_ad.unpack_dual(only).tangent

    compare(case, device, what)


def test_forward_over_reverse(case, device):
    def what(conv, x, w, b):
        w = w.clone().requires_grad_()
        with forward_ad.dual_level():
            y = conv(forward_ad.make_dual(x, wave(x)), w, b).pow(2).sum()
            g = torch.autograd.grad(y, w)[0]
            return forward_ad.unpack_dual(g)[:2]

    compare(case, device, what)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_of_all_modes(transposed, device):
    case = oracle.Case("two groups", (1, 2, 3), 2, (2,), stride=2, groups=2, transposed=transposed)
    tensors = [t.requires_grad_() for t in oracle.tensors(case, torch.float64, device)]
    f = TF.conv_transpose1d if transposed else TF.conv1d
    with tconv.recording() as calls:
        assert torch.autograd.gradcheck(
            lambda *t: f(*t, **case.arguments), tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )
    assert all(c.ours for c in calls if c.operation != "aten::sum")


def test_operators_check(case, device):
    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))
    n = case.rank
    stride, dilation = [(v,) * n if isinstance(v, int) else v for v in (case.stride, case.dilation)]
    if case.transposed:
        window = stride, (0,) * n, (-1,) * n, dilation, case.groups
        y = torch.ops.tconv.dgrad(x, w, b, *window)
        torch.library.opcheck(torch.ops.tconv.dgrad.default, (x, w, b, *window))
        torch.library.opcheck(torch.ops.tconv.wgrad.default, (x, y.detach(), None, *window))
    else:
        window = stride, (case.padding,) * n, (case.padding,) * n, dilation, case.groups
        torch.library.opcheck(torch.ops.tconv.fprop.default, (x, w, b, *window))


def test_flops(case, device):
    from torch.utils.flop_counter import FlopCounterMode

    x, w, b = (t.requires_grad_() for t in oracle.tensors(case, torch.float64, device))
    f = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    with FlopCounterMode(display=False) as counter, tconv.recording() as calls:
        y = f(x, w, b, **case.arguments)
        y.sum().backward()
    assert [c.operation for c in calls if c.ours] == (
        ["dgrad", "fprop", "wgrad"] if case.transposed else ["fprop", "dgrad", "wgrad"]
    )
    pixels = x[:, 0].numel() if case.transposed else y[:, 0].numel()
    k = w.shape[0]
    assert counter.get_total_flops() == 3 * 2 * pixels * k * w[0].numel()


def test_flops_in_inference_mode(case, device, monkeypatch):
    """As elsewhere, also by the first call that is counted at all."""
    from torch.utils import flop_counter

    torchs = {f: formula for f, formula in flop_counter.flop_registry.items() if not str(f).startswith("tconv.")}
    x, w, b = oracle.tensors(case, torch.float64, device)
    f = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
    counts = []
    for mode in (torch.inference_mode, torch.no_grad):
        monkeypatch.setattr(flop_counter, "flop_registry", dict(torchs))
        with mode(), flop_counter.FlopCounterMode(display=False) as counter:
            f(x, w, b, **case.arguments)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_fake_tensors(case, device):
    from torch._subclasses import FakeTensorMode

    for channels_last in (False, True):
        x, w, b = oracle.tensors(case, torch.float32, device, channels_last)
        f = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")
        y = f(x, w, b, **case.arguments)
        with FakeTensorMode() as mode:
            fake = f(*(mode.from_tensor(t) for t in (x, w, b)), **case.arguments)
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (y.shape, y.stride(), y.dtype, y.device)


def test_make_fx(case, device):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w, b = oracle.tensors(case, torch.float64, device)
    f = getattr(TF, f"conv{'_transpose' if case.transposed else ''}{case.rank}d")

    def step(x, w, b):
        return grad(lambda *t: f(*t, **case.arguments).pow(2).sum(), (0, 1, 2))(x, w, b)

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(step, tracing_mode=mode)(x, w, b)
        assert {"tconv.fprop.default", "tconv.dgrad.default", "tconv.wgrad.default"} <= {
            str(n.target) for n in graph.graph.nodes
        }
        torch.testing.assert_close(graph(x, w, b), step(x, w, b))


def test_per_sample_gradients_of_a_model(device):
    model = torch.nn.Sequential(
        tconv.Conv2d(2, 4, 3, padding=1, groups=2), torch.nn.ReLU(), tconv.ConvTranspose2d(4, 2, 2, stride=2)
    ).to(device, torch.float64)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(3, 2, 4, 5, device=device, dtype=torch.float64)
    with tconv.recording() as calls:
        ours = vmap(grad(lambda p, x: functional_call(model, p, (x[None],)).pow(2).sum()), (None, 0))(parameters, x)
    assert all(c.ours for c in calls)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).pow(2).sum().backward()
        torch.testing.assert_close({k: v[i] for k, v in ours.items()}, {k: p.grad for k, p in model.named_parameters()})


def test_a_subclass_that_knows_aten_alone_gets_atens(device):
    class Logged(torch.Tensor):
        pass

    x = torch.randn(1, 2, 4, 4, device=device).as_subclass(Logged)
    with tconv.recording() as calls:
        y = TF.conv2d(x, torch.randn(2, 2, 3, 3, device=device))
    assert type(y) is Logged
    assert [c.ours for c in calls] == [False]
