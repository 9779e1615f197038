"""What bf16 keeps of Bone's updates: sums that are rounded up or down by chance, and so are right on average.

That Bone is its formula, at what memory, is tested with all methods in test_methods.py.
"""

import math

import pytest
import torch

from rwkv_bone.peft.bone import BoneLinear
from rwkv_bone.peft.rounding import add_rounded_, dithered


def share_that_arrives(y, base, change):
    """The least-squares factor of `change` in y - base: 1 if all of it is there, 0 if it was rounded away."""
    return (((y.double() - base) * change).sum() / change.square().sum()).item()


@pytest.mark.parametrize("inputs", ["normal", "relu squared"])  # what att and ffn.value are given
def test_the_update_of_a_just_started_adapter_arrives_whole_in_bf16(inputs):
    torch.manual_seed(0)
    n, in_, out, r, size = 1024, 1024, 1024, 64, 2e-5  # one step of Adam away from zero, at the usual learning rate
    weight = (torch.randn(out, in_) / in_**0.5).bfloat16()
    bone = BoneLinear(weight, BoneLinear.Config(r))
    with torch.no_grad():
        bone.bone.copy_(size * torch.randn(bone.bone.shape).sign())
    x = torch.randn(n, in_).bfloat16()
    x = x if inputs == "normal" else torch.relu(x).square()
    base = x.double() @ weight.double().T
    change = x.double() @ (bone.merged_weight().double() - weight.double()).T
    y = bone(x)
    assert y.dtype == torch.bfloat16
    assert abs(share_that_arrives(y, base, change) - 1) < 0.01
    # the noise is hardly more than the rounding of y alone, which a frozen projection has too
    assert (y.double() - base - change).norm() < 1.2 * ((x @ weight.T).double() - base).norm()
    # the plain ways lose most of it: W' rounded to bf16, and x + u rounded to the nearest
    rounded = x @ bone.merged_weight().bfloat16().T
    assert share_that_arrives(rounded, base, change) < 0.5
    u = torch.einsum("nji,jki->njk", x.view(n, -1, r), bone.bone.bfloat16())
    nearest = (x + u.flatten(1)) @ weight.T + u.sum(1).repeat(1, out // r)
    assert share_that_arrives(nearest, base, change) < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_sum_is_right_on_average_and_next_to_the_sum(dtype):
    torch.manual_seed(0)
    x = torch.randn(512, 384).to(dtype)
    eps = torch.finfo(dtype).eps
    for size in (1e-3, 0.03, 0.4, 3.0, 100.0):  # of u, in units in the last place of x
        u = (size * eps * x.float().abs() * torch.rand(x.shape)).to(dtype)
        exact = x.double() + u.double()
        made = add_rounded_(u.clone(), x).double()
        assert ((made - exact).abs() <= eps * exact.abs()).all()
        error = (made - exact).mean() / (eps * exact.abs().mean())
        assert abs(error) < 0.01 * min(1, size) + 1e-4
        by_row = ((made - exact).mean(1) / exact.abs().mean(1) / eps).abs().max()
        assert by_row < 0.1  # 0.5 is what chance would give at most now and then: the pattern is even


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_sum_leaves_alone_what_the_dtype_holds(dtype):
    x = torch.tensor([[0.0, -0.0, 1.0, -3.0, 2.0**-20, 60000.0, math.inf, -math.inf, math.nan]]).to(dtype).repeat(500, 1)
    made = add_rounded_(torch.zeros_like(x), x)
    torch.testing.assert_close(made, x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(add_rounded_(x.clone(), x)[:, :5], 2 * x[:, :5])
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    assert dithered(nans.repeat(500, 1), dtype).isnan().all()


def test_a_rounded_sum_is_exact_in_float32_and_the_same_each_time_in_bf16():
    x, u = torch.randn(2, 30, 20)
    assert torch.equal(add_rounded_(u.clone(), x), x + u)
    x, u = x.bfloat16(), u.bfloat16()
    assert torch.equal(add_rounded_(u.clone(), x), add_rounded_(u.clone(), x))
