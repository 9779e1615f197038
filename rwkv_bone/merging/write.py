"""What a merge is written as: a model's file, or an adapter alone as a LoRA, a folder of peft or a file of initial states."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizer import open_tokenizer
from ..errors import UserError
from ..files.adapters import save_adapter
from ..files.atomic import atomic
from ..files.folder import write_folder
from ..files.models import about_record, identity, read_about
from ..files.pth import Layout, write_pth
from ..files.safetensors import write_safetensors
from ..interop import gguf, web_rwkv
from ..interop import hf_peft as hf
from ..models.base import WebNames
from ..terminal import Progress
from .as_lora import as_lora
from .merge import Merge, converted, ratio

FORMATS = ("pth", "safetensors", "gguf")
VOCABULARIES = (65536, 256, 257)  # World's and bytes: what GGUF's tokenizer for RWKV can express


def web_names(job: Merge) -> WebNames:
    if job.kind.web_names is None:
        raise UserError(f"--format safetensors is web-rwkv's, which has no {job.kind.title}; write a .pth")
    return job.kind.web_names


def about(job: Merge) -> dict[str, Any]:
    """What the written model says of its training: what the last adapter does, or else its base."""
    said = read_about(job.base_path)
    for adapter in job.adapters:
        said |= adapter.info
    return said


def gguf_plan(job: Merge, type: str) -> gguf.Plan:
    """The plan of a GGUF file; the job's layout becomes what it asks for."""
    gguf.package()
    if job.sizes.vocab_size not in VOCABULARIES:
        raise UserError(f"--format gguf: a vocabulary of {job.sizes.vocab_size} is neither World's (65536) nor bytes (256, 257)")
    vocabulary = open_tokenizer("auto", job.sizes.vocab_size).vocabulary()
    if job.initial_state:
        raise UserError("--format gguf: llama.cpp has no place for a trained initial state; write a .pth")
    plan = gguf.Plan(job.kind, job.sizes, type, vocabulary, str(job.base_path), about(job).get("template"))
    job.layout = {name: (plan.dtypes.get(job.parameter[name], dtype), shape) for name, (dtype, shape) in job.layout.items()}
    return plan


def write_tensors(job: Merge, path: Path, format: str, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Tensors under the names of a .pth, as one of `FORMATS`, with the tokenizer and the template of the training."""
    records = about_record(about(job))
    if format == "pth":
        write_pth(path, layout, tensors, records)
        return
    web = web_names(job)
    theirs = {web_rwkv.web_name(web, n): (dtype, web_rwkv.web_shape(web, n, shape)) for n, (dtype, shape) in layout.items()}
    with atomic(path) as file:
        renamed = ((web_rwkv.web_name(web, n), web_rwkv.web_tensor(web, n, t)) for n, t in tensors)
        write_safetensors(file, theirs, renamed, {name: text.decode() for name, text in records.items()})


def write_model(job: Merge, path: Path, format: str, plan: gguf.Plan | None = None) -> None:
    """format: one of `FORMATS`, or "folder" where the base is one; `plan`: of the format gguf."""

    def shown() -> Iterator[tuple[str, Tensor]]:
        done = 0
        with Progress(job.size, unit="B", label="merging", leave=False) as progress:
            for name, tensor in job.tensors():
                yield name, tensor
                done += tensor.nbytes
                progress.update(done)

    if plan is not None:
        names = [job.parameter[name] for name in job.layout]
        gguf.write_gguf(path, plan, names, ((job.parameter[n], t) for n, t in shown()))
    elif format == "folder":
        assert job.folder is not None
        write_folder(path, job.folder, job.layout, shown())
    else:
        write_tensors(job, path, format, job.layout, shown())


def write_lora(job: Merge, output: Path, rank: int) -> str:
    """Write the job's adapter as a LoRA; return what was lost."""
    adapter = job.adapters[0]
    tensors, rank, sizes = as_lora(adapter, job.base, rank, job.options.device)
    base = identity(job.base_path, job.model)
    info = {"method": "lora", "options": {"r": rank, "alpha": float(rank)}, "base": base, "made_from": adapter.path.name}
    info |= {key: adapter.info[key] for key in ("tokenizer", "template", "quant") if key in adapter.info}
    save_adapter(output, tensors, info)
    parts: dict[str, list[float]] = {}
    for name, (update, missing) in sizes.items():
        squares = parts.setdefault(job.model.part_of(f"{name}.weight"), [0.0, 0.0])
        squares[0] += update**2
        squares[1] += missing**2
    lines = [f"written    {output}: LoRA, r = alpha = {rank}, {len(sizes)} projections", f"           {'part':16} missing"]
    parts["all"] = [sum(column) for column in zip(*parts.values())]
    lines += [f"           {part:16} {ratio(missing, update):.3%}" for part, (update, missing) in parts.items()]
    return "\n".join([*lines, "           missing: size of what the LoRA lacks of the update, relative to the update's"])


def write_peft(job: Merge, output: Path) -> str:
    adapter = job.adapters[0]
    hf.write_folder(output, adapter.tensors, adapter.info)
    return f"written    {output}: {adapter.info['method']} as a folder of peft, {len(adapter.layers)} projections"


@torch.no_grad()
def write_state(job: Merge, output: Path, format: str) -> str:
    """Write the merged model's initial state alone: under its names in the model, for programs that keep states in files."""
    if not job.initial_state:
        source = job.adapters[0].path if job.adapters else job.base_path
        raise UserError(f"{source}: holds no trained initial state; --as state is for what --train_type state trained")
    tensors = {}
    for name, (_, shape) in job.layout.items():
        parameter = job.parameter[name]
        if job.kind.is_initial_state(parameter):
            tensor, source = job.start(parameter, shape), job.base_path
            for adapter in job.adapters:
                if adapter.changes(parameter):
                    tensor, source = adapter.merged(parameter, tensor), adapter.path
            tensors[name] = converted(tensor, job.options.dtype or tensor.dtype, name, source)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(job, output, format, layout, tensors.items())
    readers = "web-rwkv, Ai00, RWKV-Runner's WebGPU mode" if format == "safetensors" else "RWKV-Runner, chats on the rwkv package"
    return f"written    {output}: initial states of {len(tensors)} layers, for {readers}"


STATE_INSIDE = """\
note       the written model holds a trained initial state. This program and the rwkv package (RWKV-6) begin from it; web-rwkv,
           Ai00 and the rwkv package (RWKV-7) pass over it; rwkv.cpp cannot load the file. --as state writes the state alone,
           for programs that take it beside the base: --output state.pth (RWKV-Runner) or state.st (web-rwkv, Ai00)"""
