"""docs/paper.md: the commands of the paper's experiment, on models of its shapes without values, and on small ones."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf")
pytest.importorskip("pyarrow", reason="the extra parquet")

import pyarrow
from pyarrow import parquet

from rwkv_bone.config import TrainConfig
from rwkv_bone.data.jsonl_to_binidx import main as make_binidx
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.files.safetensors import NAMES
from rwkv_bone.models import MODELS
from rwkv_bone.models.hf import HFSizes
from rwkv_bone.training import memory, summary
from rwkv_bone.training.run import main as train
from tests.conftest import small_model
from tests.hf_models import make_folder, make_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "paper.md").read_text()
COMMANDS = [shlex.split(line) for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
(TEMPLATE,) = re.findall(r"^```jinja\n(.*?)^```", PAGE, re.M | re.S)
TRAINED = [words[2:] for words in COMMANDS if words[:2] == ["python", "train.py"]]
EVALUATED = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "rwkv_bone.evaluate"]]
BINIDX = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "rwkv_bone.data.jsonl_to_binidx"]]
LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
RELEASES = ("7B", "G1 2.9B")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{}\n\n### Response:")  # fmt: skip


def name_of(config: TrainConfig) -> tuple[str, str]:
    """The model and the method of a command, as the page's table has them."""
    model = {"RWKV-x060": "RWKV-6 7B", "RWKV-x070": "RWKV-7 3B", "llama2-7b": "LLaMA2-7B"}[config.load_model[:9]]
    method = {"bone": "Bone", "bone_col": "Bone (column form)", "miss": "MiSS", "lora": "LoRA", "pissa": "PiSSA"}[config.peft]
    return model, f"{method} r {config.peft_options['r']}"


def write_zeros(path: Path, shapes: dict) -> None:
    """A safetensors file in bf16 that takes no place on the disk: all of its tensors are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": NAMES[torch.bfloat16], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_tokenizer(folder: Path) -> None:
    """LLaMA2's base model has no chat template."""
    for name, text in make_tokenizer().items():
        (folder / name).write_text(text)
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the commands name, but for the models; the first row is longer than the context."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca.jinja").write_text(TEMPLATE)
    row = {"type": "GSM_AnsAug", "original_question": "?"}
    answers = ["It is a sum. " * (300 if i == 0 else 3) + f"\n#### {2 * i}\nThe answer is: {2 * i}" for i in range(130)]
    rows = [{**row, "query": f"What is {i} + {i}?", "response": answer} for i, answer in enumerate(answers)]
    (tmp_path / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (words,) = BINIDX
    make_binidx([*words, "--workers", "1"])
    return tmp_path


def test_the_settings_are_the_papers():
    assert len(TRAINED) == 12
    for argv in TRAINED:
        config = TrainConfig.from_argv(argv)
        assert config.micro_bsz * config.accumulate_grad_batches * int(config.devices) == 64
        assert (config.ctx_len, config.lr_init, config.warmup_steps, config.weight_decay) == (512, 2e-5, 0, 0)
        assert (config.epoch_count, config.precision, config.grad_cp, config.dataload) == (1, "bf16", True, "pad")
        of_llama = config.load_model == "llama2-7b"
        assert (config.lr_final, config.beta2) == ((0, 0.999) if of_llama else (2e-5, 0.99))
        assert (config.beta1, config.adam_eps, config.loss_mask) == (0.9, 1e-8, "answer" if of_llama else "pad")


@pytest.mark.slow
def test_every_training_command_is_right_for_a_model_of_that_shape(world, monkeypatch, capsys):
    """And takes the memory on a GPU, and trains the parameters, that the page says."""
    from tests.cpu_deepspeed import CpuDeepSpeed

    for release in RELEASES:
        version, sizes = memory.RELEASES[release]
        (file,) = {file for file in (TrainConfig.from_argv(argv).load_model for argv in TRAINED) if version in file}
        write_zeros(world / file, MODELS[version].shapes(MODELS[version].new_sizes(**sizes)))
    llama, hf = world / "llama2-7b", MODELS["hf"]
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps(LLAMA))
    write_tokenizer(llama)
    write_zeros(llama / "model.safetensors", hf.shapes(HFSizes(32000, 32, 4096, LLAMA)))
    monkeypatch.setattr(summary, "estimate", lambda *args: estimates.append(memory.estimate(*args[:-1], True)) or estimates[-1])
    for argv in TRAINED:
        estimates: list[dict[str, int]] = []
        assert train([*argv, "--dry_run", "--accelerator", "cpu"], CpuDeepSpeed) == 0
        size = sum(estimates[0].values())
        trained = re.search(r"^trains +([\d,]+) parameters", capsys.readouterr().out, re.M)
        row = "| " + " | ".join([*name_of(TrainConfig.from_argv(argv)), f"{int(trained[1].replace(',', '')) / 1e6:.1f}M",
                                 f"{size / 1e9:.1f}", memory.card_for(size)])  # fmt: skip
        assert f"\n{row} |" in PAGE, row


@pytest.mark.slow
@pytest.mark.parametrize("model", ["RWKV-x060-World-7B-v2.1-20240507-ctx4096.pth", "llama2-7b"])
def test_a_small_model_is_trained_and_evaluated_by_these_commands(world, model, capsys):
    if model == "llama2-7b":
        write_tokenizer(make_folder(world / model))
    else:
        sizes = {"vocab_size": 65536, "n_embd": 32, "dim_att": 32}
        save_tensors(world / model, small_model(dtype=torch.float32, version="x060", **sizes).state_dict())
    argv = next(argv for argv in TRAINED if model in argv)
    small = "--accelerator cpu --devices 1 --strategy auto --precision fp32 --r 8 --micro_bsz 2 --epoch_steps 1"
    assert train([*argv, *small.split()]) == 0
    (world / "gsm8k" / "main").mkdir(parents=True)
    (world / "math" / "algebra").mkdir(parents=True)
    problem = {"problem": ["What is 1 + 1?"], "level": ["Level 1"], "type": ["Algebra"], "solution": ["It is $\\boxed{2}$."]}
    question = {"question": ["What is 1 + 1?"], "answer": ["It is 2.\n#### 2"]}
    for folder, columns in (("gsm8k/main", question), ("math/algebra", problem)):
        parquet.write_table(pyarrow.table(columns), world / folder / "test-00000-of-00001.parquet")
    mine = [argv for argv in EVALUATED if model in argv]
    assert [argv[0] for argv in mine] == ["gsm8k", "math"]
    for argv in mine:
        evaluate([*argv, "--max_tokens", "4", "--out", "results.jsonl", "--overwrite"])
        assert "of 1 right" in capsys.readouterr().out
        asked = json.loads((world / "results.jsonl").read_text().splitlines()[1])["prompt"]
        assert asked == (ALPACA.format("What is 1 + 1?") if model == "llama2-7b" else "User: What is 1 + 1?\n\nAssistant:")
