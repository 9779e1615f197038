"""Every PEFT method of the registry: exact against its formula, written once more in dense and plain form, and against peft."""

import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rwkv_bone.errors import UserError
from rwkv_bone.peft import METHODS, adapter_tensors, adapters, attach, inject, merge, start_from_gradients

SHAPES = [(8, 12, 4), (10, 14, 4), (14, 9, 4), (64, 32, 16), (12, 16, 1)]  # out, in, r
SHIFTED = ("pissa", "olora", "lora_ga")


def by_blocks(W, B, by_column):
    """W_ij + W_ij B + B for each r x r block, B chosen by the block's row i or its column j; W padded with zeros."""
    (out, in_), r = W.shape, B.shape[-1]
    rows, columns = math.ceil(out / r), math.ceil(in_ / r)
    padded = F.pad(W, (0, columns * r - in_, 0, rows * r - out))
    made = []
    for i in range(rows):
        blocks = [padded[i * r : i * r + r, j * r : j * r + r] for j in range(columns)]
        made.append(torch.cat([w + w @ B[j if by_column else i] + B[j if by_column else i] for j, w in enumerate(blocks)], 1))
    return torch.cat(made)[:out, :in_]


def formula(name, W, t, config):
    """The dense weight that the paper of each method gives for W and the adapter's tensors t."""
    if name == "bone":
        return by_blocks(W, t["bone"], True)
    if name == "bone_col":
        return by_blocks(W, t["bone_col"], False)
    if name == "miss":
        identities = torch.eye(config.r, dtype=W.dtype).repeat(1, math.ceil(W.shape[1] / config.r))[:, : W.shape[1]]
        D = t["bone"].repeat(1, len(W) // t["bone"].shape[1])
        return W + D.T @ identities
    s = config.alpha / (math.sqrt(config.r) if name in ("rslora", "lora_ga") else config.r)
    if name in SHIFTED:
        W = W - s * t["init_lora_B"] @ t["init_lora_A"]
    W = W + s * t["lora_B"] @ t["lora_A"]
    if name == "dora":
        W = t["lora_magnitude_vector"].unsqueeze(1) * W / W.norm(dim=1, keepdim=True).detach()
    return W


def started(name, weight, r, **options):
    method = METHODS[name]
    layer = method(weight, method.Config(r=r, **options))
    torch.manual_seed(5)
    layer.start(torch.randn(weight.shape)) if method.starts_from_gradient else layer.start()
    return layer


def trained(name, weight, r, step=0.3, **options):
    """A layer some way from its start."""
    layer = started(name, weight, r, **options)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += step * torch.randn_like(p)
    return layer


def random_weight(out, in_, dtype=torch.float64):
    torch.manual_seed(out + in_)
    return (torch.randn(out, in_, dtype=torch.float64) / math.sqrt(in_)).to(dtype)


every_method = pytest.mark.parametrize("name", METHODS)
every_shape = pytest.mark.parametrize(("out", "in_", "r"), SHAPES)


every_form = pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in METHODS), ("miss", {"mini_r": 2})])


def skip_unless_it_fits(name, out, in_, r):
    if name == "lora_ga" and 2 * r > min(out, in_):
        pytest.skip("lora_ga needs 2 r directions")


@every_method
@every_shape
def test_a_fresh_adapter_equals_the_base(name, out, in_, r):
    skip_unless_it_fits(name, out, in_, r)
    weight = random_weight(out, in_)
    x = torch.randn(2, 3, in_, dtype=torch.float64)
    layer = started(name, weight, r)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layer.merged_weight(), weight, rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.weight, weight)


