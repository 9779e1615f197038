"""What is made again in backward has the gradients of what is kept, and is not kept."""

import pytest
import torch
from torch import nn

from rwkv_bone.ops.recompute import recompute_in_backward, recomputed
from rwkv_bone.peft import METHODS, inject
from tests.conftest import each_version
from tests.watch import peak_bytes


class Case(nn.Module):
    """y = (w a + x) W1 + (a x) W2 with a = tanh(x w): two outputs of a region, read by products that keep them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.W1, self.W2 = (nn.Parameter(torch.randn(n, 8, dtype=torch.float64)) for n in (8, 8, 8))

    def region(self, x, unused):
        a = torch.tanh(x @ self.w)
        return a * self.w[0] + x, a * x

    def forward(self, x, again: bool):
        if not again:
            p, q = self.region(x, None)
            return p @ self.W1 + q.view(-1, 8).mT.contiguous().mT @ self.W2
        with recompute_in_backward(self.region, x, None, trained=[self.w]) as (p, q):
            return p @ self.W1 + q.view(-1, 8).mT.contiguous().mT @ self.W2


@pytest.mark.parametrize("x_wants", [False, True])
@pytest.mark.parametrize("trained", [("w", "W1", "W2"), ("W1", "W2"), ("w",), ("W2",)])
def test_gradients_are_those_of_plain_autograd(x_wants, trained):
    case = Case().requires_grad_(False)
    wanted = [case.get_parameter(name).requires_grad_() for name in trained]
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=x_wants)
    wanted += [x] * x_wants
    for kept, again in zip(*(torch.autograd.grad(case(x, again).square().sum(), wanted) for again in (False, True))):
        assert torch.equal(kept, again)


def test_a_second_backward_makes_it_once_more():
    case, x = Case(), torch.randn(5, 8, dtype=torch.float64)
    loss = case(x, True).square().sum()
    first, second = (torch.autograd.grad(loss, case.w, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)


def test_without_gradients_nothing_is_different():
    case, x = Case(), torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(case(x, True), case(x, False))


def test_a_recomputed_function_draws_the_same_random_numbers():
    x = torch.ones(1000, requires_grad=True)
    (y,) = recomputed(lambda x: (torch.dropout(x, 0.5, True),), x)
    y.sum().backward()
    assert torch.equal(y.detach(), x.grad)


@each_version
@pytest.mark.parametrize("grad_cp", [False, True])
def test_a_layer_keeps_no_mixed_inputs(make_model, grad_cp):
    """In units of n_embd for a token, less than 16 are kept, most by products and the recurrence; with grad_cp 1."""
    C, T = 64, 128
    sizes = {"n_embd": C, "dim_att": C, "dim_ffn": 3 * C + C // 2, "head_size": 64}

    def step_of(layers: int):
        model = make_model(dtype=torch.float32, n_layer=layers, **sizes)
        inject(model, METHODS["bone"], METHODS["bone"].Config(8))
        model = model.with_execution(grad_cp=grad_cp)
        idx = torch.randint(50, (1, T))
        return lambda: model.hidden(idx)[0].sum().backward()

    few, many = (peak_bytes(step_of(layers)) for layers in (2, 6))
    a_layer = (many - few) / 4 / (4 * C * T)
    assert a_layer < (2.5 if grad_cp else 17.5)  # gradients of its adapters are 1 to 2 of it
