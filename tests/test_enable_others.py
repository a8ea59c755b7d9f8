"""The override beside other libraries' of the same kernels, and its selections."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F

import tconv
from tconv import override
from tconv.dispatch import aten
from tconv.launching import record
from tests import oracle, parity
from tests.contexts import conv, losses, same, tensors
from tests.test_enable import overridden

KEY = "CUDA" if torch.cuda.is_available() else "CPU"
LEFT = torch.complex32 if torch.cuda.is_available() else torch.int64  # what tconv has no kernels for


@pytest.fixture(autouse=True)
def _restored():
    yield
    assert not tconv.is_enabled()
    with tconv.enabled():  # takes out what had to stay under another library's kernels
        pass
    assert override._overrides == []
    assert not overridden()


class Other:
    """Another library, whose kernels note that they are called and fall through as torch.library.get_kernel's page says."""

    def __init__(self, name, path):
        self.library = torch.library.Library("aten", "IMPL")
        for operator in ("_convolution", "convolution_backward"):
            before = torch.library.get_kernel(f"aten::{operator}", KEY)

            def kernel(keys, *args, before=before):
                path.append(name)
                return before.call_boxed(keys, *args)

            self.library.impl(operator, kernel, KEY, with_keyset=True, allow_override=True)

    def close(self):
        self.library._destroy()


class Notes(list):
    """A list of recorded calls that instead notes in a path that tconv was called."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def append(self, call):
        self.path.append("tconv")


@pytest.fixture
def path(monkeypatch):
    """Who was called, in order."""
    path = []
    monkeypatch.setattr(record, "_watchers", [Notes(path)])
    return path


def seen_by(path, device, dtype):
    """Who sees a forward pass, the last one first, each once; the result is torch's."""
    path.clear()
    x, w = torch.ones(1, 1, 4, dtype=dtype, device=device), torch.ones(2, 1, 3, dtype=dtype, device=device)
    y = F.conv1d(x, w)
    assert torch.equal(y, torch.full_like(y, 3))
    return [name for name, _ in itertools.groupby(path)]


ORDERS = list(itertools.permutations(("first tconv", "other", "second tconv")))


@pytest.mark.parametrize("ends", ORDERS, ids="-".join)
@pytest.mark.parametrize("begins", ORDERS, ids="-".join)
def test_begun_and_ended_in_any_order(begins, ends, device, path):
    """The last one wins, what it does not take goes to the one before, and whoever is still there works after each end."""
    ending, there = {}, []

    def check():
        order = ["other" if name == "other" else "tconv" for name in reversed(there)]
        order = [name for name, _ in itertools.groupby(order)]
        assert seen_by(path, device, LEFT) == order
        taken = order.index("tconv") + 1 if "tconv" in order else len(order)
        assert seen_by(path, device, torch.float64) == order[:taken]

    for name in begins:
        if name == "other":
            ending[name] = Other(name, path).close
        else:
            block = tconv.enabled()
            block.__enter__()
            ending[name] = lambda block=block: block.__exit__(None, None, None)
        there.append(name)
        check()
    for name in ends:
        ending[name]()
        there.remove(name)
        check()


def test_the_one_below_the_older_of_two_layers_goes(device, path):
    """The older layer must not take itself for the top one: it would come to lie on the newer one, which lies on it."""
    lowest = Replacement()
    with tconv.enabled():
        between = Other("other", path)
        with tconv.enabled(ranks=(2,)):
            assert len(override._overrides) == 2
            lowest.close()
            assert seen_by(path, device, LEFT) == ["tconv", "other", "tconv"]
            assert seen_by(path, device, LEFT) == ["tconv", "other", "tconv"]
        assert seen_by(path, device, LEFT) == ["other", "tconv"]
        between.close()
        assert seen_by(path, device, LEFT) == ["tconv"]