@every_form
@every_shape
def test_output_weight_and_gradients_equal_the_dense_formula(name, options, out, in_, r):
    skip_unless_it_fits(name, out, in_, r)
    layer = trained(name, random_weight(out, in_), r, **options)
    x = torch.randn(2, 5, in_, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, out, dtype=torch.float64)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    W = formula(name, layer.weight, tensors, layer.config)
    torch.testing.assert_close(layer.merged_weight(), W.detach(), rtol=1e-13, atol=1e-13)
    ours, truth = layer(x), x @ W.T
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    wanted = {key: p for key, p in layer.named_parameters() if p.requires_grad}
    assert wanted and "weight" not in wanted
    ours = torch.autograd.grad(ours, [x, *wanted.values()], g)
    truth = torch.autograd.grad(truth, [x, *wanted.values()], g)
    for key, a, b in zip(["x", *wanted], ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@every_method
def test_gradients_are_right_where_only_one_is_asked_for(name):
    layer = trained(name, random_weight(8, 12), 4)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    own = [p for p in layer.parameters() if p.requires_grad]
    both = torch.autograd.grad(layer(x).square().sum(), [x, *own])
    alone = torch.autograd.grad(layer(x.detach()).square().sum(), own)
    for p in own:
        p.requires_grad_(False)
    for a, b in zip(torch.autograd.grad(layer(x).square().sum(), [x]) + alone, both):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@every_method
def test_any_number_of_tokens_and_any_leading_shape(name):
    layer = trained(name, random_weight(8, 12), 4)
    x = torch.randn(2, 0, 12, dtype=torch.float64)
    assert layer(x).shape == (2, 0, 8)
    x = torch.randn(12, 6, dtype=torch.float64).T  # not contiguous
    torch.testing.assert_close(layer(x)[3], layer(x[3]))


@every_method
def test_tokens_are_worked_on_in_chunks_to_the_same_result(name, monkeypatch):
    layer = trained(name, random_weight(8, 12), 4)
    x = torch.randn(23, 12, dtype=torch.float64, requires_grad=True)
    own = [p for p in layer.parameters() if p.requires_grad]
    whole = layer(x)
    gradients = torch.autograd.grad(whole.square().sum(), [x, *own])
    monkeypatch.setattr("rwkv_bone.peft.bone.chunks", lambda x: (slice(i, i + 5) for i in range(0, len(x), 5)))
    monkeypatch.setattr("rwkv_bone.peft.bone_col.PANEL", 4)
    monkeypatch.setattr("rwkv_bone.peft.bone_col.PANELS", 2)
    torch.testing.assert_close(layer(x), whole, rtol=1e-13, atol=1e-13)
    for a, b in zip(torch.autograd.grad(layer(x).square().sum(), [x, *own]), gradients):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def trained_model(make_model, name, dtype=torch.float64):
    model = make_model(dtype=dtype)
    method = METHODS[name]
    inject(model, method, method.Config(r=4))
    if method.starts_from_gradient:
        batch = torch.randint(50, (2, 7))
        start_from_gradients(model, lambda idx: model(idx)[0].square().mean(), [batch])
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


@every_method
def test_base_and_saved_adapter_are_the_model(name, make_model):
    model = trained_model(make_model, name)
    file = io.BytesIO()
    torch.save(adapter_tensors(model), file)
    file.seek(0)
    tensors = torch.load(file, weights_only=True)
    again = make_model()
    attach(again, METHODS[name], METHODS[name].Config(r=4), adapters(model))
    missing, unexpected = again.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key in make_model().state_dict() for key in missing)
    idx = torch.randint(50, (2, 9))
    assert torch.equal(again(idx)[0], model(idx)[0])


@every_method
def test_a_merged_model_has_the_bases_keys_and_the_adapted_models_logits(name, make_model):
    model = trained_model(make_model, name)
    idx = torch.randint(50, (2, 9))
    logits = model(idx)[0]
    assert not torch.allclose(make_model()(idx)[0], logits)
    merge(model)
    assert list(model.state_dict()) == list(make_model().state_dict())
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-9, atol=1e-9)


@every_method
def test_on_a_bf16_base_the_adapter_is_float32_and_the_output_right_to_bf16(name):
    layer = trained(name, random_weight(96, 64, torch.bfloat16), 8, step=0.02)
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    assert layer.weight.grad is None and layer.merged_weight().dtype == torch.float32
    exact = x.detach().double().requires_grad_()
    tensors = {key: t.detach().double().requires_grad_() for key, t in layer.state_dict().items() if key != "weight"}
    truth = exact @ formula(name, layer.weight.double(), tensors, layer.config).T
    truth.square().sum().backward()
    assert relative_error(y, truth) < 2**-7
    assert relative_error(x.grad, exact.grad) < 2**-6
    for key, p in layer.named_parameters():
        if p.requires_grad:
            assert relative_error(p.grad, tensors[key].grad) < 2**-6, key


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


