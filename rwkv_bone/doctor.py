"""What this machine can do: Python, packages, devices, compilers, kernels, vocabulary, disk; and what to do about the rest.

    python -m rwkv_bone.doctor

The kernels are built as training would build them, run, and compared with the definition in float64. The exit code is 0 if
training can work here, 1 if not. Needs nothing but Python to start.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, run

PYTHON = ">=3.10,<3.14"
# name in pyproject.toml: (versions, what it is for, whether nothing can be trained without it)
REQUIRED = {
    "torch": (">=2.6,<2.14", "everything", True),
    "numpy": ("", "reading data", True),
    "lightning": (">=2.4", "training on several devices", False),
    "deepspeed": (">=0.16", "--strategy deepspeed_*", False),
    "ninja": ("", "building the kernels", False),
    "tokenizers": ("", "vocabularies of a tokenizer.json", False),
    "pyrwkv-tokenizer": ("", "the World vocabulary", False),
    "jinja2": ("", "chat templates", True),
    "safetensors": (">=0.6", "reading .safetensors", False),
    "tqdm": ("", "progress bars", True),
}
OPTIONAL = {
    "pyarrow": "reading .parquet",
    "matplotlib": "pictures of runs",
    "math-verify": "grading answers of GSM8K and MATH",
    "bitsandbytes": "--quant nf4",
    "transformers": "models of Hugging Face",
    "gguf": "reading and writing .gguf",
    "huggingface_hub": "rwkv-bone download",
}
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` is what to do about it, unless all is well."""

    mark: str  # "ok"; "note": something is missing that not everybody needs; "FAIL": training cannot work
    text: str
    cure: str = ""


