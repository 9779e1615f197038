"""The Python API: each example of its documentation runs, and it does what the commands do."""

import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model
from torch import nn

import rwkv_bone as rb
from rwkv_bone import api
from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors, save_tensors
from rwkv_bone.peft import METHODS, adapters
from tests.runs import lines

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(16)]


@pytest.fixture
def folder(tmp_path, monkeypatch, version):
    """Where a user stands: base.pth, and adapter.pth that was trained on it."""
    sizes = {"n_embd": 32, "dim_att": 32, "dim_ffn": 64, "head_size": 8, "vocab_size": 257}
    base = small_model(dtype=torch.float32, version=version, **sizes)
    save_tensors(tmp_path / "base.pth", {name: t.bfloat16() for name, t in base.state_dict().items()})
    monkeypatch.chdir(tmp_path)
    model = rb.load_model("base.pth", device="cpu")
    rb.inject(model, "bone", r=8)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.bone.normal_(std=0.05)
    rb.save(model, "adapter.pth", tokenizer=rb.tokenizer(model))
    return tmp_path


def test_importing_the_package_imports_no_torch():
    code = "import rwkv_bone, sys; assert 'torch' not in sys.modules; assert 'train' in dir(rwkv_bone); rwkv_bone.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "has no attribute 'nothing'" in done.stderr


def test_every_function_has_types_a_description_and_an_example_that_runs(folder):
    assert sorted(rb.__all__) == sorted(api.__all__) and len(api.__all__) == 10
    for name in api.__all__:
        function = getattr(api, name)
        (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={"rb": rb})
        said: list[str] = []
        assert test.examples and not doctest.DocTestRunner().run(test, out=said.append).failed, "".join(said)
        signature = inspect.signature(function)
        annotations = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
        assert inspect.Signature.empty not in annotations, name


def test_the_page_of_the_documentation_is_that_of_the_code():
    assert (ROOT / "docs" / "api.md").read_text() == api.page(), "python -m rwkv_bone.api > docs/api.md"


def test_the_api_trains_what_the_command_trains(folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = {"lr_init": 1e-2, "epoch_count": 2, "micro_bsz": 4, "ctx_len": 64}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    from rwkv_bone.training.run import main

    main(["--load_model", "base.pth", "--data_file", "rows.jsonl", "--peft", "lora", "--r", "4", "--proj_dir", "a",
          "--accelerator", "cpu", *words])  # fmt: skip
    torch.manual_seed(0)  # as the command begins
    model = rb.load_model("base.pth", device="cpu")
    rb.inject(model, "lora", r=4)
    losses = rb.train(model, iter(ROWS), rb.tokenizer(model), proj_dir="b", verbose=False, **flags)
    assert losses == [line["loss"] for line in lines(folder / "a")] and len(losses) == 8
    ours, theirs = open_tensors("b/rwkv-1.pth"), open_tensors("a/rwkv-1.pth")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    here, there = json.loads(Path("b/rwkv-1.json").read_text()), json.loads(Path("a/rwkv-1.json").read_text())
    assert {**here, "parts": 0} == {**there, "parts": 0}

    held = rb.loss(model, ROWS, rb.tokenizer(model))
    rb.merge(model)
    rb.save(model, "tuned.pth")
    assert rb.loss(rb.load_model("tuned.pth", dtype=torch.float32), ROWS, rb.tokenizer(model)) == pytest.approx(held, rel=2e-2)
    again = rb.load_model("base.pth", adapter="b/rwkv-1.pth", device="cpu")
    assert rb.loss(again, ROWS, rb.tokenizer(again)) == pytest.approx(held, rel=1e-5)


def test_without_an_adapter_the_whole_model_trains_and_the_held_out_loss_is_its_loss(folder):
    model = rb.load_model("base.pth", device="cpu")
    tokenizer = rb.tokenizer(model)
    rb.train(model, ROWS, tokenizer, held_out=ROWS[:4], lr_init=1e-3, verbose=False)
    whole = load_model("out/rwkv-0.pth", torch.float32)
    assert not torch.equal(whole.head.weight, load_model("base.pth", torch.float32).head.weight)
    (line,) = map(json.loads, Path("out/val_data.jsonl").read_text().splitlines())
    assert rb.loss(model, ROWS[:4], tokenizer) == pytest.approx(line["loss"], rel=1e-5)


def test_generate_is_a_function_and_a_folder_of_the_package(folder):
    import rwkv_bone.generate.sampling  # noqa: F401

    model = rb.load_model("base.pth", adapter="adapter.pth", device="cpu")
    options = {"max_tokens": 4, "seed": 3}
    _, two = rb.generate(model, rb.tokenizer(model), ["One", "Two"], **options)
    assert rb.generate(model, rb.tokenizer(model), "Two", **options) == [two]
    asked = rb.generate(model, rb.tokenizer(model), "One", instruct=True, temperature=0, max_tokens=4)
    assert asked == rb.generate(model, rb.tokenizer(model), "User: One\n\nAssistant:", temperature=0, max_tokens=4)


@pytest.mark.parametrize("method", [name for name, layer in METHODS.items() if not layer.starts_from_gradient])
def test_an_adapter_of_any_torch_module_is_saved_loaded_and_merged(tmp_path, method):
    def module():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False))

    ours, x = module(), torch.randn(5, 8)
    before = ours(x)
    assert rb.inject(ours, method, r=4) == ["0", "2"]
    torch.testing.assert_close(ours(x), before)
    optimiser = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(x).square().sum().backward()
    optimiser.step()
    trained = ours(x)
    assert not torch.allclose(trained, before)
    rb.save(ours, tmp_path / "a.pth")
    other = module()
    assert rb.load_adapter(other, tmp_path / "a.pth")["method"] == method
    torch.testing.assert_close(other(x), trained)
    rb.merge(other)
    assert [type(layer) for layer in other] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(other(x), trained)


