"""Each step is taken at its schedule's rate, each parameter at its own multiple of it, and small steps are not lost in bf16."""

import math

import pytest
import torch
from torch import nn

from rwkv_bone.config import TrainConfig
from rwkv_bone.peft import METHODS, inject, train_parts
from rwkv_bone.training.optimiser import MasterAdamW, make_optimiser
from tests.runs import lines, make_world, run_to_end

# rate at progress p from 0 to 1, from 1e-2 to 1e-4
FORMULAS = {
    "exp": lambda p: 1e-2 * 1e-2**p,
    "cos": lambda p: 1e-4 + 0.99e-2 * (1 + math.cos(math.pi * p)) / 2,
    "wsd": lambda p: 1e-2 if p <= 0.8 else 1e-2 - 0.99e-2 * (p - 0.8) / 0.2,
    "linear": lambda p: 1e-2 - 0.99e-2 * p,
    "constant": lambda p: 1e-2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("optimiser"))


@pytest.mark.parametrize("schedule", FORMULAS)
def test_the_schedule_runs_over_optimiser_steps_also_where_micro_batches_are_accumulated(world, schedule):
    flags = ("--lr_init", 1e-2, "--lr_final", 1e-4, "--lr_schedule", schedule, "--warmup_steps", 3)
    more = ("--micro_bsz", 2, "--accumulate_grad_batches", 5, "--epoch_count", 2)
    assert run_to_end(world, *flags, *more, name=schedule).codes == [0]
    steps = 2 * math.ceil(24 / 2 / 5)
    warm_up = [0.01 + 0.99 * min(step / 3, 1) for step in range(steps)]
    expected = [FORMULAS[schedule](step / (steps - 1)) * warm_up[step] for step in range(steps)]
    assert [line["lr"] for line in lines(world / schedule)] == pytest.approx(expected, rel=1e-9)


def groups(model, **flags):
    optimiser = make_optimiser(model, TrainConfig(data_file="-", **flags))
    found = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("layerwise_lr", "multiple"), [(1, 2), (0, 1)])
def test_time_decay_learns_at_twice_the_rate_by_layerwise_lr(make_model, layerwise_lr, multiple):
    model = make_model(dtype=torch.float32)
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    train_parts(model, ["time", "ln"])
    of = groups(model, layerwise_lr=layerwise_lr, lr_init=1e-3)
    for name, group in of.items():
        assert group["lr_multiplier"] == (multiple if name.endswith("time_decay") else 1), name
        assert group["lr"] == pytest.approx(1e-3 * group["lr_multiplier"])


def test_lora_plus_has_its_own_rate_for_b(make_model):
    model = make_model(dtype=torch.float32)
    method = METHODS["lora_plus"]
    inject(model, method, method.Config(r=4))
    of = groups(model)
    a, b = (of[f"blocks.0.att.key.lora_{which}"]["lr_multiplier"] for which in "AB")
    assert b > a == 1


def test_weight_decay_is_on_matrices_alone(make_model):
    model = make_model(dtype=torch.float32)
    for name, group in groups(model, weight_decay=0.1).items():
        matrix = model.get_parameter(name).squeeze().ndim >= 2
        assert group["weight_decay"] == (0.1 if matrix else 0), name


def test_steps_below_the_resolution_of_bf16_add_up():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = MasterAdamW([{"params": [p]}], lr=1e-3)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimiser.step()
        optimiser.zero_grad()
        assert p.grad is None
    assert p.dtype == torch.bfloat16 and torch.allclose(p.float(), torch.full((3,), 0.98), atol=2**-8)


def test_the_state_goes_on_bitwise_masters_too():
    torch.manual_seed(0)
    gradients = torch.randn(6, 4)

    def steps(optimiser, p, rows):
        for row in rows:
            p.grad = row.to(p.dtype)
            optimiser.step()

    whole, half, rest = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(3))
    steps(MasterAdamW([{"params": [whole]}], lr=1e-3), whole, gradients)
    first, second = (MasterAdamW([{"params": [p]}], lr=1e-3) for p in (half, rest))
    steps(first, half, gradients[:3])
    rest.data.copy_(half)
    second.load_state_dict(first.state_dict())
    steps(second, rest, gradients[3:])
    assert torch.equal(whole, rest)
