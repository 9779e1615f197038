"""RWKV-6: the official model's numbers on real and on random weights, and one forward for wholes, chunks and single tokens."""

import json
import os

import numpy as np
import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.models.x060 import RWKV, ModelConfig, initial_values


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def facts(tiny):
    return json.loads(tiny.with_suffix(".json").read_text())


@torch.no_grad()
def test_logits_and_state_after_64_tokens_are_the_rwkv_packages(model, tiny):
    reference = np.load(tiny.with_suffix(".prompt64.npz"))
    logits, state = model(torch.from_numpy(reference["tokens"])[None])
    assert np.abs(logits[0].numpy() - reference["logits"]).max() < 1e-4
    for field in ("att_shift", "wkv", "ffn_shift"):
        ours = torch.stack([getattr(layer, field)[0] for layer in state]).numpy()
        assert np.abs(ours - reference[f"state_{field}"]).max() < 1e-4, field


@torch.no_grad()
def test_logits_are_those_of_rwkv_cpp(model, facts):
    prompt = facts["rwkv_cpp_test"]
    logits, _ = model(torch.tensor([prompt["prompt_tokens"]]))
    expected = torch.tensor(prompt["expected_fp32_logits_after_last_token"])
    assert (logits[0, -1] - expected).abs().max() < 1e-4


@torch.no_grad()
def test_loss_on_10240_tokens_with_state_carried_is_the_packages(model, tiny):
    reference = np.load(tiny.with_suffix(".eval10240.npz"))
    tokens = torch.from_numpy(reference["tokens"].astype(np.int64))
    state, losses = None, []
    for start in range(0, len(tokens) - 1, 1024):
        idx, targets = tokens[start : start + 1024], tokens[start + 1 : start + 1025]
        logits, state = model(idx[None], state)
        losses.append(torch.nn.functional.cross_entropy(logits[0, : len(targets)].double(), targets, reduction="none"))
    losses = torch.cat(losses)
    assert abs(losses.mean().item() - 0.905476) < 1e-5
    assert np.abs(losses.numpy() - reference["nll"]).max() < 1e-3


@torch.no_grad()
def test_greedy_continuation_token_by_token_is_the_packages(model, tiny, facts):
    logits, state = model(torch.from_numpy(np.load(tiny.with_suffix(".prompt64.npz"))["tokens"])[None])
    expected = facts["greedy_after_prompt64"]["tokens"]
    ours = []
    for _ in expected:
        ours.append(logits[0, -1].argmax().item())
        logits, state = model(torch.tensor([[ours[-1]]]), state)
    assert ours == expected


