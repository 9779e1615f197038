"""RWKV-6 and RWKV-7: the official model's numbers on real and on random weights; one forward for wholes, chunks and tokens."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.models import MODELS, recognise
from tests.conftest import SMALL_OF, each_version
from tests.independent import rwkv_package

LOSS = {"tiny-rwkv6-1m": 0.905476, "tiny-rwkv7-834k": 3.991262, "tiny-rwkv7-gsm8k": 1.212331}  # of the `rwkv` package
TOLERANCE = {"tiny-rwkv6-1m": 1e-4, "tiny-rwkv7-834k": 1e-5, "tiny-rwkv7-gsm8k": 1e-4}


@pytest.fixture(scope="module", params=LOSS)
def path(request, data):
    """Really trained models: 1M and 257k parameters, and one of 834k hardly trained."""
    return data / f"{request.param}.pth"


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def facts(path):
    return json.loads(path.with_suffix(".json").read_text())


@torch.no_grad()
def test_logits_and_state_after_64_tokens_are_the_rwkv_packages(model, path):
    reference = np.load(path.with_suffix(".prompt64.npz"))
    logits, state = model(torch.from_numpy(reference["tokens"])[None])
    assert np.abs(logits[0].numpy() - reference["logits"]).max() < TOLERANCE[path.stem]
    for field in ("att_shift", "wkv", "ffn_shift"):
        ours = torch.stack([getattr(layer, field)[0] for layer in state]).numpy()
        assert np.abs(ours - reference[f"state_{field}"]).max() < TOLERANCE[path.stem], field


@torch.no_grad()
def test_logits_are_those_of_rwkv_cpp(model, path, facts):
    if "rwkv_cpp_test" not in facts:
        pytest.skip("rwkv.cpp has no logits of this model")
    prompt = facts["rwkv_cpp_test"]
    logits, _ = model(torch.tensor([prompt["prompt_tokens"]]))
    expected = torch.tensor(prompt["expected_fp32_logits_after_last_token"])
    assert (logits[0, -1] - expected).abs().max() < TOLERANCE[path.stem]


@torch.no_grad()
def test_loss_on_10240_tokens_with_state_carried_is_the_packages(model, path):
    reference = np.load(path.with_suffix(".eval10240.npz"))
    tokens = torch.from_numpy(reference["tokens"].astype(np.int64))
    state, losses = None, []
    for start in range(0, len(tokens) - 1, 1024):
        idx, targets = tokens[start : start + 1024], tokens[start + 1 : start + 1025]
        logits, state = model(idx[None], state)
        losses.append(torch.nn.functional.cross_entropy(logits[0, : len(targets)].double(), targets, reduction="none"))
    losses = torch.cat(losses)
    assert abs(losses.mean().item() - LOSS[path.stem]) < 1e-5
    assert np.abs(losses.numpy() - reference["nll"]).max() < 1e-3


@torch.no_grad()
def test_greedy_continuation_token_by_token_is_the_packages(model, path, facts):
    logits, state = model(torch.from_numpy(np.load(path.with_suffix(".prompt64.npz"))["tokens"])[None])
    expected = facts["greedy_after_prompt64"]["tokens"]
    ours = []
    for _ in expected:
        ours.append(logits[0, -1].argmax().item())
        logits, state = model(torch.tensor([[ours[-1]]]), state)
    assert ours == expected


@torch.no_grad()
@pytest.mark.parametrize("n_layer", [1, 3])
@each_version
def test_random_weights_with_heads_of_64_give_the_packages_logits_and_state(n_layer, make_model, tmp_path):
    model = make_model(dtype=torch.float32, n_layer=n_layer, n_embd=128, dim_att=128, dim_ffn=96, head_size=64)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, expected_state = rwkv_package(tmp_path / "m.pth", tokens)
    logits, state = model(torch.tensor([tokens]))
    assert (logits[0] - expected).norm() < 1e-4 * expected.norm()
    assert (logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    for ours, theirs in zip((tensor[0] for layer in state for tensor in layer), expected_state, strict=True):
        assert (ours - theirs.view(ours.shape)).norm() < 1e-4 * theirs.norm()


@torch.no_grad()
@each_version
def test_a_trained_initial_state_is_where_the_model_starts(version, make_model, tmp_path):
    model = make_model(dtype=torch.float32, n_embd=128, dim_att=128, head_size=64)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    names = model.add_initial_state()
    states = [model.get_parameter(name).normal_(generator=torch.Generator().manual_seed(0)) for name in names]
    tokens = [5, 1, 44, 7]
    # `time_state` is [value, key], and so is the package's state for RWKV-7; for RWKV-6 it is [key, value]
    expected, _ = rwkv_package(tmp_path / "m.pth", tokens, [s if version == "x070" else s.mT.contiguous() for s in states])
    logits, _ = model(torch.tensor([tokens] * 2))
    for row in logits:
        assert (row - expected).norm() < 1e-4 * expected.norm()


@each_version
def test_gradients_of_every_parameter_are_the_slopes_of_the_loss(make_model):
    model = make_model()
    model.add_initial_state()
    torch.manual_seed(0)
    idx, weights = torch.randint(50, (2, 19)), torch.randn(2, 19, 50, dtype=torch.float64)

    def loss():
        return (model(idx)[0] * weights).sum()

    loss().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            slope = (above - loss()).item() / (2 * step)
            parameter += step * direction
        assert slope != 0, name
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-5), name


@each_version
def test_a_sequence_in_chunks_equals_the_whole_in_output_and_gradients(make_model):
    model = make_model()
    idx = torch.randint(50, (2, 23))
    weights = torch.randn(2, 23, 50, dtype=torch.float64)
    results = []
    for sizes in ([23], [1, 7, 1, 14]):
        state, outputs = None, []
        for chunk in idx.split(sizes, 1):
            logits, state = model(chunk, state)
            outputs.append(logits)
        logits = torch.cat(outputs, 1)
        results.append((logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@each_version
def test_packed_documents_behind_separators_give_what_each_gives_alone(dtype, tolerance, make_model):
    exact = make_model()
    model = make_model(dtype=dtype)
    for rounded, parameter in zip(model.parameters(), exact.parameters()):
        parameter.copy_(rounded)
    documents = [torch.randint(50, (1, n)) for n in (5, 1, 30)]
    separator = torch.zeros(1, 1, dtype=torch.long)
    row = torch.cat([documents[0], separator, documents[1], separator, documents[2]], 1)
    reset = torch.zeros(row.shape, dtype=torch.bool)
    reset[0, [0, 6, 8]] = True
    packed, _ = model(row, reset=reset)

    def close(ours, truth):
        assert (ours - truth).norm() < tolerance * truth.norm()

    for document, start in zip(documents, (0, 6, 8)):
        close(packed[:, start : start + document.shape[1]], exact(document)[0])
    for border in range(1, row.shape[1]):  # also where a document begins with a chunk
        _, state = model(row[:, :border], reset=reset[:, :border])
        rest, _ = model(row[:, border:], state, reset[:, border:])
        close(rest, packed[:, border:])


@each_version
def test_documents_are_not_packed_where_each_would_begin_with_a_trained_state(make_model):
    model = make_model()
    assert model.cannot("pack") == ""
    model.add_initial_state()
    assert "initial state" in model.cannot("pack")


@pytest.mark.parametrize("changed", [{"grad_cp": True}, {"op": "torch"}])
@each_version
def test_another_way_of_computing_changes_no_gradient(changed, make_model):
    model = make_model(n_layer=3)
    model.add_initial_state()
    idx = torch.randint(50, (2, 21))
    gradients = []
    for same in (model, model.with_execution(**changed)):
        same.zero_grad()
        same(idx)[0].square().sum().backward()
        gradients.append([p.grad for p in same.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@each_version
def test_the_stages_one_after_the_other_are_the_model(make_model):
    model = make_model(n_layer=3)
    x = idx = torch.randint(50, (2, 9))
    names = []
    for prefix, module, run in model.stages():
        names += [prefix + name for name in module.state_dict()]
        x = run(x)
    assert torch.equal(x, model(idx)[0])
    assert names == list(model.state_dict())


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("time_state", [False, True])
@each_version
def test_sizes_are_read_from_the_file(version, n_layer, time_state, make_model):
    model = make_model(n_layer=n_layer, n_embd=32, dim_att=32, head_size=4, dim_ffn=20, time_state=time_state)
    tensors = model.state_dict()
    kind = recognise(tensors, "m.pth")
    assert kind is MODELS[version]
    assert kind.sizes_of(tensors, "m.pth") == model.sizes
    assert kind.shapes(model.sizes) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def without(name, tensors):
    del tensors[name]


def with_(name, shape, tensors):
    tensors[name] = torch.zeros(shape)


def only_without(part, tensors):
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("version", "damage", "message"),
    [
        *(
            (version, *case)
            for version in SMALL_OF
            for case in (
                (partial(without, "blocks.1.ffn.value.weight"), "1 missing .*blocks.1.ffn.value.weight"),
                (partial(with_, "blocks.1.att.extra", (1,)), "1 unknown .*blocks.1.att.extra"),
                (partial(with_, "blocks.1.ln1.weight", (3,)), r"blocks.1.ln1.weight is \(3,\).*\(24,\)"),
                (partial(with_, "emb.weight", (3,)), "wrong rank"),
                (partial(without, "emb.weight"), "without emb.weight"),
                (partial(only_without, "att"), "no model known here"),
            )
        ),
        ("x060", partial(only_without, "maa"), "RWKV-5"),
        ("x070", partial(without, "blocks.0.att.r_k"), "without blocks.0.att.r_k"),
        ("x070", partial(without, "blocks.1.att.v1"), "without blocks.1.att.v1"),
        ("x070", partial(without, "blocks.0.att.v2"), "1 missing .*blocks.0.att.v2"),
        ("x070", partial(with_, "blocks.1.att.w1", (24, 9)), r"blocks.1.att.w1 is \(24, 9\).*\(24, 3\)"),
        ("x070", partial(with_, "blocks.0.att.g2", (9, 24)), r"blocks.0.att.g2 is \(9, 24\).*\(6, 24\)"),
        ("x070", partial(with_, "blocks.0.att.r_k", (2, 8)), r"blocks.0.att.r_k is \(2, 8\).*\(3, 8\)"),
        ("x070", partial(with_, "blocks.0.att.r_k", (24,)), "wrong rank"),
        ("x070", partial(with_, "blocks.0.att.r_k", (3, 7)), "head size 7 does not divide 24"),
        ("x070", partial(with_, "blocks.0.ffn.s_emb.weight", (50, 24)), "rwkv7a or rwkv7b .*blocks.0.ffn.s_emb.weight"),
        ("x070", partial(with_, "blocks.1.qkv.q.weight", (24, 24)), "rwkv7a or rwkv7b .*blocks.1.qkv.q.weight"),
    ],
)
def test_a_damaged_model_or_another_one_is_refused_by_name(damage, message, make_model):
    tensors = make_model().state_dict()
    damage(tensors)
    with pytest.raises(UserError, match=f"^m.pth: .*{message}") as error:
        recognise(tensors, "m.pth").sizes_of(tensors, "m.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("version", "other"), [("x060", "x070"), ("x070", "x060")])
def test_a_file_is_no_model_of_the_other_version(other, make_model):
    tensors = make_model().state_dict()
    assert not MODELS[other].recognises(tensors)
    with pytest.raises(UserError, match=f"^m.pth: .*{other}"):
        MODELS[other].sizes_of(tensors, "m.pth")


# by hand from the formulas: layer 1 of 3, channel 5 of 64, the sixth of a head of 16
INITIAL = {
    "x060": {
        "att.time_decay": -6 + 5 * (5 / 63) ** 1.35,
        "att.time_faaaa": 0.5 * (1 - 5 / 63) - 0.1,
        "att.time_maa_v": 1 - ((5 / 64) ** (2 / 3) + 0.15),
        "att.time_maa_g": 1 - (5 / 64) ** (1 / 3),
        "ffn.time_maa_k": 1 - (5 / 64) ** (2 / 3) ** 3,
    },
    "x070": {
        "att.x_r": 1 - (5 / 64) ** (0.2 * 2 / 3),
        "att.x_w": 1 - (5 / 64) ** (0.9 * 2 / 3),
        "att.x_k": 1 - (5 / 64) ** (0.7 * 2 / 3),
        "att.x_v": 1 - (5 / 64) ** (0.7 * 2 / 3),
        "att.x_a": 1 - (5 / 64) ** (0.9 * 2 / 3),
        "att.x_g": 1 - (5 / 64) ** (0.2 * 2 / 3),
        "att.w0": -6 + 6 * (5 / 63) ** (1 + 0.5**0.3) + 0.5 - 2.5 * (1 / 3) ** 2,
        "att.a0": -0.19 - 0.3 * (1 / 3) ** 2 + 0.4 * (5 / 63 - 0.5),
        "att.v0": 0.73 - 0.4 * (5 / 63 - 0.5),
        "att.k_k": 0.71 - 0.1 * (5 / 63 - 0.5),
        "att.k_a": 1.02,
        "att.r_k": -0.04,
        "att.w1": 0,
        "att.a1": 0,
        "att.v1": 0,
        "att.g1": 0,
        "ffn.x_k": 1 - (5 / 64) ** (2 / 3) ** 4,
    },
}
ORTHOGONAL = {  # rows times their transposes, by layer 1's names
    "x060": {"att.receptance.weight": 1, "att.value.weight": 1, "att.key.weight": 0.01, "att.gate.weight": 0.01},
    "x070": {
        "att.receptance.weight": 1,
        "att.value.weight": 1,
        "att.key.weight": 0.01,
        "att.w2": 0.01,
        "att.a2": 0.01,
        "att.v2": 0.01,
        "att.g2": 0.01,
    },
}


@each_version
def test_a_new_model_starts_as_rwkv_lm_starts_it(version):
    kind = MODELS[version]
    sizes = kind.new_sizes(vocab_size=100, n_layer=3, n_embd=64, head_size=16)
    values = dict(kind.initial_values(sizes, torch.Generator().manual_seed(0)))
    assert {name: tuple(value.shape) for name, value in values.items()} == kind.shapes(sizes)
    for name, expected in INITIAL[version].items():
        assert values[f"blocks.1.{name}"].view(-1)[5].item() == pytest.approx(expected, rel=1e-5), name
    for name, expected in ORTHOGONAL[version].items():
        value = values[f"blocks.1.{name}"]
        torch.testing.assert_close(value @ value.T, expected * torch.eye(len(value)), rtol=0, atol=1e-5)
    for name in ("ffn.key.weight", "head.weight"):
        value = values[name if name in values else f"blocks.1.{name}"]
        gain = 0.25 * 100 / 64 if name == "head.weight" else 1
        torch.testing.assert_close(value.T @ value, gain * torch.eye(64), rtol=0, atol=1e-5)
    for name in ("att.output.weight", "ffn.value.weight", "ln1.bias", "att.ln_x.bias"):
        assert values[f"blocks.2.{name}"].abs().max() == 0
    assert 0 < values["emb.weight"].abs().max() <= 1e-4
    assert values["blocks.1.att.ln_x.weight"][0].item() == pytest.approx((2 / 3) ** 0.7)
    assert torch.equal(values["blocks.1.ln2.weight"], torch.ones(64))
    model = kind(sizes).initialise(0)
    for name, value in kind.initial_values(sizes, torch.Generator().manual_seed(0)):
        assert torch.equal(model.state_dict()[name], value), name
    assert model(torch.randint(100, (1, 8)))[0].isfinite().all()


@each_version
def test_a_block_compiles_to_one_graph_with_its_gradients(make_model):
    block = make_model(dtype=torch.float32, n_embd=32, dim_att=32).blocks[1]
    x, carry = torch.randn(2, 2, 9, 32, requires_grad=True).unbind(0)
    compiled = torch.compile(lambda x: block(x, carry, None)[0], fullgraph=True, backend="aot_eager")
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad(compiled(x).square().sum(), wanted)
    truth = torch.autograd.grad(block(x, carry, None)[0].square().sum(), wanted)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
