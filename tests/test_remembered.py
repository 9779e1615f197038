"""Tokenizer, encoding and template of a training are in the records of adapters and models: no later command asks for them."""

import contextlib
import io
import json
import zipfile

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.models import ABOUT, read_about
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.generate.command import main as generate
from rwkv_bone.merging.command import main as merge
from rwkv_bone.training.run import main as train
from tests.conftest import small_model

ROWS = [{"question": f"ab {i}", "answer": "ba"} for i in range(8)]
TEMPLATE = (
    "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}"
)


def run(main, *words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert not main([str(word) for word in words])
    return out.getvalue()


@pytest.fixture(scope="module", params=["tokenizer.json", "utf-16-le"])
def world(request, tmp_path_factory):
    """A folder with a model, an adapter and the model merged with it; flags of the training; flags that name the same later."""
    folder = tmp_path_factory.mktemp("remembered")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "mine.jinja").write_text(TEMPLATE)
    if request.param == "tokenizer.json":
        tokenizers = pytest.importorskip("tokenizers")
        own = tokenizers.ByteLevelBPETokenizer()
        own.train_from_iterator(["ab ba Q A 0 1 2;"], vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False)
        own.save(str(folder / "tokenizer.json"))
        flags, vocab_size = ["--tokenizer", folder / "tokenizer.json"], 300
    else:
        flags, vocab_size = ["--encoding", "utf-16-le"], 256
    model = small_model(dtype=torch.float32, vocab_size=vocab_size, n_embd=32, dim_att=32, dim_ffn=64)
    save_tensors(folder / "base.pth", {name: t.bfloat16() for name, t in model.state_dict().items()})
    usual = ("--data_file", folder / "rows.jsonl", "--ctx_len", 64, "--epoch_steps", 1, "--lr_init", 1e-2, "--accelerator", "cpu")
    read_by = (*flags, "--template", folder / "mine.jinja")
    run(train, "--load_model", folder / "base.pth", *usual, *read_by, "--r", 8, "--proj_dir", folder / "run")
    run(train, "--load_model", folder / "base.pth", *usual, *read_by, "--peft", "none", "--proj_dir", folder / "whole")
    pair = ("--base_model", folder / "base.pth", "--peft_checkpoint", folder / "run/rwkv-0.pth")
    run(merge, *pair, "--output", folder / "tuned.pth")
    return folder, flags


ASK = ("--instruct", "--prompt", "ab 1", "--max_tokens", 8, "--temperature", 0, "--device", "cpu")


@pytest.mark.parametrize("what", ["adapter", "merged", "whole", "merged again", "web-rwkv's"])
def test_what_was_trained_is_asked_without_a_flag_of_its_training(world, what, tmp_path):
    folder, flags = world
    files = {
        "adapter": ("--model", folder / "base.pth", "--peft_checkpoint", folder / "run/rwkv-0.pth"),
        "merged": ("--model", folder / "tuned.pth"),
        "whole": ("--model", folder / "whole/rwkv-0.pth"),
        "merged again": ("--model", tmp_path / "fp32.pth"),
        "web-rwkv's": ("--model", tmp_path / "tuned.st"),
    }[what]
    if what == "merged again":  # only the dtype changes
        run(merge, "--base_model", folder / "tuned.pth", "--dtype", "fp32", "--output", tmp_path / "fp32.pth")
    if what == "web-rwkv's":
        run(merge, "--base_model", folder / "tuned.pth", "--output", tmp_path / "tuned.st")
    told = run(generate, *files, *ASK, *flags, "--template", folder / "mine.jinja")
    assert run(generate, *files, *ASK) == told
    measured = [run(evaluate, "loss", *files, "--data", folder / "rows.jsonl", "--out", tmp_path / f"{len(more)}.jsonl", *more)
                for more in ([], [*flags, "--template", folder / "mine.jinja"])]  # fmt: skip
    assert measured[0].splitlines()[:2] == measured[1].splitlines()[:2]


def test_a_merged_model_is_a_plain_file_of_tensors_still(world):
    folder, _ = world
    loaded, base = (torch.load(folder / name, weights_only=True) for name in ("tuned.pth", "base.pth"))
    assert loaded.keys() == base.keys() and read_about(folder / "base.pth") == {}
    with zipfile.ZipFile(folder / "tuned.pth") as archive:
        assert sum(name.endswith(ABOUT) for name in archive.namelist()) == 1


def test_a_tokenizer_that_is_gone_is_asked_for_by_name(world, tmp_path):
    folder, flags = world
    if "--tokenizer" not in flags:
        pytest.skip("bytes need no file")
    path = folder / "tokenizer.json"
    moved = path.rename(folder / "elsewhere.json")
    try:
        with pytest.raises(UserError, match=r"the tokenizer of the training, is not here, or is another file; give --tokenizer"):
            generate(["--model", str(folder / "tuned.pth"), *map(str, ASK)])
        (folder / "run" / "tokenizer.json").write_bytes(moved.read_bytes())  # beside the adapter it is found
        pair = ("--model", folder / "base.pth", "--peft_checkpoint", folder / "run/rwkv-0.pth")
        assert run(generate, *pair, *ASK)
    finally:
        moved.rename(path)


def test_an_adapter_given_as_a_model_is_called_one(world):
    folder, _ = world
    with pytest.raises(UserError, match="is an adapter, not a model; give its base as --model"):
        generate(["--model", str(folder / "run/rwkv-0.pth"), "--prompt", "x"])
