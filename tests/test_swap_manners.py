"""What replace_ and restore_ say of bad input, and that one that raises leaves the model as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tconv
from tconv import distributed
from tests import parity, third_party
from tests.test_swap import classes


def model():
    layers = (
        nn.Conv2d(3, 4, 3),
        third_party.Documented(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.LazyConv2d(2, 1),
        third_party.Same(2, 2, 3),
    )
    made = nn.Sequential(*layers)
    parametrizations.weight_norm(made[2])
    made[0].kept = made[0].forward  # a bound method
    return made


def state(m):
    """Everything of a model that is to stay: classes, and attributes by identity."""
    return [(name, type(part), {key: id(value) for key, value in vars(part).items()}) for name, part in m.named_modules()]


class Broken(Exception):
    pass


def breaking(count):
    """A function that raises at its nth call."""
    calls = []

    def call(*_):
        calls.append(None)
        if len(calls) == count:
            raise Broken
        return True

    return call


@pytest.mark.parametrize("function", [tconv.replace_, tconv.restore_])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "takes a torch.nn.Module, but got a NoneType"),
        ([nn.Conv2d(1, 1, 1)], "but got a list: give it one model, or several in a torch.nn.ModuleList"),
        (torch.ones(1), "but got a Tensor"),
        (nn.Conv2d, "takes a model, but got the class Conv2d: make an object of it first"),
        (nn.functional.conv2d, r"but got a builtin_function_or_method.*convolutions outside of modules.*tconv.enable\(\)"),
        ({"weight": torch.ones(1)}, "but got a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_module(function, given, text):
    with pytest.raises(TypeError, match=rf"tconv\.{function.__name__} {text}" if text.startswith("takes") else text):
        function(given)


def test_what_is_no_module_to_the_layers_of_dtensors():
    with pytest.raises(TypeError, match=r"tconv\.distributed\.replace_ takes a torch.nn.Module, but got a list"):
        distributed.replace_([])


@pytest.mark.parametrize("function", [tconv.replace_, tconv.restore_])
def test_arguments_that_cannot_be_called(function):
    m = nn.Conv2d(1, 1, 1)
    before = state(m)
    with pytest.raises(
        TypeError, match=f"{function.__name__}: filter_fn is called with each module and its name, but got a list"
    ):
        function(m, ["0"])
    with pytest.raises(TypeError, match=f"{function.__name__}: report is True or is called with each line, but got a str"):
        function(m, report="yes")
    assert state(m) == before


def test_true_prints(capsys):
    m = nn.Sequential(nn.Conv1d(1, 1, 1))
    tconv.replace_(m, report=True)
    tconv.restore_(m, report=True)
    assert capsys.readouterr().out == "0: torch.nn.Conv1d -> tconv.Conv1d\n0: tconv.Conv1d -> torch.nn.Conv1d\n"
    tconv.replace_(m, report=False)
    tconv.restore_(m)
    assert capsys.readouterr().out == ""


def test_warnings_name_the_callers_line():
    with pytest.warns(UserWarning, match="no convolution layer in this ReLU") as caught:
        tconv.replace_(nn.ReLU())
    assert caught[0].filename == __file__
    with pytest.warns(
        UserWarning, match=r"none of the 1 convolutions of this Sequential: 0: Same left alone: it overrides"
    ) as caught:
        tconv.replace_(nn.Sequential(third_party.Same(1, 1, 1)))
    assert caught[0].filename == __file__


def test_what_the_user_asked_for_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tconv.replace_(nn.Conv1d(1, 1, 1), lambda *_: False)
        m = tconv.replace_(nn.Conv1d(1, 1, 1))
        tconv.replace_(m)
        tconv.replace_(tconv.Conv1d(1, 1, 1))
        m = nn.Sequential(nn.Conv2d(1, 1, 1), third_party.Same(1, 1, 1))
        tconv.replace_(tconv.replace_(m))
        tconv.restore_(nn.ReLU())


def test_restoring_says_what_it_leaves():
    m, lines = tconv.replace_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))), []
    m[0].__class__ = third_party.Same
    tconv.restore_(m, lambda *_: False, report=lines.append)
    assert lines == [
        "0: Same left alone: it was given this class after replace_",
        "1: Conv2d left alone by filter_fn",
    ]


@pytest.mark.parametrize("argument", ["filter_fn", "report"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_replace_that_raises_leaves_the_model_as_it_was(argument, at):
    m = model()
    before = state(m)
    with pytest.raises(Broken):
        tconv.replace_(m, **{argument: breaking(at)})
    assert state(m) == before
    tconv.replace_(m)
    assert sum(isinstance(part, (tconv.Conv2d, tconv.LazyConv2d)) for part in m) == 4


@pytest.mark.parametrize("argument", ["filter_fn", "report"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_restore_that_raises_leaves_the_model_as_it_was(argument, at):
    m = model()
    original = classes(m)
    tconv.replace_(m)
    before = state(m)
    with pytest.raises(Broken):
        tconv.restore_(m, **{argument: breaking(at)})
    assert state(m) == before
    tconv.restore_(m)
    assert {k: v for k, v in classes(m).items() if k != "2"} == {k: v for k, v in original.items() if k != "2"}


def test_a_class_that_cannot_be_assigned():
    """The last of the layers: those before it are torch.nn's again."""
    m = nn.Sequential(*model(), third_party.Stubborn(2, 2, 1))
    before = state(m)
    text = r"^5: tests.third_party.Stubborn cannot become tconv.Stubborn \(.*\). The model is as it was; filter_fn can leave"
    with pytest.raises(RuntimeError, match=text):
        tconv.replace_(m)
    assert state(m) == before
    tconv.replace_(m, lambda _, name: name != "5")
    assert isinstance(m[0], tconv.Conv2d)