# ---------------------------------------------------------------- Python and packages


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def within(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=2.6,<2.14"."""
    for bound in filter(None, wanted.split(",")):
        at_least = bound.startswith(">=")
        if (numbers(version) >= numbers(bound.lstrip("<>="))) != at_least:
            return False
    return True


def python() -> Iterator[Finding]:
    version = platform.python_version()
    text = f"Python {version}, {platform.system()} {platform.machine()}, {sys.executable}"
    if within(version, PYTHON):
        yield Finding("ok", text)
    else:
        mark = "FAIL" if sys.version_info < (3, 10) else "note"
        yield Finding(mark, text, f"wanted {PYTHON}: make an environment with one of these, as: python3.12 -m venv .venv")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    for name, (wanted, use, needed) in REQUIRED.items():
        version, mark = installed(name), "FAIL" if needed else "note"
        if version is None:
            yield Finding(mark, f"{name} is missing, which is for {use}", f"pip install '{name}{wanted}'")
        elif not within(version, wanted):
            yield Finding("note", f"{name} {version}; tried are {wanted}", f"pip install '{name}{wanted}'")
        else:
            yield Finding("ok", f"{name} {version}")
    for name, use in OPTIONAL.items():
        version = installed(name)
        missing = Finding("note", f"{name} is missing, which is for {use}", f"pip install {name}")
        yield missing if version is None else Finding("ok", f"{name} {version}")


# ---------------------------------------------------------------- devices and compilers


def read_cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read_cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu() -> str:
    """What the CPU is called, how many cores this process may use, and the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"CPU: {cpu_name()}, {cores} cores"
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB of memory"
    return text


def devices() -> Iterator[Finding]:
    import torch

    from .ops.float32 import onednn_is_right

    bf16 = ", AVX512_BF16" if " avx512_bf16" in read_cpuinfo() else ""
    yield Finding("ok", cpu() + bf16 + (", float32 products by oneDNN" if onednn_is_right() else ""))
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = (
            f"GPU {i}: {properties.name}, {total / GIB:.1f} GiB of memory ({free / GIB:.1f} free), "
            f"compute capability {properties.major}.{properties.minor}"
        )
        old = torch.version.hip is None and (properties.major, properties.minor) < (8, 0)
        cure = "it has no arithmetic in bf16, which torch emulates, slowly, and runs the sequential kernels (from 7.5 on)"
        yield Finding("note", text, cure) if old else Finding("ok", text)
    if count:
        return
    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    if torch.version.cuda is None and driver:
        cure = "install a build of torch for CUDA (pytorch.org tells the command for your driver)"
        yield Finding("note", f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA", cure)
    elif torch.version.cuda is not None:
        reason = f" ({str(caught[0].message).splitlines()[0]})" if caught else ""
        cure = f"for a GPU, update its driver to one for CUDA {torch.version.cuda}; see nvidia-smi"
        yield Finding("note", f"torch is built for CUDA {torch.version.cuda}, but sees no GPU{reason}", cure)
    else:
        yield Finding("note", "no GPU", "small models train on the CPU; for others find a machine with one")


def first_line(*command: str) -> str:
    """The first line that a program prints of its version."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    lines = [line for line in output.splitlines() if "release" in line] or output.splitlines() or ["unknown version"]
    return lines[0].strip()


def compilers() -> Iterator[Finding]:
    import torch

    from .ops import build, cuda

    tools = [("C++ compiler", build.cxx_compiler), ("ninja", build.ninja_binary)]
    if torch.cuda.is_available() and torch.version.hip is None:
        tools.append(("nvcc", cuda.nvcc))
    for name, find in tools:
        try:
            path = find()
            yield Finding("ok", f"{name}: {path}, {first_line(path, '--version')}")
        except UserError as error:
            problem, _, cure = str(error).partition("; ")
            yield Finding("note", f"{name}: {problem}", cure)


# ---------------------------------------------------------------- kernels


def relative_errors(op: str, device: str, dtype, N: int = 64) -> dict[str, float]:
    """Relative L2 errors of WKV6's and WKV7's outputs, final states and gradients against the definitions in float64."""
    from .ops import selfcheck, wkv6, wkv7

    found: dict[str, float] = {}
    for name, module in (("wkv6", wkv6), ("wkv7", wkv7)):
        inputs, gy, gfinal = selfcheck.sample(name, 70, "random", dtype, N)

        def function(*tensors):
            return getattr(module, name)(**dict(zip(inputs, tensors)), op=op)  # noqa: B023

        run = selfcheck.by_autograd(function)
        of = selfcheck.errors(run, module.recurrence.reference, inputs, gy, gfinal, device)
        found |= {f"{name.upper()}'s {what}": error for what, error in of.items()}
    return found


def kernel_cases() -> list[tuple[str, str, str, float]]:
    """(op, device, dtype, largest relative error) of each kernel that this machine may run, but for those of GPUs."""
    import torch

    cases = [("torch", "cpu", "float32", 1e-4), ("cpu", "cpu", "float32", 1e-4), ("cpu", "cpu", "bfloat16", 2e-2)]
    return cases + [("torch", "cuda", "bfloat16", 2e-2)] * torch.cuda.is_available()


def gpu_kernels() -> Iterator[Finding]:
    """The verdicts on the kernels for GPUs: those that training would find, and keep."""
    import torch

    from .ops import selfcheck

    device, fp32, bf16 = torch.device("cuda", torch.cuda.current_device()), torch.float32, torch.bfloat16
    cases: list[tuple[str, str, str, torch.dtype, int]] = []
    if torch.version.hip is None:
        kinds = (("chunk", bf16), ("sequential", bf16), ("sequential", fp32))
        cases += [("--op cuda", name, kernel, dtype, 64) for name in ("wkv6", "wkv7") for kernel, dtype in kinds]
        cases.append(("--peft bone", "bone", "bone", bf16, 0))
    if importlib.util.find_spec("fla"):
        cases += [("--op fla", name, "fla", bf16, 64) for name in ("wkv6", "wkv7")]
    for flag, name, kernel, dtype, N in cases:
        title = f"{flag} on cuda, {name.upper()} {kernel}, {str(dtype)[6:]}"
        try:
            verdict = selfcheck.verdict(name, kernel, dtype, N, device)
        except UserError as error:
            yield Finding("note", f"{title}: {error}", "something slower runs in its place")
            continue
        cure = "it is not used; please report this line"
        yield Finding("ok", f"{title}: {verdict.text}") if verdict.ok else Finding("note", f"{title}: {verdict.text}", cure)


def kernels() -> Iterator[Finding]:
    import torch

    worked = False
    for op, device, dtype, tolerance in kernel_cases():
        name, began = f"--op {op} on {device}, {dtype}", time.monotonic()
        try:
            errors = relative_errors(op, device, getattr(torch, dtype))
        except UserError as error:
            problem, _, cure = str(error).partition("; ")
            yield Finding("note", f"{name}: {problem}", cure or "train with --op torch")
            continue
        except Exception as error:  # a report is of use only if it goes on, whatever a driver or a compiler did
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Finding("note", f"{name}: stopped with {reason}", "train with another --op")
            continue
        worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
        took = time.monotonic() - began
        if errors[worst] <= tolerance:
            worked = True
            yield Finding("ok", f"{name}: right to {errors[worst]:.0e}, built and tested in {took:.1f} s")
        else:
            cure = "do not use it; please report this line, and train with another --op"
            yield Finding("note", f"{name}: WRONG, {worst} is off by {errors[worst]:.0e} (allowed {tolerance:.0e})", cure)
    if torch.cuda.is_available():
        yield from gpu_kernels()
    if not worked:
        yield Finding("FAIL", "no kernel works here", "see above; at least --op torch should")


# ---------------------------------------------------------------- vocabulary and disk


def vocabulary() -> Iterator[Finding]:
    try:
        from .data.tokenizer import WorldTokenizer

        world = WorldTokenizer()
    except ImportError as error:
        yield Finding("note", f"the World vocabulary was not tried: {error.name} is missing", f"pip install {error.name}")
        return
    except UserError as error:
        problem, _, cure = str(error).partition(": ")
        yield Finding("note", f"{problem} (models of other vocabularies need none)", cure)
        return
    assert world.decode(world.encode("déjà vu")) == "déjà vu"
    yield Finding("ok", f"World vocabulary: {world.vocab_file}")


def disk() -> Iterator[Finding]:
    from .ops import build

    cache = build.cache_dir()
    held = sum(file.stat().st_size for file in cache.glob("*") if file.is_file())
    for what, folder, least in (
        (f"kernels are kept in {cache} ({held / (1 << 20):.1f} MiB)", cache, 0.5),
        (f"this folder, {Path.cwd()}", Path.cwd(), 5),
    ):
        free = shutil.disk_usage(folder).free / GIB
        text = f"{what}: {free:.1f} GiB free"
        small = Finding("note", text, f"make room: {least} GiB is little for what will be written there")
        yield small if free < least else Finding("ok", text)


# ---------------------------------------------------------------- the report

SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": python,
    "Packages": packages,
    "Devices": devices,
    "Compilers": compilers,
    "Kernels": kernels,
    "Vocabulary": vocabulary,
    "Disk": disk,
}
NEED_TORCH = ("Devices", "Compilers", "Kernels")


