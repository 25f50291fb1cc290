"""Kernels may be named as the listing shows them, or by the shorter C++ names that people use."""

import numpy as np
import pytest

from support.kernels import SCALE
from torchext import _sim, sim

SYMBOLS = {
    "_Z5scalePfS_fj": "scale(float*, float*, float, unsigned int)",
    "_Z5scaleILi128EEvPfPffj": "void scale<128>(float*, float*, float, unsigned int)",
    "_ZN2ns5inner5scaleEPf": "ns::inner::scale(float*)",
    "_ZN12_GLOBAL__N_15scaleEPf": "(anonymous namespace)::scale(float*)",
    "_ZN8__main__3addB2v1E5ArrayIfLi1EE": "__main__::add[abi:v1](Array<float, 1>)",
    "scale": "scale",
    "_Z": "_Z",
    "triton_poi_fused_0": "triton_poi_fused_0",
}


def module(*symbols):
    head, body = SCALE.split(".visible", 1)
    kernels = "".join(".visible" + body.replace("entry scale", f"entry {s}") for s in symbols)
    return sim.Module(head + kernels)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_signatures(symbol):
    kernel = module(symbol).kernel(symbol)
    assert kernel.name == symbol and kernel.signature == SYMBOLS[symbol]


@pytest.mark.parametrize(
    "symbol, short",
    [
        ("_Z5scalePfS_fj", "scale"),
        ("_Z5scaleILi128EEvPfPffj", "scale<128>"),
        ("_ZN2ns5inner5scaleEPf", "ns::inner::scale"),
        ("_ZN12_GLOBAL__N_15scaleEPf", "(anonymous namespace)::scale"),
        ("_Z1kI3FooIiEEvT_", "k<Foo<int> >"),
        ("_Z1kPFvvE", "k"),
        ("plain", "plain"),
    ],
)
def test_short_names(symbol, short):
    assert _sim.short_name(symbol) == short


@pytest.mark.parametrize(
    "name, symbol",
    [
        ("scale", "_Z5scalePfS_fj"),
        ("scale(float*, float*, float, unsigned int)", "_Z5scalePfS_fj"),
        ("other", "_Z5otherILi128EEvPfPffj"),
        ("other<128>", "_Z5otherILi128EEvPfPffj"),
        ("void other<128>(float*, float*, float, unsigned int)", "_Z5otherILi128EEvPfPffj"),
        ("ns::third", "_ZN2ns5thirdEPfPffj"),
        ("third", "_ZN2ns5thirdEPfPffj"),
        ("_ZN2ns5thirdEPfPffj", "_ZN2ns5thirdEPfPffj"),
        ("hidden", "_ZN12_GLOBAL__N_16hiddenEPfPffj"),
        ("add", "_ZN8__main__3addB2v1EPfPffj"),
    ],
)
def test_plain_names_are_accepted(name, symbol):
    many = module(
        "_Z5scalePfS_fj",
        "_Z5otherILi128EEvPfPffj",
        "_ZN2ns5thirdEPfPffj",
        "_ZN12_GLOBAL__N_16hiddenEPfPffj",
        "_ZN8__main__3addB2v1EPfPffj",
    )
    assert many.kernel(name).name == symbol
    many.check(name)
    x, y = np.ones(4, np.float32), np.zeros(4, np.float32)
    report = many.launch(name, grid=1, block=32, args=[x, y, 2, 4])
    assert report.ok and report.kernel == symbol and (y == 2).all()
    assert str(report).startswith(f"kernel '{_sim.short_name(symbol)}': no findings")


def test_a_symbol_comes_before_a_plain_name():
    assert module("_Z5scalePfS_fj", "scale").kernel("scale").name == "scale"


def test_names_that_fit_several_kernels_are_refused():
    two = module("_Z5scaleILi128EEvPfPffj", "_Z5scaleILi256EEvPfPffj")
    with pytest.raises(ValueError, match=r"got 'scale', which 2 share.* 'void scale<128>\(.*256"):
        two.kernel("scale")
    assert two.kernel("scale<256>").name == "_Z5scaleILi256EEvPfPffj"
    with pytest.raises(ValueError, match=r"got 'scales'.*; the module has void scale<128>"):
        two.kernel("scales")
