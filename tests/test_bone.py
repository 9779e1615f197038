"""Bone: exact against the formula of the paper, never holding a tensor of the weight's shape."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_bone.peft.adapter import ceil_div, inject
from rwkv_bone.peft.bone import BoneLinear
from rwkv_bone.peft.rounding import add_rounded_, dithered


def dense(weight, bone):
    """W'_ij = W_ij + W_ij B_j + B_j, block by block as the paper writes it, on a zero-padded weight."""
    out, in_ = weight.shape
    r = bone.shape[-1]
    padded = weight.new_zeros(ceil_div(out, r) * r, ceil_div(in_, r) * r)
    padded[:out, :in_] = weight
    rows = []
    for i in range(0, padded.shape[0], r):
        row = [padded[i : i + r, j * r : j * r + r] for j in range(len(bone))]
        rows.append(torch.cat([block + block @ b + b for block, b in zip(row, bone)], 1))
    return torch.cat(rows)[:out, :in_]


def layer(out, in_, r, dtype=torch.float64):
    torch.manual_seed(out + in_ + r)
    made = BoneLinear(torch.randn(out, in_, dtype=dtype), BoneLinear.Config(r))
    torch.nn.init.normal_(made.bone)
    return made


SHAPES = [(8, 12, 4), (12, 8, 4), (10, 14, 4), (5, 3, 4), (7, 7, 7), (9, 9, 1), (3, 3, 64), (64, 128, 64)]


@pytest.mark.parametrize(("out", "in_", "r"), SHAPES)
def test_output_and_gradients_equal_the_materialised_formula(out, in_, r):
    bone = layer(out, in_, r)
    x = torch.randn(2, 5, in_, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, out, dtype=torch.float64)
    ours = bone(x)
    truth = x @ dense(bone.weight, bone.bone).T
    torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, bone.bone), g), torch.autograd.grad(truth, (x, bone.bone), g)):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(("out", "in_", "r"), SHAPES)
def test_the_merged_weight_is_the_formulas(out, in_, r):
    bone = layer(out, in_, r)
    torch.testing.assert_close(bone.merged_weight(), dense(bone.weight, bone.bone), rtol=1e-14, atol=1e-14)


class NewTensors(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes anew, and not of views of the given ones."""

    def __init__(self, *given):
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.sizes += [t.numel() for t in tensors if t.untyped_storage().data_ptr() not in self.given]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_make_no_tensor_as_large_as_the_weight(dtype):
    bone = layer(256, 512, 16, dtype)
    x = torch.randn(3, 512, dtype=dtype, requires_grad=True)
    with NewTensors(x, bone.weight, bone.bone) as seen:
        bone(x).sum().backward()
    assert 3 * 512 <= max(seen.sizes) <= bone.bone.numel() < bone.weight.numel() / 15
    with NewTensors(x, bone.weight, bone.bone) as seen:  # the watch itself would see it
        x @ dense(bone.weight, bone.bone.to(dtype)).T
    assert max(seen.sizes) == bone.weight.numel()


def test_nothing_is_kept_for_backward_but_x_the_weight_and_b():
    bone = layer(16, 24, 8)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        bone(x)
    assert set(kept) <= {x.data_ptr(), bone.weight.data_ptr(), bone.bone.data_ptr()}


def test_a_fresh_adapter_changes_no_logit(make_model):
    model = make_model(dtype=torch.float32)
    idx = torch.randint(50, (2, 9))
    before = model(idx)[0]
    names = inject(model, BoneLinear, BoneLinear.Config(8))
    assert len(names) == 2 * 6 and all(name.split(".")[2] in ("att", "ffn") for name in names)
    assert torch.equal(model(idx)[0], before)


def test_b_is_trained_in_float32_on_a_bf16_base(make_model):
    model = make_model(dtype=torch.bfloat16)
    inject(model, BoneLinear, BoneLinear.Config(8))
    loss = model(torch.randint(50, (1, 5)))[0].float().square().mean()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"bone"}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in trained.values())
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if name not in trained)


# ---------------------------------------------------------------- what bf16 keeps


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
