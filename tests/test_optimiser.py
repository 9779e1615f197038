"""Each step is taken at its schedule's rate, each parameter at its own multiple of it, and small steps are not lost in bf16."""

import math

import pytest
import torch
from torch import nn

from rwkv_bone.config import TrainConfig
from rwkv_bone.peft import METHODS, inject
from rwkv_bone.training.optimiser import MasterWeights, make_optimiser
from rwkv_bone.training.schedule import learning_rate
from tests.conftest import each_version
from tests.runs import lines, make_world, run_to_end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("optimiser"))


def rwkv_lm(s, S, W, a, b, shape):
    """The formulas of RWKV-LM's trainer (exp, linear) and RWKV-PEFT's (cos, warmup_cos), written as they publish them."""
    match shape:
        case "exp" | "linear":
            progress = max(0, min(1, (s - W + 1) / (S - W)))
            rate = math.exp(math.log(a) + (math.log(b) - math.log(a)) * progress) if shape == "exp" else a + (b - a) * progress
            return rate * (0.2 + 0.8 * s / W) if s < W else rate
        case "cos":  # there without a warm-up
            return b + 0.5 * (a - b) * (1 + math.cos(math.pi * s / S))
        case "warmup_cos":
            return a * s / W if s < W else b + 0.5 * (a - b) * (1 + math.cos(math.pi * (s - W) / (S - W)))


@pytest.mark.parametrize(("shape", "W"), [("exp", 0), ("exp", 7), ("linear", 0), ("linear", 7), ("cos", 0), ("warmup_cos", 7)])
def test_the_schedule_is_rwkv_lms_and_rwkv_pefts(shape, W):
    for s in range(30):
        assert learning_rate(s, 30, shape, 1e-2, 1e-4, W) == pytest.approx(rwkv_lm(s, 30, W, 1e-2, 1e-4, shape), rel=1e-12)


def test_wsd_is_stable_then_falls_in_the_last_fifth():
    rates = [learning_rate(s, 100, "wsd", 1e-2, 1e-3) for s in range(100)]
    assert rates[:79] == [1e-2] * 79 and rates[99] == pytest.approx(1e-3)
    assert rates[89] == pytest.approx(5.5e-3)


def test_the_schedule_runs_over_optimiser_steps_also_where_micro_batches_are_accumulated(world):
    flags = ("--lr_init", 1e-2, "--lr_final", 1e-4, "--warmup_steps", 3)
    more = ("--micro_bsz", 2, "--accumulate_grad_batches", 5, "--epoch_count", 2)
    assert run_to_end(world, *flags, *more, name="accumulated").codes == [0]
    steps = 2 * math.ceil(24 / 2 / 5)
    expected = [rwkv_lm(s, steps, 3, 1e-2, 1e-4, "exp") for s in range(steps)]
    assert [line["lr"] for line in lines(world / "accumulated")] == pytest.approx(expected, rel=1e-9)


def groups(model, **flags):
    optimiser = make_optimiser(model, TrainConfig(data_file="-", **{"lr_init": 1e-4, **flags}))
    found = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@each_version
@pytest.mark.parametrize(("layerwise_lr", "multiple"), [(1, 2), (0, 1)])
def test_the_decay_learns_at_twice_the_rate_by_layerwise_lr(version, make_model, layerwise_lr, multiple):
    """RWKV-LM: time_decay of RWKV-6, w0 of RWKV-7."""
    model = make_model(dtype=torch.float32)
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    model.train_parts(["time", "ln"])
    decay = {"x060": ".time_decay", "x070": ".w0"}[version]
    of = groups(model, layerwise_lr=layerwise_lr, lr_init=1e-3)
    for name, group in of.items():
        assert group["lr_multiplier"] == (multiple if name.endswith(decay) else 1), name
        assert group["lr"] == pytest.approx(1e-3 * group["lr_multiplier"])


def test_lora_plus_has_its_own_rate_for_b(make_model):
    model = make_model(dtype=torch.float32)
    method = METHODS["lora_plus"]
    inject(model, method, method.Config(r=4))
    of = groups(model)
    a, b = (of[f"blocks.0.att.key.lora_{which}"]["lr_multiplier"] for which in "AB")
    assert b > a == 1


@each_version
def test_weight_decay_is_by_rwkv_lms_rule_and_on_the_adapters_matrices(make_model):
    """RWKV-LM decays tensors of two dimensions whose name ends in .weight: not time_faaaa or r_k, not the small LoRAs."""
    model = make_model(dtype=torch.float32)
    for name, group in groups(model, weight_decay=0.1).items():
        assert group["weight_decay"] == (0.1 if name.endswith(".weight") and model.get_parameter(name).dim() == 2 else 0), name
    inject(model, METHODS["dora"], METHODS["dora"].Config(4))
    for name, group in groups(model, weight_decay=0.1).items():
        assert group["weight_decay"] == (0 if "magnitude" in name else 0.1), name


def masters(p) -> MasterWeights:
    return MasterWeights([{"params": [p]}], lambda groups: torch.optim.AdamW(groups, lr=1e-3))


def test_steps_below_the_resolution_of_bf16_add_up():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = masters(p)
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
    steps(masters(whole), whole, gradients)
    first, second = (masters(p) for p in (half, rest))
    steps(first, half, gradients[:3])
    rest.data.copy_(half)
    second.load_state_dict(first.state_dict())
    steps(second, rest, gradients[3:])
    assert torch.equal(whole, rest)