class NewTensors(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes anew, and not of views of the given ones."""

    def __init__(self, *given):
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, t.numel())
        return result


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_made_or_kept(name, dtype):
    layer = trained(name, random_weight(2048, 64, dtype), 4, step=0.02)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(t):
        if t.data_ptr() != layer.weight.data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with NewTensors(x, *layer.parameters()) as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x)
        y.sum().backward()
    # two methods must go through the weight, by panels of 256 rows
    assert seen.largest <= layer.weight.numel() // 8
    adapter = sum(t.numel() for key, t in layer.state_dict().items() if key != "weight")
    assert sum(kept.values()) <= 2 * (x.numel() + y.numel() + adapter) < layer.weight.numel()
    with NewTensors(x, *layer.parameters()) as seen:  # the watch itself would see it
        x @ layer.merged_weight().to(dtype).T
    assert seen.largest >= layer.weight.numel()


@every_method
def test_a_small_update_arrives_whole_in_bf16(name):
    weight = random_weight(256, 256, torch.bfloat16)
    layer = trained(name, weight, 16, step=2e-5)  # after one step of Adam at a usual rate
    if "lora_A" in dict(layer.named_parameters()) and name not in SHIFTED:
        layer.lora_B.data.mul_(10)  # the first step moves B alone, and A is small: more of it, to be seen above the noise
    x = torch.randn(8192, 256).bfloat16()
    base = x.double() @ weight.double().T
    change = x.double() @ (layer.merged_weight().double() - weight.double()).T
    share = ((layer(x).double() - base) * change).sum() / change.square().sum()
    noise = 2**-9 * base.norm() / change.norm() / math.sqrt(change.numel())  # of the share, from the rounding of y alone
    assert abs(share - 1) < 0.01 + 5 * noise < 0.2


WITH_DROPOUT = ("lora", "rslora", "lora_plus", "dora")


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_drops_inputs_of_a_in_training_alone(name):
    layer = trained(name, random_weight(8, 12), 4, lora_dropout=0.4)
    x = torch.randn(7, 12, dtype=torch.float64)
    whole = x @ layer.merged_weight().T
    torch.testing.assert_close(layer.eval()(x), whole, rtol=1e-13, atol=1e-13)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.4)
    assert 0 < (dropped == 0).sum() < x.numel()
    gain = (layer.lora_magnitude_vector / layer.row_norms()) if name == "dora" else 1.0
    truth = gain * (x @ layer.weight.T + layer.scale * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    many = x.expand(20000, 7, 12)
    error = (layer(many).detach() - whole).mean(0)  # the mean over masks is the whole
    assert error.norm() / (whole - x @ layer.weight.T).norm() < 0.03


@every_method
def test_an_option_that_a_method_does_not_have_is_refused(name):
    method = METHODS[name]
    with pytest.raises(UserError, match=f"{name} has no option nonsense; it has r"):
        method.config_from({"nonsense": 1}, name)
    with pytest.raises(UserError, match="r is an int, not '8'"):
        method.config_from({"r": "8"}, name)
    with pytest.raises(UserError, match="r must be at least 1"):
        method.config_from({"r": 0}, name)
    assert ("lora_dropout" in {f for f in method.Config.__dataclass_fields__}) == (name in WITH_DROPOUT)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"alpha": -1.0}, "alpha must be positive"),
        ("lora", {"alpha": math.nan}, "alpha must be positive"),
        ("lora", {"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ("pissa", {"svd_niter": -1}, "svd_niter must be at least 0"),
        ("lora_plus", {"lr_ratio": 0.0}, "lr_ratio must be above 0"),
        ("lora_ga", {"gamma": 0.0}, "gamma must be above 0"),
        ("lora_ga", {"init_batches": 0}, "init_batches must be at least 1"),
        ("miss", {"mini_r": -1}, "mini_r must be at least 1, or 0"),
    ],
)
def test_an_option_of_no_meaning_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        METHODS[name].config_from(options, name)


@every_method
def test_every_option_says_what_it_is(name):
    for f in METHODS[name].Config.__dataclass_fields__.values():
        assert f.metadata["help"] and type(f.default) in (int, float, bool, str)


def test_a_rank_above_the_weights_is_refused():
    for name in SHIFTED:
        with pytest.raises(UserError, match=r"\(4, 6\)"):
            METHODS[name](torch.zeros(4, 6), METHODS[name].Config(r=5))
    with pytest.raises(UserError, match="2 r = 6"):
        METHODS["lora_ga"](torch.zeros(4, 6), METHODS["lora_ga"].Config(r=3))


def test_b_of_lora_plus_learns_faster_and_nothing_else_does():
    for name, method in METHODS.items():
        config = method.Config(r=2, lr_ratio=5.0) if name == "lora_plus" else method.Config(r=2)
        rates = {key: method.lr_multiplier(key, config) for key in started(name, torch.randn(6, 8), 2).state_dict()}
        assert {key for key, rate in rates.items() if rate != 1} == ({"lora_B"} if name == "lora_plus" else set())
        assert rates.get("lora_B", 1) == (5 if name == "lora_plus" else 1)


def test_bone_at_the_sizes_of_the_papers_7b_trains_88_million():
    C, FFN = 4096, 14336  # RWKV-6 World 7B, 32 layers; r = 64
    with torch.device("meta"):
        block = nn.ModuleDict({"att": nn.ModuleDict(), "ffn": nn.ModuleDict()})
        for key in ("receptance", "key", "value", "gate", "output"):
            block["att"][key] = nn.Linear(C, C, bias=False)
        for key, in_, out in (("receptance", C, C), ("key", C, FFN), ("value", FFN, C)):
            block["ffn"][key] = nn.Linear(in_, out, bias=False)
        inject(block, METHODS["bone"], METHODS["bone"].Config())
    assert 32 * sum(p.numel() for p in block.parameters() if p.requires_grad) == 88_080_384


def test_a_small_step_away_from_a_shifted_start_survives_in_bf16():
    for name in SHIFTED:
        layer = started(name, random_weight(64, 48, torch.bfloat16), 8)
        x = torch.randn(500, 48, dtype=torch.bfloat16)
        assert relative_error(layer(x), x.double() @ layer.weight.double().T) < 2**-8
        with torch.no_grad():
            layer.lora_B += 1e-5 * torch.randn_like(layer.lora_B)  # a bf16 B is 1e-3 apart here
        A, B = (f.double() for f in layer.factors())
        torch.testing.assert_close(
            layer.scale * B @ A, layer.merged_weight().double() - layer.weight.double(), rtol=1e-2, atol=1e-7
        )
        # what is multiplied in bf16 holds the step to 2^-8 of itself
        low = layer.scale * B.bfloat16().double() @ A.bfloat16().double()
        assert relative_error(low, layer.scale * B @ A) < 2**-7


def test_a_part_that_a_model_does_not_have_is_refused(make_model):
    with pytest.raises(UserError, match="atn names no linear layer of this model; there are att, "):
        inject(make_model(), METHODS["bone"], METHODS["bone"].Config(), ["att", "atn"])


# ---------------------------------------------------------------- LoRA-GA's start


class Toy(nn.Module):
    """Three projections, two of which take an adapter; one is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        sizes = {"key": (12, 8), "value": (8, 12)}
        self.att = nn.ModuleDict({name: nn.Linear(in_, out, bias=False).double() for name, (out, in_) in sizes.items()})
        self.head = nn.Linear(8, 5, bias=False).double()

    def forward(self, x, checkpointed=False):
        def block(x):
            return x + torch.tanh(self.att["value"](torch.tanh(self.att["key"](x))))

        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("held", "passes"), [(2**40, 1), (1, 2)])