def test_an_interrupted_change_is_undone(monkeypatch):
    from tconv import swap

    m, become, calls = model(), swap.become, []
    before = state(m)

    def interrupted(module, target):
        become(module, target)
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(swap, "become", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tconv.replace_(m)
    assert state(m) == before


def test_a_setattr_of_the_users_is_not_asked():
    class Frozen(nn.Conv2d):
        def __setattr__(self, name, value):
            if self.__dict__.get("frozen"):
                raise AttributeError(f"frozen: {name}")
            super().__setattr__(name, value)

    m = Frozen(3, 4, 1)
    m.frozen = True
    assert isinstance(tconv.replace_(m), tconv.Conv2d)
    assert type(tconv.restore_(m)) is Frozen


# --- lazy layers and repr ---


@pytest.mark.parametrize("name", parity.LAZY)
def test_lazy_layers_are_instances_of_the_eager_ones(name):
    assert issubclass(getattr(nn, name), getattr(nn, name.removeprefix("Lazy")))
    assert issubclass(getattr(tconv, name), getattr(tconv, name.removeprefix("Lazy")))


@pytest.mark.parametrize("name", parity.LAZY)
def test_errors_of_lazy_layers(name):
    args = (6, 3)

    def calls(library):
        make = getattr(library, name)
        yield lambda: make(*args)(torch.ones(3))
        yield lambda: make(*args)()
        yield lambda: make(*args)(torch.ones(1, 4, 5, 5, 5, 5, 5))
        yield lambda: make(*args, groups=3)(torch.ones(1, 4, *(5,) * parity.rank(name)))
        yield lambda: make(*args, padding_mode="wrong")
        yield lambda: make(*args, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
        yield lambda: copy.deepcopy(make(*args)).get_parameter("none")

    for ours, torchs in zip(calls(tconv), calls(nn), strict=True):
        got, expected = parity.outcome(ours), parity.outcome(torchs)
        assert isinstance(expected, tuple)
        assert got == expected


def test_a_whole_models_text():
    m = tconv.replace_(nn.Sequential(nn.Conv2d(3, 8, 3), third_party.Documented(8, 8, 1, note="n")))
    assert repr(m) == (
        "Sequential(\n"
        "  (0): tconv.Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))\n"
        "  (1): tconv.Documented(8, 8, kernel_size=(1, 1), stride=(1, 1), note='n')\n"
        ")"
    )


def test_a_text_of_the_users_stays():
    class Short(nn.Conv2d):
        def __repr__(self):
            return "short"

    assert repr(tconv.replace_(Short(1, 1, 1))) == "short"


def test_an_initialiser_that_compares_types():
    """What docs/swapping.md says of them, and its two remedies."""

    def initialise(m):
        if type(m) == nn.Conv2d:  # noqa: E721 - as they are written
            nn.init.zeros_(m.weight)

    def robust(m):
        if isinstance(m, nn.Conv2d):
            nn.init.zeros_(m.weight)

    replaced = tconv.replace_(nn.Conv2d(3, 4, 1))
    replaced.apply(initialise)
    assert replaced.weight.any()
    replaced.apply(robust)
    assert not replaced.weight.any()
    before = nn.Conv2d(3, 4, 1).apply(initialise)
    assert not tconv.replace_(before).weight.any()


def test_replacing_draws_no_random_number_and_calls_no_layer(device):
    m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()).to(device)
    rng = torch.get_rng_state()
    with tconv.recording() as calls:
        tconv.restore_(tconv.replace_(m))
    assert calls == []
    assert torch.equal(torch.get_rng_state(), rng)