def test_the_one_below_goes_while_another_is_on_top(device, path):
    """Then it cannot be seen what is left below, and torch's own kernels stand for it."""
    below = Other("below", path)
    with tconv.enabled():
        above = Other("above", path)
        assert seen_by(path, device, LEFT) == ["above", "tconv", "below"]
        below.close()
        assert seen_by(path, device, LEFT) == ["above", "tconv"]
        above.close()
        assert seen_by(path, device, LEFT) == ["tconv"]


def test_one_further_below_comes_to_light(device, path):
    third, second = Other("third", path), Other("second", path)
    with tconv.enabled():
        assert seen_by(path, device, LEFT) == ["tconv", "second", "third"]
        second.close()
        assert seen_by(path, device, LEFT) == ["tconv", "third"]
        third.close()
        assert seen_by(path, device, LEFT) == ["tconv"]


def test_what_stays_under_another_takes_nothing_and_goes_at_the_next_chance(device, path):
    tconv.enable()
    other = Other("other", path)
    tconv.disable()
    assert seen_by(path, device, torch.float64) == ["other"]
    other.close()
    assert seen_by(path, device, torch.float64) == []
    assert overridden()
    tconv.enable()
    tconv.disable()
    assert not overridden()


def test_one_that_takes_everything_of_one_operator(device):
    """Before us, ours win and give its kernel back; after us, it wins."""
    x, w, _ = tensors(device)

    def gradient():
        return torch.autograd.grad(conv(x, w).sum(), w)[0]

    expected = gradient()
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution_backward", lambda *_: (None, w.detach() * 0, None), KEY, allow_override=True)
    assert not gradient().any()
    with tconv.enabled(), tconv.recording() as calls:
        parity.assert_same(gradient(), expected)
    parity.assert_ours(calls, "fprop", "wgrad")
    assert not gradient().any()
    library._destroy()
    parity.assert_same(gradient(), expected)
    with tconv.enabled():
        library = torch.library.Library("aten", "IMPL")
        library.impl("convolution_backward", lambda *_: (None, w.detach() * 0, None), KEY, allow_override=True)
        assert not gradient().any()
        library._destroy()
        parity.assert_same(gradient(), expected)


def test_an_error_of_another_below_is_its_own(device):
    """Also one that says what torch says of a handle that is void."""
    x, w, _ = tensors(device)
    library = torch.library.Library("aten", "IMPL")
    texts = ["no such thing", "SafeKernelFunction has been invalidated, theirs"]

    def raises(*_):
        raise RuntimeError(text)

    library.impl("_convolution", raises, KEY, allow_override=True)
    with tconv.enabled():
        for text in texts:
            with pytest.raises(RuntimeError, match=text):
                F.conv2d(x.to(LEFT), w.to(LEFT))
    library._destroy()


def test_others_come_and_go_while_threads_compute(device, path):
    """In ours, below ours, and on top of them."""
    x, w = torch.ones(1, 1, 3, dtype=LEFT, device=device), torch.ones(2, 1, 2, dtype=LEFT, device=device)
    expected, stop, errors = F.conv1d(x, w), threading.Event(), []

    def until_stopped(work):
        try:
            while not stop.is_set():
                work()
        except BaseException as e:
            errors.append(e)

    def compute():
        assert torch.equal(F.conv1d(x, w), expected)

    def toggle():
        with tconv.enabled(ranks=(2,)):
            compute()

    works = [compute, compute, toggle]
    threads = [threading.Thread(target=until_stopped, args=(work,)) for work in works]
    with tconv.enabled():
        for thread in threads:
            thread.start()
        others = []
        try:
            for _ in range(100):
                others.append(Replacement())
                compute()
                others[-1].close()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert errors == []