def test_lora_ga_starts_from_the_mean_gradient_of_each_weight(held, passes, checkpointed, monkeypatch):
    truth, model, seen, given = Toy(), Toy(), [], {}
    batches = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3)]
    (sum(truth(x) for x in batches) / 3).backward()
    inject(model, METHODS["lora_ga"], METHODS["lora_ga"].Config(r=3), ["att"])
    start = METHODS["lora_ga"].start

    def noted(layer, gradient):
        given[layer] = gradient
        start(layer, gradient)

    def loss(x):
        seen.append(x)
        return model(x, checkpointed)

    monkeypatch.setattr(METHODS["lora_ga"], "start", noted)
    start_from_gradients(model, loss, batches, held)
    assert len(seen) == 3 * passes
    for name, layer in adapters(model).items():
        torch.testing.assert_close(given[layer], truth.get_submodule(name).weight.grad, rtol=1e-12, atol=1e-14)
        assert layer.lora_A.any() and layer.lora_A.grad is None and not layer._forward_hooks
    torch.testing.assert_close(model(batches[0]), truth(batches[0]), rtol=1e-12, atol=1e-14)


def test_lora_ga_starts_along_the_gradients_singular_directions():
    out, in_, r, gamma = 40, 30, 4, 9.0
    G = random_weight(out, in_)
    layer = METHODS["lora_ga"](random_weight(out, in_), METHODS["lora_ga"].Config(r=r, gamma=gamma))
    layer.start(G)
    U, _, Vh = torch.linalg.svd(G)
    c = out**0.25 / gamma**0.5
    overlap_A, overlap_B = (layer.lora_A @ Vh[:r].T / c).abs(), (U[:, r : 2 * r].T @ layer.lora_B / c).abs()
    torch.testing.assert_close(layer.lora_A.norm(dim=1), torch.full((r,), c).double())
    torch.testing.assert_close(layer.lora_B.norm(dim=0), torch.full((r,), c).double())
    torch.testing.assert_close(overlap_A, torch.eye(r).double(), atol=0.02, rtol=0)  # a randomised SVD
    torch.testing.assert_close(overlap_B, torch.eye(r).double(), atol=0.1, rtol=0)


