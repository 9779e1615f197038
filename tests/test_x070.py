"""What is RWKV-7's own: each part of its time mixing counts, its file's order, the tensors of layer 0 that nothing reads."""

import math

import numpy as np
import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.models import MODELS, x070
from rwkv_bone.models.x070 import RWKV7, TimeMix


@pytest.fixture(scope="module")
def trained(data):
    return load_model(data / "tiny-rwkv7-gsm8k.pth", dtype=torch.float32)


# ------------------------------------------------ faults, each of which a hardly trained model would hide


def change(model, monkeypatch, names, changed):
    """Other parameters in every layer: changed(*the ones of `names`)."""
    for block in model.blocks:
        for name, value in zip(names, changed(*(getattr(block.att, name) for name in names))):
            monkeypatch.setitem(block.att._parameters, name, torch.nn.Parameter(value))


def no_bonus(model, monkeypatch):
    change(model, monkeypatch, ["r_k"], lambda r_k: [r_k * 0])


def no_k_k(model, monkeypatch):
    change(model, monkeypatch, ["k_k"], lambda k_k: [torch.ones_like(k_k)])


def x_w_and_x_a_swapped(model, monkeypatch):
    change(model, monkeypatch, ["x_w", "x_a"], lambda x_w, x_a: [x_a, x_w])


def a_and_b_swapped(model, monkeypatch):
    wkv7 = x070.wkv7
    monkeypatch.setattr(x070, "wkv7", lambda r, log_w, k, v, a, b, *rest: wkv7(r, log_w, k, v, b, a, *rest))


def no_tanh(model, monkeypatch):
    monkeypatch.setattr(torch, "tanh", lambda x: x)


def kk_of_the_key_after_k_a(model, monkeypatch):
    operands = TimeMix.operands

    def wrong(self, *inputs):
        log_w, k, minus_kk, kk_a, *rest = operands(self, *inputs)
        kk = torch.nn.functional.normalize(k * self.k_k.view(k.shape[2:]), dim=-1)
        return log_w, k, -kk, kk * (kk_a / -minus_kk), *rest

    monkeypatch.setattr(TimeMix, "operands", wrong)


def v_lora_of_the_keys_input(model, monkeypatch):
    lerps, operands = TimeMix.lerps, TimeMix.operands

    def listening(self, *inputs):
        found = lerps(self, *inputs)
        monkeypatch.setattr(self, "xk", found[2], raising=False)
        return found

    def wrong(self, r, k, w, a, *residual):
        if residual:
            residual = (*residual[:2], self.xk @ self.v1)
        return operands(self, r, k, w, a, *residual)

    monkeypatch.setattr(TimeMix, "lerps", listening)
    monkeypatch.setattr(TimeMix, "operands", wrong)


def bonus_before_the_norm(model, monkeypatch):
    wkv7, operands, seen = x070.wkv7, TimeMix.operands, {}

    def without(self, *inputs):
        log_w, k, minus_kk, kk_a, seen["bonus"], *rest = operands(self, *inputs)
        return log_w, k, minus_kk, kk_a, torch.zeros_like(seen["bonus"]), *rest

    def wrong(r, log_w, k, v, *rest):
        y, state = wkv7(r, log_w, k, v, *rest)
        return y + seen["bonus"] * v, state

    monkeypatch.setattr(TimeMix, "operands", without)
    monkeypatch.setattr(x070, "wkv7", wrong)


def another_epsilon_of_the_norm(model, monkeypatch):
    for block in model.blocks:
        monkeypatch.setattr(block.att.ln_x, "eps", 16e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "fault",
    [
        no_bonus,
        no_k_k,
        x_w_and_x_a_swapped,
        a_and_b_swapped,
        no_tanh,
        kk_of_the_key_after_k_a,
        v_lora_of_the_keys_input,
        bonus_before_the_norm,
        another_epsilon_of_the_norm,
    ],
)
def test_the_packages_logits_of_the_trained_model_tell_every_fault(fault, trained, data, monkeypatch):
    reference = np.load(data / "tiny-rwkv7-gsm8k.prompt64.npz")
    fault(trained, monkeypatch)
    logits, _ = trained(torch.from_numpy(reference["tokens"])[None])
    assert np.abs(logits[0].numpy() - reference["logits"]).max() > 1e-3


# ------------------------------------------------ numbers


def test_the_decay_has_exact_gradients_at_both_ends_in_float32(make_model):
    att = make_model(version="x070", dtype=torch.float32, n_embd=8, dim_att=8, head_size=8).blocks[0].att
    x = torch.tensor([-30.0, -12.0, -1.0, 0.0, 1.0, 12.0, 16.0, 30.0])
    with torch.no_grad():
        att.w0.copy_(x.view(1, 1, 8))
    log_w = att.operands(torch.ones(1, 1, 8), torch.ones(1, 1, 8), torch.zeros(1, 1, 3), torch.zeros(1, 1, 4))[0]
    log_w.sum().backward()
    s = torch.sigmoid(x.double())
    torch.testing.assert_close(log_w.view(8).double(), -math.exp(-0.5) * s, rtol=1e-6, atol=0)
    torch.testing.assert_close(att.w0.grad.view(8).double(), -math.exp(-0.5) * s * torch.sigmoid(-x.double()), rtol=1e-5, atol=0)