class Replacement:
    """Another library that computes its calls itself: whoever falls through to it may find it gone."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl(
            "_convolution", lambda x, w, *_: torch.full((1, 2, 2), 2, dtype=x.dtype, device=x.device), KEY, allow_override=True
        )
        self.handle = torch.library.get_kernel(
            "aten::_convolution", KEY
        )  # torch would free it under a thread that is about to enter it

    def close(self):
        self.library._destroy()


# --- torch's own registry of kernels in Python ---


@pytest.fixture
def registered(path):
    """An override of convolutions in torch._native, which takes rank 1 only; what is left of it there goes in the end."""
    registry = pytest.importorskip("torch._native.registry")
    if not hasattr(registry, "_register_overrides_from_graph"):
        pytest.skip("this torch's registry is another")

    def impl(x, w, *_):
        path.append("torch._native")
        return torch.full((1, 2, 2), 3, dtype=x.dtype, device=x.device)

    operator = ("_convolution", KEY)
    registry.register_op_override("tconv_test", "aten", *operator, lambda x, *_: x.dim() == 3, impl)
    yield lambda: registry._register_overrides_from_graph(*operator, registry._graphs[operator])
    registry._destroy_aten_override(*operator)
    registry._graphs.pop(operator)
    registry._native_decomp_overrides.pop(torch.ops.aten._convolution.default, None)
    for names in (registry._dsl_name_to_lib_graph, registry._op_symbol_to_lib_graph, registry._dispatch_key_to_lib_graph):
        for name, operators in list(names.items()):
            names[name] = [o for o in operators if o != operator]
    registry._filter_state.update("tconv_test", operator[0], None, remove_keys=True)


def test_torchs_registry_before_us(device, path, registered):
    registered()
    assert seen_by(path, device, torch.float64) == ["torch._native"]
    with tconv.enabled():
        assert seen_by(path, device, torch.float64) == ["tconv"]
        assert seen_by(path, device, LEFT) == ["tconv", "torch._native"]
        with torch.backends.python_native.operations_disabled("_convolution"):
            assert seen_by(path, device, LEFT) == ["tconv"]
            assert seen_by(path, device, torch.float64) == ["tconv"]
        assert seen_by(path, device, torch.float64) == ["torch._native"]  # registered anew, and so the last
    assert seen_by(path, device, torch.float64) == ["torch._native"]


def test_torchs_registry_after_us(device, path, registered):
    tconv.enable()
    registered()
    x, w, _ = tensors(device)
    with tconv.recording() as calls:
        assert seen_by(path, device, torch.float64) == ["torch._native"]
        conv(x, w)  # which it leaves to us
    parity.assert_ours(calls, "fprop")
    tconv.disable()
    assert seen_by(path, device, torch.float64) == ["torch._native"]
    with tconv.recording() as calls:
        conv(x, w)
    assert calls == []
    with torch.backends.python_native.operations_disabled("_convolution"), tconv.enabled():
        assert seen_by(path, device, torch.float64) == ["tconv"]


# --- selections ---

SOME = [s for n in (1, 2) for s in itertools.combinations(("fprop", "dgrad", "wgrad"), n)]


@pytest.mark.parametrize("operations", SOME, ids="-".join)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_operations(operations, transposed, device, poisoned):
    """Those selected are ours, the others torch's and recorded, and all the results are right."""
    case = oracle.Case("", (2, 4, 5, 4), 6, (3, 2), stride=2, groups=2, transposed=transposed)
    function = (oracle.TRANSPOSED if transposed else oracle.FORWARD)[2]
    given = oracle.tensors(case, torch.float64, device)
    expected = oracle.run(function, case, *given)
    with tconv.enabled(operations=operations), tconv.recording() as calls:
        got = oracle.run(function, case, *given)
    same(got, expected)
    ours = {call.operation for call in calls if call.ours} - {"bias"}
    assert ours == set(operations)
    assert any(call.operation == "bias" for call in calls) == ("wgrad" in operations)
    left = [call.reason for call in calls if not call.ours]
    assert left
    assert all(f"is not selected by enable(operations={operations})" in reason for reason in left)


