"""What README and docs say is run: every command, and the example of a method of one's own."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import small_model

from rwkv_bone.config import TrainConfig, make_parser
from rwkv_bone.files.known import KNOWN
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.peft import METHODS, inject, merge
from rwkv_bone.training import memory
from tests.runs import make_world, program

ROOT = Path(__file__).resolve().parents[1]


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


PROGRAMS = ("python", "pip", "make", "rwkv-bone", "torchrun", "srun")


def commands(text: str) -> list[str]:
    """Every command of a page, in order: the lines of its shell blocks, fenced or indented, and what is quoted elsewhere."""
    found = []
    pattern = r"^```(\w*)\n(.*?)^```|(?<=\n\n)((?: {4}[^\n]*\n|\n)+)|`([^`\n]+)`"
    for kind, fenced, indented, quoted in re.findall(pattern, text, re.M | re.S):
        if quoted and quoted.split()[0] in PROGRAMS and " " in quoted:
            found.append(quoted)
        block = fenced if kind == "sh" else indented
        found += [line.strip() for line in block.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]
    return found


PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
COMMANDS = [(name, command) for name, text in PAGES.items() for command in commands(text)]

NOT_HERE = {  # how a command begins that cannot be run here: why, and what is tested instead
    "make ": "makes an environment: make itself says that it knows the target",
    "pip install": "makes an environment: what it would install is named in pyproject.toml",
    "rwkv-bone download g1": "a download: the name is one that the program knows",
    "torchrun": "two machines with GPUs: the flags are parsed",
    "srun": "a cluster: the flags are parsed",
    "[ $? = 138 ]": "a cluster: the script is parsed",
    "python -m rwkv_bone.compare": "hours: the report is made of the runs that are in benchmarks/results",
    "python -m rwkv_bone.api": "writes the page: test_api.py compares it",
    "python -m rwkv_bone.training.memory": "minutes: it is run for small models",
}
# pages whose commands another file runs
ELSEWHERE = {"merging.md": "test_merge.py", "huggingface.md": "test_hf.py", "paper.md": "test_paper.py"}


def reason(command: str) -> str | None:
    return next((begin for begin in NOT_HERE if command.startswith(begin)), None)


def run_command(command: str, folder: Path) -> str:
    """Run a command as it stands in a process that begins in a tenth of a second; what it says.

    "..." becomes a model and data. What needs a model of billions of parameters, or several devices, ends with --dry_run.
    """
    name, *words = shlex.split(command, comments=True)
    assert name in ("python", "rwkv-bone"), command
    script = words[0].removesuffix(".py")
    usual = {"train": ["--load_model", "base.pth", "--data_file", "mine.jsonl", "--r", "8"],
             "merge": ["--base_model", "base.pth", "--peft_checkpoint", "out/mine/rwkv-0.pth"]}  # fmt: skip
    words = [word for w in words for word in (usual[script] if w == "..." else [w])]
    if name == "rwkv-bone":
        words = ["-m", "rwkv_bone", *words]
    elif words[0] != "-m":
        words[0] = str(ROOT / words[0])
    if "--devices" in words or re.search(r"\bg1-[\d.]+b.pth", command):
        words.append("--dry_run")
    done = program(words, folder, "hello\n")
    assert done.returncode == 0, command + done.stdout + done.stderr
    return done.stdout


def run_page(name: str, folder: Path) -> int:
    """Run every command of a page that can be run here, in order; how many."""
    here = [command for page, command in COMMANDS if page == name and not reason(command)]
    for command in here:
        run_command(command, folder)
    return len(here)


def test_every_command_of_readme_and_docs_is_run_by_a_test():
    """By the tests of this file, which run whole pages, or by another, which names the page."""
    run_here = set(re.findall(r'run_page\("([\w.]+)"', Path(__file__).read_text()))
    for page, command in COMMANDS:
        if page in ELSEWHERE:
            assert f"docs\" / \"{page}" in (ROOT / "tests" / ELSEWHERE[page]).read_text()
            assert command in "".join(blocks(PAGES[page], "sh")), f"{page}: {ELSEWHERE[page]} runs fenced blocks alone: {command}"
        else:
            assert page in run_here or reason(command), f"{page}: no test runs {command}"
    assert {begin for begin in NOT_HERE if not any(c.startswith(begin) for _, c in COMMANDS)} == set(), "no longer there"


def write_small_model(path: Path) -> None:
    model = small_model(dtype=torch.float32, version="x070", vocab_size=257, n_embd=64, dim_att=64, dim_ffn=64)
    save_tensors(path, {name: t.bfloat16() for name, t in model.state_dict().items()})


@pytest.mark.slow
def test_the_commands_of_the_pages_for_users_work(tmp_path):
    write_small_model(tmp_path / "base.pth")
    for size in ("1.5b", "2.9b", "7.2b", "13.3b"):
        shutil.copy(tmp_path / "base.pth", tmp_path / f"g1-{size}.pth")
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(16)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "What is 2 + 2?", "answer": "It is\n#### 4"}) + "\n")
    other = tmp_path / "out" / "other"  # plotted beside the README's own run
    other.mkdir(parents=True)
    (other / "loss_data.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert run_page("README.md", tmp_path) >= 8
    assert (tmp_path / "tuned.pth").exists() and (tmp_path / "tuned.st").exists()
    (tmp_path / "tuned.st").unlink()  # the pages of docs/ make it, and mine.idx, again
    assert run_page("data.md", tmp_path) == 3 and run_page("models.md", tmp_path) == 1
    for made in ("mine.bin", "mine.idx", "mine.mask.bin"):
        (tmp_path / made).unlink()
    assert run_page("flags.md", tmp_path) >= 6 and run_page("memory.md", tmp_path) >= 10
    assert run_page("troubleshooting.md", tmp_path) == 1


@pytest.mark.slow
def test_the_commands_of_the_run_on_real_data_work(data, tmp_path):
    shutil.copy(data / "tiny-rwkv6-1m.pth", tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        lines = (data / "gsm8k" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("".join(lines[:6]))
    assert run_page("gsm8k.md", tmp_path) == 4


@pytest.mark.slow
def test_the_commands_of_the_run_on_rwkv7_work(data, tmp_path):
    shutil.copy(data / "tiny-rwkv7-gsm8k.pth", tmp_path)
    (tmp_path / "math").mkdir()
    rows = (data / "math" / "test.jsonl").read_text().splitlines(keepends=True)[:6]
    for name in ("math/train.jsonl", "test100.jsonl"):
        (tmp_path / name).write_text("".join(rows))
    assert run_page("rwkv7.md", tmp_path) == 5


@pytest.mark.slow
def test_the_commands_for_several_devices_work(tmp_path):
    make_world(tmp_path)
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "mine.jsonl")
    assert run_page("engines.md", tmp_path) == 1


@pytest.mark.slow
def test_the_comparisons_tables_are_those_of_their_runs(data, tmp_path):
    """Tables of the page are those of benchmarks/results; where the model is at hand, its command makes the same again."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    commands, made = [command for page, command in COMMANDS if page == "comparison.md"], 0
    for command in commands:
        _, _, _, config, _, out = shlex.split(command)
        results = ROOT / "benchmarks" / "results" / Path(out).name
        if not results.exists():  # no run yet
            continue
        table = (results / "table.md").read_text()
        rows = [line for line in table.splitlines() if line.startswith("| ")]
        assert len(rows) > 4 and all(row in PAGES["comparison.md"] for row in rows), config
        if (tmp_path / json.loads((ROOT / config).read_text())["load_model"]).exists():
            shutil.copytree(results, tmp_path / out, ignore=shutil.ignore_patterns("table.*"))
            run_command(command + " --report", tmp_path)
            assert (tmp_path / out / "table.md").read_text() == table
            made += 1
    assert len(commands) == 5 and made


