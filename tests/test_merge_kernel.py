"""The kernel that rounds merged weights does as torch does, and its sums are those defined in float64."""

import itertools

import pytest
import torch

from rwkv_bone.merging.merge import Effect
from rwkv_bone.ops import rounding
from tests.test_merge import arguments, base, paths, run  # noqa: F401

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(params=rounding.kernels.variants)
def variant(request, monkeypatch):
    monkeypatch.setattr(rounding.kernels, "variants", [request.param])


def values(n: int, dtype: torch.dtype):
    """Weights of all sizes, and what they become: some unchanged, some at the borders of fp16 and of its subnormals."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low, high):
        size = 10 ** (low + (high - low) * torch.rand(n, generator=generator))
        return torch.randn(n, generator=generator) * size

    before = numbers(-9, 3).to(dtype)
    exact = before.float() + numbers(-10, 2)
    exact[::7] = before[::7].float()
    edges = [65504, 65519.9, 2.0**-14, 2.0**-14 - 2.0**-25, 6.1e-5, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 3 * 2.0**-25, 1e-40, 0.0]
    exact[1::5][: 2 * len(edges)] = torch.tensor([*edges, *(-x for x in edges)])
    return before, exact


def same_bits(a, b):
    same = a.view(BITS[a.dtype]) == b.view(BITS[b.dtype])
    return bool((same | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("n", [1, 31, 4099])
@pytest.mark.parametrize(("of", "to"), [*itertools.product(rounding.TYPES, rounding.TYPES)])
def test_it_rounds_as_torch_does_and_sums_what_is_defined(variant, of, to, n):
    before, exact = values(4099, of)
    before, exact = before[-n:], exact[-n:]
    rounded = torch.full((n + 1,), 7, dtype=to)
    found = rounding.effect(before, exact, rounded[:n])
    wanted = exact.to(to)
    assert same_bits(rounded[:n], wanted) and rounded[n] == 7
    b, e, r = before.double(), exact.double(), wanted.double()
    squares = [x.square().sum().item() for x in (b, e - b, r - e)]
    assert found[:3] == pytest.approx(squares, rel=1e-5)
    moved = e != b
    assert found[3:] == (moved.sum(), (moved & (r == before.to(to).double())).sum())


@pytest.mark.parametrize("to", rounding.TYPES)
def test_infinity_and_nan_stay_and_are_seen(variant, to):
    for value in (torch.nan, torch.inf, -torch.inf, 3e38 if to == torch.float16 else torch.nan):
        exact = torch.ones(100)
        exact[37] = value
        rounded = torch.empty(100, dtype=to)
        sums = rounding.effect(torch.ones(100).to(to), exact, rounded)
        assert same_bits(rounded, exact.to(to)) and not torch.tensor(sums.lost).isfinite()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_that_float_does_not_hold_are_summed(variant, size):
    before, exact = torch.full((1000,), size), torch.full((1000,), size * 1.5)
    sums = rounding.effect(before, exact, torch.empty(1000, dtype=torch.bfloat16))
    assert sums.weight == pytest.approx(1000 * size**2, rel=1e-5)
    assert sums.update == pytest.approx(250 * size**2, rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--dtype", "fp16"]])
def test_file_and_report_are_those_of_torchs_operations(flags, paths, monkeypatch, capsys):  # noqa: F811
    """Also without a compiler, and where panels are no whole tensors."""
    found = []
    for large in (1, 1 << 62):
        monkeypatch.setattr(rounding, "LARGE", large)
        run(*arguments(paths, "--overwrite", *flags))
        report = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("written")]
        found.append((paths["out"].read_bytes(), report))
    assert found[0] == found[1]


def test_what_it_does_not_take_is_left_to_torch(monkeypatch):
    large = torch.zeros(rounding.LARGE)
    assert rounding.fits(large, large) and rounding.fits(large.bfloat16(), large.half())
    for before, rounded in ((large, large[1:]), (large.double(), large), (large, large.double())):
        assert not rounding.fits(before, rounded)
    effect, exact = Effect(), large.double() + 1
    effect.round(large, [(slice(None), exact)], torch.empty_like(large))
    assert (effect.moved, effect.update) == (rounding.LARGE, rounding.LARGE)