def test_what_cannot_be_is_refused_in_a_line(folder):
    model = rb.load_model("base.pth", device="cpu")
    tokenizer = rb.tokenizer(model)
    refused = {
        "lora, ": lambda: rb.inject(model, "lore"),
        "no option": lambda: rb.inject(model, "bone", alpha=3),
        "no adapter is on": lambda: rb.merge(model),
        "row 2: wanted a dict": lambda: rb.train(model, [ROWS[0], 7], tokenizer, verbose=False),
        "unknown flag --lr": lambda: rb.train(model, ROWS, tokenizer, lr=1),
        "peft is the model's": lambda: rb.train(model, ROWS, tokenizer, peft="lora"),
        "exists": lambda: rb.save(model, "base.pth"),
        "wanted a model of load_model": lambda: rb.save(nn.Linear(2, 2), "x.pth"),
        "this one is a Linear": lambda: rb.load_adapter(nn.Linear(2, 2), "adapter.pth"),
        "no such file": lambda: rb.load_model("none.pth"),
    }
    for message, call in refused.items():
        with pytest.raises(UserError, match=message):
            call()
    rb.inject(model, "bone", r=8)
    with pytest.raises(UserError, match="already"):
        rb.load_adapter(model, "adapter.pth")


def test_a_model_of_transformers_has_its_own_tokenizer_and_is_saved_as_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tests.hf_models import make_folder, open_hf

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "llama")
    model = rb.load_model("llama", device="cpu")
    tokenizer = rb.tokenizer(model)
    rb.inject(model, "lora", r=4)
    losses = rb.train(model, ROWS, tokenizer, lr_init=1e-2, epoch_count=2, verbose=False)
    assert losses[-1] < losses[0]
    assert rb.generate(model, tokenizer, "Hi", instruct=True, max_tokens=3, temperature=0)
    rb.merge(model)
    rb.save(model, "tuned")
    idx = torch.randint(4, 100, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(open_hf(tmp_path / "tuned")(idx).logits, model(idx)[0], atol=1e-4, rtol=1e-4)


def test_what_is_saved_remembers_its_tokenizer(folder):
    model = rb.load_model("base.pth", device="cpu")
    rb.save(model, "whole.pth", tokenizer=rb.tokenizer(model, encoding="utf-16-le"))
    assert rb.tokenizer(rb.load_model("whole.pth", device="cpu")).encoding == "utf-16-le"
    assert rb.tokenizer(model).encoding == "utf-8"