def test_ranks_and_dtypes(device):
    def taken(rank, dtype):
        x, w = (
            torch.ones(1, 1, *[3] * rank, dtype=dtype, device=device),
            torch.ones(1, 1, *[2] * rank, dtype=dtype, device=device),
        )
        with tconv.recording() as calls:
            y = getattr(F, f"conv{rank}d")(x, w)
        assert torch.equal(y, torch.full_like(y, 2**rank))
        return [call.ours for call in calls] == [True]

    ranks, dtypes = (1, 2, 3), (torch.float32, torch.float64)
    with tconv.enabled(ranks=(1, 3)):
        assert [taken(rank, torch.float64) for rank in ranks] == [True, False, True]
    with tconv.enabled(dtypes=(torch.float64,)):
        assert [taken(2, dtype) for dtype in dtypes] == [False, True]
    with tconv.enabled(ranks=[2], dtypes={torch.float64}):
        expected = {(rank, dtype): rank == 2 and dtype == torch.float64 for rank in ranks for dtype in dtypes}
        assert {kind: taken(*kind) for kind in expected} == expected
        with tconv.recording() as calls:
            taken(3, torch.float32)
    assert str(calls[0]) == (
        "aten::_convolution: torch (fprop of rank 3 in torch.float32 is not selected by"
        " enable(ranks=(2,), dtypes=(torch.float64,)))"
    )


def test_the_dtype_is_autocasts(device):
    x, w, _ = (t.detach().float() for t in tensors(device))
    with tconv.enabled(dtypes=(torch.bfloat16,)), tconv.recording() as calls, torch.autocast(device, dtype=torch.bfloat16):
        conv(x, w)
    parity.assert_ours(calls, "fprop")


def test_what_tconv_has_no_kernels_for_says_so(device):
    """A selection is no reason for a dtype that cannot be selected."""
    with tconv.enabled(ranks=(2,)), tconv.recording() as calls:
        F.conv1d(torch.ones(1, 1, 3, dtype=LEFT, device=device), torch.ones(1, 1, 2, dtype=LEFT, device=device))
    assert [call.reason for call in calls] == [f"dtype {LEFT}"]


def ours(device):
    """Which ranks are."""
    taken = []
    for rank in (1, 2, 3):
        with tconv.recording() as calls:
            getattr(F, f"conv{rank}d")(
                torch.ones(1, 1, *[2] * rank, device=device), torch.ones(1, 1, *[1] * rank, device=device)
            )
        taken += [rank for call in calls if call.ours]
    return taken


@pytest.mark.parametrize("ends", list(itertools.permutations("abc")), ids="".join)
def test_selections_add_up_and_end_in_any_order(ends, device):
    """Nobody's block, in whatever thread, takes from another's what it asked for."""
    selections, blocks = {"a": (1,), "b": (1, 2), "c": (3,)}, {}
    expected = set()

    def in_a_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    for name, ranks in selections.items():
        blocks[name] = tconv.enabled(ranks=ranks)
        in_a_thread(blocks[name].__enter__)
        expected |= {*ranks}
        assert ours(device) == sorted(expected)
    for name in ends:
        in_a_thread(lambda name=name: blocks[name].__exit__(None, None, None))
        del selections[name]
        assert ours(device) == sorted({rank for ranks in selections.values() for rank in ranks})


def test_disable_ends_the_newest_enable(device):
    tconv.enable(ranks=(1,))
    tconv.enable(ranks=(2,))
    with tconv.enabled(ranks=(3,)):
        tconv.disable()
        assert ours(device) == [1, 3]
    tconv.disable()
    assert ours(device) == []


def test_a_narrow_block_within_everything_changes_nothing(device):
    with tconv.enabled():
        with tconv.enabled(ranks=(1,)):
            assert ours(device) == [1, 2, 3]
        assert ours(device) == [1, 2, 3]