def test_a_key_of_zeros_leaves_everything_finite(make_model):
    model = make_model(version="x070")
    with torch.no_grad():
        for block in model.blocks:
            block.att.key.weight.zero_()
    model(torch.randint(50, (1, 5)))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_bfloat16_is_as_near_as_its_rounding(trained, data):
    tokens = torch.from_numpy(np.load(data / "tiny-rwkv7-gsm8k.eval10240.npz")["tokens"].astype(np.int64))[None, :512]
    rounded = load_model(data / "tiny-rwkv7-gsm8k.pth")
    assert rounded.dtype == torch.bfloat16
    ours, exact = (torch.nn.functional.cross_entropy(m(tokens[:, :-1])[0][0].float(), tokens[0, 1:]) for m in (rounded, trained))
    assert abs(ours - exact) < 0.01


# ------------------------------------------------ the file


def order(layer: int) -> list[str]:
    """A block's names as the World and G1 releases have them."""
    ln0 = ["ln0.weight", "ln0.bias"] if layer == 0 else []
    att = [f"att.{name}" for name in "x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a".split()]
    projections = [f"att.{name}.weight" for name in ("receptance", "key", "value", "output")]
    rest = ["att.ln_x.weight", "att.ln_x.bias", "ffn.x_k", "ffn.key.weight", "ffn.value.weight"]
    return ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", *ln0, *att, *projections, *rest]


@pytest.mark.parametrize("v_in_layer_0", [False, True])
def test_names_have_the_releases_order_with_and_without_the_unused_tensors(v_in_layer_0, make_model):
    model = make_model(version="x070", n_layer=2, v_in_layer_0=v_in_layer_0)
    blocks = [f"blocks.{layer}.{name}" for layer in range(2) for name in order(layer)]
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    wanted = ["emb.weight", *blocks, "ln_out.weight", "ln_out.bias", "head.weight"]
    assert list(RWKV7.shapes(model.sizes)) == [name for name in wanted if v_in_layer_0 or name not in unused]
    assert list(model.state_dict()) == list(RWKV7.shapes(model.sizes))
    assert len(RWKV7.shapes(model.sizes)) == 33 * 2 + 6 - 3 * (not v_in_layer_0)
    model.add_initial_state()
    assert list(model.state_dict()) == list(RWKV7.shapes(model.sizes))


def test_a_real_file_keeps_its_names_and_order(trained, data):
    assert list(trained.state_dict()) == list(torch.load(data / "tiny-rwkv7-gsm8k.pth", mmap=True, weights_only=True))


@torch.no_grad()
def test_the_unused_tensors_are_kept_are_not_trained_and_change_nothing(make_model):
    model = make_model(version="x070")
    idx = torch.randint(50, (1, 9))
    logits, _ = model(idx)
    tensors = model.state_dict()
    unused = [f"blocks.0.att.v{i}" for i in range(3)]
    assert not set(unused) & {name for name, _ in model.named_parameters()}
    changed = {name: torch.full_like(tensor, 7) if name in unused else tensor for name, tensor in tensors.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(idx)[0], logits)
    without = {name: tensor for name, tensor in tensors.items() if name not in unused}
    model = RWKV7(RWKV7.sizes_of(without, "m.pth")).double()
    model.load_state_dict(without, strict=True)
    assert torch.equal(model(idx)[0], logits)


def test_a_model_of_one_layer_needs_no_value_lora(make_model):
    model = make_model(version="x070", n_layer=1, v_in_layer_0=False, d_mv_lora=0)
    assert RWKV7.sizes_of(model.state_dict(), "m.pth") == model.sizes


# ------------------------------------------------ what parameters are


def test_the_time_part_is_the_mixings_own_parameters(make_model):
    model = make_model(version="x070", n_layer=2)
    own = [f"att.{name}" for name in "x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a".split()] + ["ffn.x_k"]
    wanted = {f"blocks.1.{name}" for name in own}
    assert {name for name, _ in model.blocks[1].named_parameters(prefix="blocks.1") if model.in_part(name, "time")} == wanted
    for name in ("blocks.1.att.key.weight", "blocks.1.att.ln_x.weight", "blocks.1.ln1.bias", "emb.weight", "head.weight"):
        assert not model.in_part(name, "time")


def test_learning_rates_and_decay_are_those_of_rwkv_lm(make_model):
    model = make_model(version="x070")
    names = [name for name, _ in model.named_parameters()]
    assert {name for name in names if model.lr_multiplier(name) != 1} == {f"blocks.{layer}.att.w0" for layer in range(2)}
    assert model.lr_multiplier("blocks.0.att.w0") == 2
    decaying = {name for name in names if name.startswith("blocks.1.") and model.decays(name)}
    projections = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    assert decaying == {f"blocks.1.{name}.weight" for name in projections}
    assert model.decays("emb.weight") and model.decays("head.weight")


@pytest.mark.parametrize(("n_embd", "ranks"), [(64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (4096, (160, 160, 96, 320))])
def test_a_new_models_ranks_are_those_of_rwkv_lm(n_embd, ranks):
    sizes = RWKV7.new_sizes(vocab_size=65536, n_layer=3, n_embd=n_embd, head_size=64, dim_att=0, dim_ffn=0)
    assert (sizes.d_decay_lora, sizes.d_aaa_lora, sizes.d_mv_lora, sizes.d_gate_lora) == ranks
    assert (sizes.dim_att, sizes.dim_ffn) == (n_embd, 4 * n_embd)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim_att": 128}, "--dim_att 128.*--n_embd, 64"),
        ({"head_size": 48}, "head size 48 does not divide"),
        ({"n_layer": 0}, "n_layer"),
    ],
)
def test_sizes_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        RWKV7.new_sizes(**{"vocab_size": 256, "n_layer": 2, "n_embd": 64, "head_size": 32, **given})


def test_people_read_the_ranks(trained):
    assert "4 heads of 16" in trained.describe()
    assert "w 8, a 12, v 6, g 20" in trained.describe()
    assert MODELS["x070"].template == "g1"