def broken_torch() -> Finding | None:
    """What is wrong with a torch that is installed, if it cannot be imported."""
    if not importlib.util.find_spec("torch"):
        return None  # told among the packages
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Finding("FAIL", f"torch cannot be imported: {str(error).splitlines()[0]}", "pip install --force-reinstall torch")
    return None


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if arguments:
        raise UserError(f"doctor takes no arguments, not {arguments[0]}")
    failures, fine = [], []
    torch_failure = broken_torch()
    usable = torch_failure is None and importlib.util.find_spec("torch") is not None
    for title, section in SECTIONS.items():
        if title in NEED_TORCH and not usable:
            continue
        print(title, flush=True)
        found = section()
        for finding in [*found, torch_failure] if title == "Packages" and torch_failure else found:
            print(f"  {finding.mark:4}  {finding.text}", flush=True)
            if finding.cure:
                print(f"        -> {finding.cure}", flush=True)
            failures += [finding.text] if finding.mark == "FAIL" else []
            fine += [finding.text] if finding.mark == "ok" else []
    if failures:
        print(f"\nTraining cannot work here yet: {'; '.join(failures)}.")
        return 1
    gpu = any(text.startswith("--op") and "on cuda" in text for text in fine)
    print(f"\nTraining can work here, on the {'GPU' if gpu else 'CPU'}.")
    return 0


if __name__ == "__main__":
    run(main)