def test_lora_ga_refuses_batches_that_give_no_gradient():
    model = Toy()
    inject(model, METHODS["lora_ga"], METHODS["lora_ga"].Config(r=3), ["att"])
    with pytest.raises(UserError, match="no gradient"):
        start_from_gradients(model, lambda x: model(x) * 0, [torch.zeros(1, 8, dtype=torch.float64)])


# ---------------------------------------------------------------- peft as an independent program


class Net(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight.data = weight.clone()

    def forward(self, x):
        return self.proj(x)


def in_peft(weight, config):
    """The peft layer around a projection of `weight`."""
    peft = pytest.importorskip("peft", reason="needs the peft package")
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(weight), config(peft), autocast_adapter_dtype=False)
    return model.base_model.model.proj


LORAS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("name", LORAS)
def test_the_lora_family_equals_pefts(name):
    weight, r, alpha = random_weight(24, 20, torch.float32), 4, 6.0
    theirs = in_peft(weight, lambda peft: peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"], **LORAS[name]))
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    exact = {"svd_niter": 0} if name == "pissa" else {}
    ours = started(name, weight, r, alpha=alpha, **exact)
    if name in ("pissa", "olora"):  # the starts are no draws, but for the signs of singular vectors
        torch.testing.assert_close(ours.lora_B @ ours.lora_A, B @ A, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.init_lora_A, ours.lora_A.detach(), rtol=0, atol=0)
        ours.start_at(A, B)
    else:
        assert ours.lora_B.count_nonzero() == 0 and B.count_nonzero() == 0
        bound = math.sqrt(3) * math.sqrt(2 / 6) / math.sqrt(20)  # kaiming, a = sqrt 5, fan-in 20
        assert 0.9 * bound < ours.lora_A.abs().max() <= bound and 0.9 * bound < A.abs().max() <= bound
    x = torch.randn(9, 20)
    torch.testing.assert_close(theirs(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        A += 0.2 * torch.randn_like(A)
        B += 0.2 * torch.randn_like(B)
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
        if name == "dora":
            m = theirs.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(ours.lora_magnitude_vector, m)
            m += 0.2 * torch.randn_like(m)
            ours.lora_magnitude_vector.copy_(m)
    same_outputs_and_gradients(ours, theirs, x, {"lora_A": A, "lora_B": B})


@pytest.mark.parametrize(
    ("name", "init", "options"),
    [("miss", True, {}), ("miss", "mini", {"mini_r": 8}), ("miss", "mini", {"mini_r": 1}), ("bone_col", "bat", {})],
)
@pytest.mark.parametrize(("out", "in_", "r"), [(24, 20, 4), (16, 10, 4)])
def test_miss_and_column_bone_equal_pefts(name, init, options, out, in_, r):
    if init == "bat" and in_ % r:
        pytest.skip("peft has no padding in bat")
    weight = random_weight(out, in_)
    theirs = in_peft(weight, lambda peft: peft.MissConfig(r=r, init_weights=init, target_modules=["proj"], **options))
    block = theirs.miss_block["default"]
    block.data = block.data.double()
    ours = started(name, weight, r, **options)
    (key,) = (key for key, p in ours.named_parameters() if p.requires_grad)
    own = ours.get_parameter(key)
    assert own.shape == block.shape and not own.any() and not block.any()
    with torch.no_grad():
        block += 0.2 * torch.randn_like(block)
        own.copy_(block)
    same_outputs_and_gradients(ours, theirs, torch.randn(9, in_, dtype=torch.float64), {key: block}, 1e-13)
    theirs.merge()
    torch.testing.assert_close(ours.merged_weight(), theirs.get_base_layer().weight.data, rtol=1e-13, atol=1e-13)


def test_a_shape_that_mini_r_does_not_divide_is_refused_by_name_and_the_model_left_as_it_was():
    model = Toy()
    with pytest.raises(UserError, match=r"^att\.value: mini_r 6 does not divide this layer's 8 outputs; [^\n]*$"):
        inject(model, METHODS["miss"], METHODS["miss"].Config(r=2, mini_r=6), ["att"])
    assert not adapters(model)


def same_outputs_and_gradients(ours, theirs, x, pairs, tolerance=1e-5):
    x = x.requires_grad_()
    g = torch.randn(len(x), ours.weight.shape[0], dtype=x.dtype)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    a = torch.autograd.grad(a, [x, *(ours.get_parameter(key) for key in pairs)], g)
    b = torch.autograd.grad(b, [x, *pairs.values()], g)
    for u, v in zip(a, b):
        torch.testing.assert_close(u, v, rtol=10 * tolerance, atol=tolerance)