def test_the_memory_tables_program_runs(monkeypatch, capsys):
    monkeypatch.setattr(memory, "RELEASES", {"tiny": ("x070", {"vocab_size": 65536, "n_layer": 1, "n_embd": 64})})
    monkeypatch.setattr(memory, "LENGTHS", (16,))
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | `--peft` | `--quant` | 16 | 16, `--grad_cp 1` |")
    assert len(lines) == 2 + 3 + 1 and lines[2].startswith("| tiny | bone, r 64 | none | ")


def test_what_cannot_run_here_is_what_its_programs_take(tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    for page, command in COMMANDS:
        begin, words = reason(command), shlex.split(command, comments=True)
        if begin == "make ":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False)
            assert done.returncode == 0, command
        elif begin == "pip install":
            for word in words[2:]:
                extra = re.fullmatch(r"(?:\.|rwkv-bone)\[(.*)\]", word)
                for name in extra[1].split(",") if extra else [word] if "=" not in word and word[0] != "-" else []:
                    assert name == "constraints.txt" or re.search(rf'\b{re.escape(name)}\b', project), f"{page}: {name}"
        elif begin == "rwkv-bone download g1":
            assert words[2] in KNOWN
        elif begin in ("torchrun", "srun"):
            script = words[words.index("train.py") + 1 :]
            script.remove("...")
            assert TrainConfig.from_argv([*script, "--data_file", "x"]).num_nodes == 2
        if begin == "torchrun":
            words[words.index("...")] = "--r"  # ambiguous to torchrun, unless it is told where its own flags end
            launcher = pytest.importorskip("torch.distributed.run").get_args_parser().parse_args(words[1:])
            assert (launcher.training_script, launcher.nnodes, launcher.nproc_per_node) == ("train.py", "2", "8")
    (script,) = re.findall(r"^ {4}#!/bin/bash\n(?: {4}.*\n)+", PAGES["engines.md"], re.M)
    assert "[ $? = 138 ]" in script and subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0


