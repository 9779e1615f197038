"""Runs of train.py for tests: a small world to train in, and processes that begin in a tenth of a second.

They are forked from a server that has imported everything, with the environment that torchrun or SLURM gives to its processes.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_bone.files.pth import open_tensors, save_tensors
from tests.conftest import small_model

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["tests.runs", "tests.cpu_deepspeed", "deepspeed", "rwkv_bone.training.run", "rwkv_bone.api", "lightning.fabric",
           "torch._dynamo", "matplotlib.figure"]  # fmt: skip


def make_world(folder: Path, rows: int = 24, version: str = "x070") -> Path:
    """A folder with a small bf16 base model of vocabulary 257 and a jsonl of short documents."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_layer": 2, "n_embd": 32, "dim_att": 32, "dim_ffn": 64, "head_size": 8}
    model = small_model(dtype=torch.float32, version=version, **sizes)
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items()}
    save_tensors(folder / "base.pth", {**tensors, "head.weight": tensors["head.weight"] / 2})  # less sure of itself
    texts = [{"text": f"{i} and {i} is {2 * i}. " * (1 + i % 3)} for i in range(rows)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def arguments(folder: Path, *flags, name: str = "run") -> list[str]:
    usual = {
        "--load_model": folder / "base.pth",
        "--data_file": folder / "data.jsonl",
        "--data_type": "jsonl",
        "--ctx_len": 32,
        "--micro_bsz": 4,
        "--r": 8,
        "--lr_init": "1e-2",
        "--proj_dir": folder / name,
        "--accelerator": "cpu",
        "--threads": 1,
    }
    given = [str(f) for f in flags]
    if "none" in given:  # --peft none has no options
        del usual["--r"]
    return [str(w) for flag, value in usual.items() if flag not in given for w in (flag, value)] + given


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(folder)]


def assert_same_run(a: Path, b: Path) -> None:
    """Bitwise the same losses, each step once, and results."""
    assert losses(a) == losses(b)
    results = sorted(path.name for path in a.glob("rwkv-*.pth"))
    assert results and results == sorted(path.name for path in b.glob("rwkv-*.pth") if "interrupted" not in path.name)
    for name in results:
        ours, theirs = open_tensors(a / name), open_tensors(b / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


class Ended(NamedTuple):
    codes: list[int]  # of each process; negative: the signal that killed it
    said: str  # stdout and stderr of all


def torchrun(rank: int, ranks: int) -> dict:
    own = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, **own}


def slurm(rank: int, ranks: int) -> dict:
    job = {"SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "test", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": 0}
    return {"SLURM_NTASKS": ranks, "SLURM_NTASKS_PER_NODE": ranks, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, **job}


def server():
    """Makes processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    os.environ["PYTHONPATH"] = str(ROOT)  # the server does not take sys.path
    return context


def waited(process, seconds: float, said: Callable[[], str] = str) -> int:
    """The code with which a process ends; an AssertionError if it does not in time."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"a process did not end in {seconds} s; it said:\n" + said())
    return process.exitcode


def redirect(out, err=None, into=os.devnull) -> None:
    """What this process says from now on goes into the files `out` and `err` (None: out), and it reads the file `into`."""
    for number, file in enumerate((open(into), out, err or out)):  # noqa: SIM115
        os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "rww"[n], buffering=1, closefd=False) for n in range(3))  # noqa: SIM115


class Processes:
    """Ranks 0, 1, ... of one run. `before` is called in the first process, `in_each` in all, before the run.

    picture: draw it at the end, which takes as long as all else.
    """

    def __init__(
        self, argv: list[str], log: Path, ranks: int = 1, before=None, launcher=torchrun, in_each=None, picture: bool = False
    ):
        context = server()
        self.logs = [log.with_suffix(f".{rank}.log") for rank in range(ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            environment = launcher(rank, ranks) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            first = in_each or (before if rank == 0 else None)
            args = (argv, self.logs[rank], environment if ranks > 1 else {}, first, picture)
            self.processes.append(context.Process(target=train, args=args))
            self.processes[-1].start()

    def signal(self, number: int, rank: int = 0) -> None:
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def end(self, seconds: float = 120) -> Ended:
        return Ended([waited(process, seconds, self.said) for process in self.processes], self.said())

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


def train(argv: list[str], log: Path, environment: dict, before, picture: bool) -> None:
    """The body of one process."""
    from rwkv_bone.errors import run
    from rwkv_bone.training import summary
    from rwkv_bone.training.run import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    deepspeed = None
    if any("deepspeed" in word for word in argv):
        from tests.cpu_deepspeed import CpuDeepSpeed as deepspeed
    if not picture:
        summary.draw = lambda folder: False
    torch.set_num_threads(1)
    with open(log, "w") as file:
        redirect(file)
    if before is not None:
        before()
    run(lambda: main(argv, deepspeed))


def run_to_end(folder: Path, *flags, name: str, ranks: int = 1, before=None, seconds: float = 120, **more) -> Ended:
    return Processes(arguments(folder, *flags, name=name), folder / name, ranks, before, **more).end(seconds)


class DieAt:
    """Called in a process, kills it before its `count`-th opening, renaming, cutting or removal of a file in `folder`."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = str(folder), count

    def __call__(self) -> None:
        def hook(event: str, args: tuple) -> None:
            if event in ("open", "os.rename", "os.remove", "os.truncate") and str(args[0]).startswith(self.folder):
                self.count -= 1
                if self.count == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


class Done(NamedTuple):
    returncode: int  # negative: the signal that killed it
    stdout: str
    stderr: str


def program(words: list, folder: Path, stdin: str = "") -> Done:
    """`python WORDS...` in `folder`, without the seconds that importing takes."""
    with tempfile.TemporaryDirectory() as talk:
        (Path(talk) / "in").write_text(stdin)
        process = server().Process(target=run_program, args=(list(map(str, words)), folder, Path(talk)))
        process.start()
        return Done(waited(process, 300), *((Path(talk) / name).read_text() for name in ("out", "err")))


def run_program(words: list[str], folder: Path, talk: Path) -> None:
    """The body of that process."""
    with open(talk / "out", "w") as out, open(talk / "err", "w") as err:
        redirect(out, err, talk / "in")
    os.chdir(folder)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def forked(work) -> Done:
    """`work()` in a copy of this process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = multiprocessing.get_context("fork").Process(target=lambda: (redirect(out, err), work()))
        process.start()
        code = waited(process, 120)  # it may wait for a thread that the copy does not have
        for file in (out, err):
            file.seek(0)
        return Done(code, out.read(), err.read())