def test_toggling_forgets_nothing(device, monkeypatch):
    """What was worked out under a selection is there when it holds again, and is not that of another."""
    x, w, _ = tensors(device)
    prepared, real = [], aten._prepare_forward
    monkeypatch.setattr(aten, "_prepare_forward", lambda chosen, *args: prepared.append(chosen) or real(chosen, *args))
    kinds = [{}, {"ranks": (2,)}, {"operations": ("wgrad", "dgrad")}, {"ranks": (2, 3)}]
    for selection in kinds * 3:
        with tconv.enabled(**selection), tconv.recording() as calls:
            conv(x, w)
        assert [call.ours for call in calls] == ["operations" not in selection]
    assert len(prepared) <= len(kinds)  # fewer where an earlier test asked


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"operations": "fprop"}, TypeError, r"operations='fprop': a tuple of some of \('fprop', 'dgrad', 'wgrad'\) is wanted"),
        ({"operations": ("fprop", "bprop")}, ValueError, r"operations: 'bprop' is none of \('fprop', 'dgrad', 'wgrad'\)"),
        ({"operations": (1,)}, TypeError, r"operations: 1 is of type int; some of \('fprop', 'dgrad', 'wgrad'\) are wanted"),
        ({"operations": ()}, ValueError, r"operations=\(\) selects nothing: give some of"),
        ({"ranks": 2}, TypeError, r"ranks=2: a tuple of some of \(1, 2, 3\) is wanted, such as \(2,\)"),
        ({"ranks": (4,)}, ValueError, r"ranks: 4 is none of \(1, 2, 3\)"),
        ({"ranks": (True,)}, TypeError, r"ranks: True is of type bool"),
        ({"ranks": ("2d",)}, TypeError, r"ranks: '2d' is of type str"),
        ({"dtypes": torch.bfloat16}, TypeError, r"dtypes=torch.bfloat16: a tuple of some of \(torch.float16, .* is wanted"),
        ({"dtypes": (torch.int8,)}, ValueError, r"dtypes: torch.int8 is none of \(torch.float16, torch.bfloat16"),
        ({"dtypes": (torch.Tensor,)}, TypeError, r"dtypes: <class 'torch.Tensor'> is of type _TensorMeta"),
    ],
    ids=str,
)
def test_a_bad_selection_changes_nothing(given, error, text):
    for begin in (tconv.enable, lambda **given: tconv.enabled(**given).__enter__()):
        with pytest.raises(error, match=text):
            begin(**given)
        assert not tconv.is_enabled()
        assert not overridden()


def test_is_enabled():
    assert not tconv.is_enabled()
    with tconv.enabled(operations=("fprop",), ranks=(1, 2)):
        assert tconv.is_enabled()
        assert tconv.is_enabled(operation="fprop", rank=2, dtype=torch.float32)
        assert not tconv.is_enabled(rank=3)
        assert not tconv.is_enabled(operation="dgrad")
        with tconv.enabled(operations=("dgrad",), ranks=(3,)):
            assert tconv.is_enabled(rank=3)
            assert tconv.is_enabled(operation="dgrad")
            assert not tconv.is_enabled(operation="dgrad", rank=2)  # neither of the two asks for it
        with pytest.raises(ValueError, match="ranks: 4 is none of"):
            tconv.is_enabled(rank=4)
    assert not tconv.is_enabled()


def test_a_backward_in_parts_of_any_order(device):
    """A gradient of a gradient, some of it ours."""
    leaves = tensors(device)

    def twice(x, w, b):
        y = conv(x, w, b)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return dx.square().sum() + dw.square().sum()

    expected = losses(twice)(*leaves)
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(tconv.recording())
        stack.enter_context(tconv.enabled(operations=("dgrad", "fprop")))
        same(losses(twice)(*leaves), list(expected))
    assert {call.operation for call in calls if call.ours} == {"fprop", "dgrad"}