def test_every_flag_of_train_py_has_a_row_and_every_row_is_taken():
    tasks, community = PAGES["flags.md"], PAGES["rwkv-peft.md"]
    parser, _ = make_parser()
    for action in parser._actions:
        (*_, flag) = action.option_strings
        shown = action.help != argparse.SUPPRESS and flag != "--help"
        assert not shown or re.search(rf"`[^`]*{flag}\b", tasks + community), f"docs/flags.md has no row for {flag}"
    (table,) = re.findall(r"^\| wish \| flags of `train.py` \|\n(.*?)\n\n", tasks, re.M | re.S)
    spans = [span for line in table.splitlines() for span in re.findall(r"`(--[^`]+)`", line)]
    usual = {"--load_model": "base.pth", "--data_file": "mine.jsonl"}
    for span in spans:
        words = [word for flag, value in usual.items() if flag not in span for word in (flag, value)] + shlex.split(span)
        if span not in ("--micro_bsz", "--accumulate_grad_batches"):  # named without a value
            TrainConfig.from_argv(words)


def test_the_table_of_models_is_that_of_the_program():
    rows = [f"| {k.name} | `{k.repository}` | `{k.file}` | {k.gb:.1f} | {k.licence} | {k.use} |" for k in KNOWN.values()]
    assert [line for line in PAGES["models.md"].splitlines() if re.match(r"\| \w+-", line)] == rows


def test_the_recipes_are_rows_of_the_memory_table():
    lines = [line for line in PAGES["memory.md"].splitlines() if re.match(r"\| (model|G1|\d[\d.]*B) ", line)]
    header, *rows = [line.strip("| ").split(" | ") for line in lines]
    computed = {(*row[:3], column): cell for row in rows for column, cell in zip(header[3:], row[3:])}
    recipes = re.findall(r"^\| (\d+ GB) \| (.*?) \| ([\d.]+) \| `(.*)` \|$", PAGES["memory.md"], re.M)
    assert sorted({int(card.split()[0]) for card, *_ in recipes}) == [8, 12, 16, 24, 48, 80] and len(recipes) == 10
    for card, what, figure, command in recipes:
        config = TrainConfig.from_argv(shlex.split(command)[2:])
        size = config.load_model.removesuffix(".pth").replace("g1-", "G1 ").replace("b", "B")
        method = "none" if config.peft == "none" else f"{config.peft}, r {config.peft_options['r']}"
        column = f"{config.ctx_len}, `--grad_cp 1`" if config.grad_cp else str(config.ctx_len)
        assert computed[size, method, config.quant, column] == f"{figure}: {card}", command
        assert what.startswith(size) and str(config.ctx_len) in what and config.micro_bsz == 1
        assert {"int8": "in 8 bits", "nf4": "in 4 bits", "none": ""}[config.quant] in what


def test_the_example_of_a_method_is_a_method():
    (example,) = blocks(PAGES["adding-a-method.md"], "python")
    names: dict = {}
    exec(example, names)
    try:
        model = small_model()
        idx = torch.randint(50, (2, 6))
        before = model(idx)[0]
        layer = METHODS["scale"]
        inject(model, layer, layer.Config(8))
        torch.testing.assert_close(model(idx)[0], before)
        for name, p in model.named_parameters():
            if name.endswith(".a"):
                torch.nn.init.normal_(p, std=0.1)
        adapted = model(idx)[0]
        merge(model)
        torch.testing.assert_close(model(idx)[0], adapted)
        assert not torch.allclose(adapted, before)
    finally:
        del METHODS["scale"]


def test_every_flag_of_the_pages_exists():
    sources = " ".join(path.read_text() for path in [*ROOT.glob("rwkv_bone/**/*.py"), ROOT / "Makefile"])
    for page in ("README.md", "flags.md", "rwkv-peft.md", "troubleshooting.md", "data.md"):
        for flag in set(re.findall(r"`[^`\n]*?(--\w+)", PAGES[page])):
            assert flag in sources or re.search(rf"\b{flag[2:]}\b", sources), f"{page}: {flag}"


def test_every_link_between_the_pages_leads_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (folder / target).exists(), f"{page}: {target}"


def test_each_page_begins_with_what_it_answers():
    for page, text in PAGES.items():
        title, _, opening = text.partition("\n\n")
        assert title.startswith("# ") and (page == "README.md" or re.match(r"This page|Which functions", opening)), page


def test_the_example_in_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_small_model(tmp_path / "base.pth")
    example = blocks(PAGES["api.md"], "python")[0].replace('"..."', '"something"').replace(", ...]", "]")
    exec(example, {})
    assert (tmp_path / "tuned.pth").exists()