@torch.no_grad()
@pytest.mark.parametrize("n_layer", [1, 3])
def test_random_weights_with_heads_of_64_give_the_packages_logits(n_layer, make_model, tmp_path):
    os.environ.update(RWKV_V7_ON="0", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")  # read by the package as it is imported
    from rwkv.model import RWKV as Package

    model = make_model(dtype=torch.float32, n_layer=n_layer, n_embd=128, dim_att=128, dim_ffn=96, head_size=64)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    package = Package(model=str(tmp_path / "m"), strategy="cpu fp32")
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, _ = package.forward(tokens, None, full_output=True)
    logits, _ = model(torch.tensor([tokens]))
    assert (logits[0] - expected).abs().max() < 1e-4


def test_a_sequence_in_chunks_equals_the_whole_in_output_and_gradients(make_model):
    model = make_model(n_layer=2)
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


def test_packed_documents_behind_separators_give_what_each_gives_alone(make_model):
    model = make_model()
    documents = [torch.randint(50, (1, n)) for n in (5, 1, 9)]
    separator = torch.zeros(1, 1, dtype=torch.long)
    row = torch.cat([documents[0], separator, documents[1], separator, documents[2]], 1)
    reset = torch.zeros(row.shape, dtype=torch.bool)
    reset[0, [0, 6, 8]] = True
    packed, _ = model(row, reset=reset)
    for document, start in zip(documents, (0, 6, 8)):
        alone, _ = model(document)
        torch.testing.assert_close(packed[:, start : start + document.shape[1]], alone, rtol=1e-12, atol=1e-12)
    for border in range(1, row.shape[1]):  # also where a document begins with a chunk
        _, state = model(row[:, :border], reset=reset[:, :border])
        rest, _ = model(row[:, border:], state, reset[:, border:])
        torch.testing.assert_close(rest, packed[:, border:], rtol=1e-12, atol=1e-12)


def test_recomputing_blocks_changes_no_gradient(make_model):
    model = make_model()
    idx = torch.randint(50, (2, 9))
    gradients = []
    for model.grad_cp in (False, True):
        model.zero_grad()
        model(idx)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_a_trained_initial_state_is_where_the_model_starts(make_model):
    model = make_model(time_state=True)
    idx = torch.randint(50, (1, 6))
    _, state = make_model()(idx)
    start = [
        layer._replace(
            att_shift=layer.att_shift * 0,
            ffn_shift=layer.ffn_shift * 0,
            wkv=model.blocks[i].att.time_state.mT[None].contiguous(),
        )
        for i, layer in enumerate(state)
    ]
    torch.testing.assert_close(model(idx)[0], model(idx, start)[0])


def test_sizes_are_read_from_the_file(make_model):
    model = make_model(n_layer=1, dim_att=32, head_size=4, dim_ffn=20)
    assert ModelConfig.from_state_dict(model.state_dict()) == model.config


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sd: sd.pop("blocks.1.ffn.value.weight"), "1 missing .*blocks.1.ffn.value.weight"),
        (lambda sd: sd.update({"blocks.1.att.extra": torch.zeros(1)}), "1 unknown .*blocks.1.att.extra"),
        (lambda sd: sd.update({"blocks.1.ln1.weight": torch.zeros(3)}), r"blocks.1.ln1.weight is \(3,\).*\(24,\)"),
        (lambda sd: sd.update({"emb.weight": torch.zeros(3)}), "wrong rank"),
        (lambda sd: sd.pop("emb.weight"), "without emb.weight"),
        (lambda sd: sd.update({"blocks.0.att.r_k": torch.zeros(1)}), "RWKV-7"),
        (lambda sd: [sd.pop(k) for k in list(sd) if "maa" in k], "RWKV-5"),
        (lambda sd: [sd.pop(k) for k in list(sd) if "att" in k], "not an RWKV"),
    ],
)
def test_another_version_or_a_damaged_model_is_refused_by_name(make_model, damage, message):
    tensors = make_model().state_dict()
    damage(tensors)
    with pytest.raises(UserError, match=message):
        ModelConfig.from_state_dict(tensors)


def test_a_new_model_starts_as_rwkv_lm_starts_it():
    config = ModelConfig.new(vocab_size=100, n_layer=3, n_embd=64, head_size=16)
    values = dict(initial_values(config, torch.Generator().manual_seed(0)))
    assert list(values) == list(config.shapes())
    key = values["blocks.1.att.key.weight"]
    torch.testing.assert_close(key @ key.T, 0.01 * torch.eye(64), rtol=0, atol=1e-5)
    head = values["head.weight"]
    torch.testing.assert_close(head.T @ head, 0.25 * 100 / 64 * torch.eye(64), rtol=0, atol=1e-5)
    assert values["blocks.2.att.output.weight"].abs().max() == 0
    assert values["emb.weight"].abs().max() <= 1e-4
    # by hand from the formulas, layer 1 of 3, channel 5 of 64
    assert values["blocks.1.att.time_decay"][0, 0, 5].item() == pytest.approx(-6 + 5 * (5 / 63) ** 1.35)
    assert values["blocks.1.att.time_faaaa"].view(-1)[5].item() == pytest.approx(0.5 * (1 - 5 / 63) - 0.1)
    assert values["blocks.1.att.time_maa_v"][0, 0, 5].item() == pytest.approx(1 - ((5 / 64) ** (2 / 3) + 0.15))
    assert values["blocks.1.att.time_maa_g"][0, 0, 5].item() == pytest.approx(1 - (5 / 64) ** (1 / 3))
    assert values["blocks.1.ffn.time_maa_k"][0, 0, 5].item() == pytest.approx(1 - (5 / 64) ** (2 / 3))
    assert values["blocks.1.att.ln_x.weight"][0].item() == pytest.approx((2 / 3) ** 0.7)
    logits, _ = RWKV(config).initialise(0)(torch.randint(100, (1, 8)))
    assert logits.isfinite().all()


def test_a_block_compiles_to_one_graph_with_its_gradients(make_model):
    block = make_model(dtype=torch.float32, n_embd=32, dim_att=32).blocks[1]
    x = torch.randn(2, 9, 32, requires_grad=True)
    compiled = torch.compile(lambda x: block(x, None)[0], fullgraph=True)
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad(compiled(x).square().sum(), wanted)
    truth = torch.autograd.grad(block(x, None)[0].square().sum(), wanted)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
