"""The Python API

Which functions does `import rwkv_bone as rb` give, what do they take, and what do they return? These ten:

    import rwkv_bone as rb

    model = rb.load_model("base.pth")
    tokenizer = rb.tokenizer(model)
    rb.inject(model, "bone", r=64)
    rb.train(model, [{"question": "...", "answer": "..."}, ...], tokenizer, lr_init=1e-4)
    rb.merge(model)
    rb.save(model, "tuned.pth")

Wrong input raises `UserError`, a ValueError whose message is one line: what was wanted, what came, what to do.

This page is made from the functions' own documentation (`help(rb.train)`): `python -m rwkv_bone.api > docs/api.md`.
"""

import contextlib
import inspect
import io
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import peft
from .config import TrainConfig
from .data.documents import Documents
from .data.encode import RowEncoder, parse_fields
from .data.files import BEGINNING, Batch
from .data.templates import Template
from .data.tokenizer import Tokenizer, open_tokenizer, recorded
from .errors import UserError
from .evaluate.loss import document_losses
from .files import adapters as files
from .files import models
from .files.folder import write_folder
from .files.pth import layout_of, write_pth
from .generate.chat import as_asked
from .generate.sampling import Sampling
from .generate.sampling import generate as sample
from .models import LanguageModel
from .peft import METHODS

Row = dict[str, Any] | str

__all__ = [
    "generate",
    "inject",
    "load_adapter",
    "load_model",
    "loss",
    "merge",
    "methods",
    "save",
    "tokenizer",
    "train",
]


def load_model(
    path: str | Path, *, adapter: str | Path = "", dtype: torch.dtype | None = None, device: str = "auto"
) -> LanguageModel:
    """A base model from its file, with an adapter on it if one is named.

    - `path`: a `.pth` of RWKV-6 or RWKV-7, whose sizes are read from the file; or a folder of Hugging Face transformers (LLaMA,
      Qwen, ...), with the extra `hf` installed
    - `adapter`: an adapter that was trained on this base, as `load_adapter` takes it
    - `dtype`: of the weights; default: bfloat16 on a GPU, float32 on the CPU
    - `device`: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU if there is one

    Returns a `torch.nn.Module`: `model(idx)` takes tokens (B, T) int64 and gives logits (B, T, vocabulary) and the state after
    them; `model(idx, state)` goes on from there. Raises UserError for a file that is damaged, incomplete or no such model.

    >>> import torch
    >>> model = rb.load_model("base.pth")
    >>> logits, state = model(torch.tensor([[72, 101, 108]]))
    >>> logits.shape
    torch.Size([1, 3, 257])
    """
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    model = models.load_model(path, dtype or usual, device)
    if adapter:
        load_adapter(model, adapter)
    return model.eval()


def tokenizer(model: LanguageModel, spec: str | Path = "auto", *, encoding: str = "") -> Tokenizer:
    """The tokenizer of a model.

    - `spec`: "world", "byte" or the path of a tokenizer.json; "auto" is the model's own if its folder has one or its file says
      which it was trained with, else it goes by the vocabulary: 65536 is World, 256 and 257 are bytes
    - `encoding`: of bytes, "utf-8" (the default) or "utf-16-le"

    Returns an object with `encode(text) -> list[int]`, `decode(ids) -> str` and `end`, the tokens that end a document. Raises
    UserError where no tokenizer is known for the vocabulary, or its ids go beyond it.

    >>> model = rb.load_model("base.pth")
    >>> tokenizer = rb.tokenizer(model)
    >>> tokenizer.encode("Hi!")
    [73, 106, 34]
    >>> tokenizer.decode([73, 106, 34])
    'Hi!'
    """
    known = models.read_about(model.file).get("tokenizer") if model.file else None
    if spec == "auto" and not encoding and not model.text and (found := recorded(known, [model.file])):
        return open_tokenizer(vocab_size=model.sizes.vocab_size, **found)
    return open_tokenizer(str(spec), model.sizes.vocab_size, encoding=encoding or "utf-8", own=model.text)


def methods() -> dict[str, str]:
    """The PEFT methods: name -> what the method computes, and its options with their defaults.

    >>> ", ".join(rb.methods())
    'bone, bone_col, miss, lora, rslora, lora_plus, pissa, olora, lora_ga, dora'
    >>> print(rb.methods()["lora"])
    W' = W + alpha/r B A; r=32, alpha=32.0, lora_dropout=0.0
    """
    return {name: f"{layer.formula}; {options_text(layer.Config())}" for name, layer in METHODS.items()}


def options_text(config: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(config).items())


def inject(
    model: nn.Module,
    method: str = "bone",
    *,
    parts: Iterable[str] | None = None,
    train_parts: Iterable[str] = (),
    **options: Any,
) -> list[str]:
    """Freeze a model and put an adapter on its linear layers. Nothing that it computes changes until the adapter is trained.

    - `model`: any torch module; its `nn.Linear` layers are replaced in place, and keep their weights' names
    - `method`: one of `methods()`
    - `parts`: which layers, by components of their names ("att", "ffn.key", "q_proj"); default: those that a model of this
      package names, and all of another module
    - `train_parts`: parts of an RWKV model to train in full beside the adapter: "emb", "head", "ln", "time"
    - `options`: those of the method: `r=64`, `alpha=32`, ...

    Returns the names of the layers that have an adapter. The adapter's tensors are float32; they and `train_parts` alone require
    a gradient, so an optimiser takes `[p for p in model.parameters() if p.requires_grad]`. Raises UserError for an unknown
    method, option or part, and for an `r` that does not divide a layer's size where the method needs that.

    >>> from torch import nn
    >>> module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> rb.inject(module, "lora", r=2, alpha=4)
    ['0', '2']
    >>> [name for name, p in module.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    layer = METHODS[method]
    if layer.starts_from_gradient:
        raise UserError(f"{method} starts from gradients of the data: use train.py --peft {method}, or another method here")
    if peft.adapters(model):
        raise UserError("the model has an adapter already; merge(model) first, or load the model again")
    names = peft.inject(model, layer, layer.config_from(options, method), parts)
    if train_parts:
        model_of_ours(model, "train_parts").train_parts(train_parts)
    return names


def load_adapter(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Put a saved adapter on the base model that it was trained on, in place. It can be trained further, merged or used as it is.

    - `model`: a model of `load_model`, or any torch module whose adapter `save` wrote
    - `path`: an adapter of this package; for RWKV models also RWKV-PEFT's files and folders of Hugging Face peft

    Returns what the file says of itself: "method", "options", "base", ... Raises UserError for an adapter of another base, and
    for tensors that the model has no place for.

    >>> model = rb.load_model("base.pth")
    >>> rb.load_adapter(model, "adapter.pth")["options"]
    {'r': 8}
    """
    if peft.adapters(model):
        raise UserError("the model has an adapter already; merge(model) first, or load the model again")
    if isinstance(model, LanguageModel):
        return files.load_adapter(model, path)
    tensors, info = files.read_adapter(path)
    if (other := info["base"].get("version")) != (here := type(model).__name__):
        raise UserError(f"{path}: is an adapter for a {other} model, and this one is a {here}")
    method, config = files.method_of(info, path)
    assert method and config, "save writes no other for such a module"
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if odd := [name for name in names if name not in linears]:
        raise UserError(f"{path}: holds an adapter for {odd[0]}, which is no linear layer of this model")
    for name in names:
        expected = method.on(linears[name].weight.to("meta"), config).state_dict()
        for key in expected.keys() - {"weight"}:
            came = tensors.get(f"{name}.{key}")
            if came is None or came.shape != expected[key].shape:
                shape = "missing" if came is None else tuple(came.shape)
                raise UserError(f"{path}: {name}.{key} is {shape}; for this model it must be {tuple(expected[key].shape)}")
    for name, layer in zip(names, peft.attach(model, method, config, names)):
        layer.load_state_dict({key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}, False)
    return info


def train(
    model: LanguageModel,
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    proj_dir: str | Path = "out",
    held_out: Iterable[Row] | None = None,
    verbose: bool = True,
    **flags: Any,
) -> list[float]:
    """Train a model in place: its adapter, or the whole model if it has none. The same run as train.py's, with rows from memory.

    - `rows`: any iterable of rows as in a jsonl, read once: `{"question": ..., "answer": ...}`, `{"messages": [...]}`,
      `{"text": ...}`, ...; a str is a text
    - `tokenizer`: of `tokenizer(model)`
    - `proj_dir`: folder for the adapter after each epoch (rwkv-0.pth, ...), checkpoints, logs and loss.png
    - `held_out`: rows whose loss is measured after each epoch; the best adapter is kept as rwkv-best.pth
    - `verbose`: print what train.py prints
    - `flags`: those of train.py by name: `lr_init=1e-4, epoch_count=3, micro_bsz=8, ctx_len=1024, resume="auto", ...`

    Returns the loss of each optimiser step: mean cross entropy over the trained tokens, in nats. Raises UserError for rows that
    cannot be read and flags that do not exist, and where `proj_dir` holds a run already (`overwrite=True`, or `resume="auto"`);
    KeyboardInterrupt after Ctrl-C, when all is saved.

    >>> model = rb.load_model("base.pth")
    >>> tokenizer = rb.tokenizer(model)
    >>> names = rb.inject(model, "bone", r=8)
    >>> rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(32)]
    >>> losses = rb.train(model, rows, tokenizer, proj_dir="out/sums", lr_init=1e-2, epoch_count=2, verbose=False)
    >>> len(losses), losses[-1] < losses[0]
    (8, True)
    """
    from .training.loader import TrainingData
    from .training.loop import fit
    from .training.objectives import OBJECTIVES
    from .training.strategies import make_engine

    layers = list(peft.adapters(model).values())
    own = {
        "proj_dir": proj_dir,
        "data_file": "rows",
        "load_model": model.file,
        "peft": method_name(layers[0]) if layers else "none",
        "precision": "bf16" if model.dtype == torch.bfloat16 else "fp32",
        "accelerator": "cpu" if model.device.type == "cpu" else "gpu",
        "tokenizer": getattr(tokenizer, "path", "auto"),
        "encoding": tokenizer.encoding,
        **(vars(layers[0].config) if layers else {}),
    }
    if mine := sorted(own.keys() & flags.keys()):
        raise UserError(f"train: {mine[0]} is the model's, or said by another argument; leave it out")
    config = TrainConfig.from_argv([word for name, value in {**own, **flags}.items() for word in as_words(name, value)])
    trained_whole = [part for part in model.full_parts if any(
        p.requires_grad and model.in_part(name, part) for name, p in model.named_parameters())]  # fmt: skip
    if layers:
        parts = tuple(sorted({model.part_of(f"{name}.weight") for name in peft.adapters(model)}))
        config = replace(config, parts=parts, train_parts=tuple(trained_whole))
    else:
        model.requires_grad_(True)
    template = Template.open(config.template) if config.template else template_of(model)
    encoder = RowEncoder(tokenizer, template, parse_fields(config.fields), config.format,
                         config.loss_mask)  # fmt: skip
    documents = documents_of(rows, encoder, "rows")
    validation = None if held_out is None else documents_of(held_out, encoder, "held_out")
    data = TrainingData.of_documents(documents, config, validation)
    data.tokenizer, data.read_text, data.template = tokenizer, True, encoder.template
    try:
        with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
            if fit(model, data, OBJECTIVES[config.objective](config), config, make_engine(config)):
                raise KeyboardInterrupt
    finally:
        model.eval()
    return [line["loss"] for line in map(json.loads, open(Path(proj_dir) / "loss_data.jsonl")) if line["loss"] is not None]


def as_words(name: str, value: Any) -> list[str]:
    """A keyword argument as words of a command line."""
    if value in ("", None):
        return []
    values = value if isinstance(value, list | tuple) else [int(value)] if isinstance(value, bool) else [value]
    return [f"--{name}", *map(str, values)]


def documents_of(rows: Iterable[Row], encoder: RowEncoder, name: str) -> Documents:
    content = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict | str):
            raise UserError(f"{name}, row {number}: wanted a dict or a str, not {type(row).__name__}")
        content.append({"text": row} if isinstance(row, str) else row)
    return Documents.from_encoded([encoder.encode(Batch(name, "row", 1, content, 0, BEGINNING))], name)


def loss(model: LanguageModel, rows: Iterable[Row], tokenizer: Tokenizer, *, ctx_len: int = 1024, batch_size: int = 8) -> float:
    """The mean loss of rows: cross entropy per trained token (answers of pairs and chats, all of a text), in nats.

    - `rows`: as `train` takes them
    - `ctx_len`: tokens that are read at once; the state is carried, so nothing is cut and the result does not depend on it
    - `batch_size`: rows at once

    exp(loss) is the perplexity. Raises UserError for rows that cannot be read.

    >>> model = rb.load_model("base.pth")
    >>> rb.loss(model, ["A text.", "Another one."], rb.tokenizer(model)) > 0
    True
    """
    documents = documents_of(rows, RowEncoder(tokenizer, template_of(model)), "rows")
    with evaluating(model):
        found = [
            pair for at in range(0, len(documents), batch_size)
            for pair in document_losses(model, [documents[i] for i in range(len(documents))[at : at + batch_size]], ctx_len)
        ]  # fmt: skip
    return sum(nats for nats, _ in found) / max(1, sum(count for _, count in found))


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Without dropout and gradients, and afterwards in the mode that it was in."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    instruct: bool = False,
    system: str = "",
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.85,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """Continue prompts; with `instruct`, answer them as the questions of pairs that the model was trained on.

    - `prompts`: one text or several, of any lengths, which are read side by side
    - `instruct`: put each prompt into the model's chat template; `system`: a system message for it
    - `max_tokens`: longest continuation
    - `temperature`: 0 takes the likeliest token each time; `top_p`, `top_k` as usual
    - `stop`: texts that end a continuation, beside the tokenizer's end of document (and the template's own)
    - `seed`: the same seed gives the same texts, whatever else is in the batch

    Returns the continuations without the prompts, in their order. Raises UserError for values out of range, and where the model's
    output is not a number. An adapter need not be merged for it.

    >>> model = rb.load_model("base.pth")
    >>> texts = rb.generate(model, rb.tokenizer(model), ["Once", "In the beginning"], max_tokens=5, temperature=0)
    >>> len(texts)
    2
    """
    asked: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    stops = tuple(stop)
    if instruct:
        template = template_of(model)
        asked, stops = as_asked(template, tokenizer, asked, system), stops + template.stops
    sampling = Sampling(temperature, top_p, top_k, 0.0, 0.0)
    with evaluating(model):
        texts = [c.text for c in sample(model, tokenizer, asked, sampling, max_tokens, stops, seed, batch_size)]
    return [text.lstrip() for text in texts] if instruct else texts  # the space after "Assistant:" is the template's


def merge(model: nn.Module) -> None:
    """Replace each layer that has an adapter by a plain `nn.Linear` of the merged weight, rounded once to the base's dtype.

    - `model`: any module that `inject` or `load_adapter` put an adapter on; changed in place

    Raises UserError if there is no adapter on it.

    >>> from torch import nn
    >>> module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> names = rb.inject(module, "bone", r=4)
    >>> rb.merge(module)
    >>> type(module[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    if not peft.adapters(model):
        raise UserError("no adapter is on this model: nothing to merge")
    peft.merge(model)


def save(model: nn.Module, path: str | Path, *, tokenizer: Tokenizer | None = None, overwrite: bool = False) -> None:
    """Write the adapter that is on a model; or, where there is none, the whole model as a `.pth` or a folder, as it was read.

    - `model`: any module with an adapter, or a model of `load_model`, which is written with the dtype and names of its file
    - `path`: what to write; it appears when it is whole, an adapter with a `.json` beside it that says what it is
    - `tokenizer`: noted in the file, with the template, for `generate` and the other commands
    - `overwrite`: replace a file that is there

    Raises UserError if the file exists or cannot be written, and for another module without an adapter.

    >>> model = rb.load_model("base.pth", adapter="adapter.pth")
    >>> rb.merge(model)
    >>> rb.save(model, "tuned.pth")
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another name, or overwrite=True")
    layers = peft.adapters(model)
    if not layers:
        save_whole(model_of_ours(model, "save without an adapter"), path, tokenizer)
        return
    layer = next(iter(layers.values()))
    base = {"version": type(model).__name__}
    if isinstance(model, LanguageModel):
        base = models.identity(model.file, model)
    info = {"method": method_name(layer), "options": vars(layer.config), "base": base}
    if isinstance(model, LanguageModel):
        info |= text_of(model, tokenizer)
    files.save_adapter(path, peft.adapter_tensors(model), info)


def save_whole(model: LanguageModel, path: Path, tokenizer: Tokenizer | None) -> None:
    state = model.state_dict()
    folder = models.folder_of(model.file) if model.file else None
    if folder is None:
        tensors = {name: tensor.to(model.file_dtype) for name, tensor in state.items()}
        write_pth(path, layout_of(tensors), tensors.items(), models.about_record(text_of(model, tokenizer)))
        return
    names = [name for shard in folder.shards.values() for name in shard]
    tensors = {name: state[model.parameter_name(name)].to(folder.tensors[name].dtype).contiguous().cpu() for name in names}
    write_folder(path, folder, layout_of(tensors), tensors.items())


def text_of(model: LanguageModel, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a record says of the text that a model was trained on."""
    return {"tokenizer": tokenizer.identity(), "template": template_of(model).identity()} if tokenizer else {}


def template_of(model: LanguageModel) -> Template:
    """The one that the model's file says it was trained with, else its own, else its version's."""
    if model.file and (known := models.read_about(model.file).get("template")):
        return Template.of(known)
    return Template.of_model(model.text, model.template)


def method_name(layer: peft.AdapterLinear) -> str:
    return next(name for name, kind in METHODS.items() if kind is type(layer))


def model_of_ours(model: nn.Module, what: str) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        raise UserError(f"{what}: wanted a model of load_model, not a {type(model).__name__}")
    return model


def page() -> str:
    """docs/api.md."""
    text = (__doc__ or "").strip()
    code = text[text.index("    import") : text.index("Wrong input")]
    sections = [f"# {text}".replace(code, f"```python\n{textwrap.dedent(code).strip()}\n```\n\n")]
    functions = sorted((globals()[name] for name in __all__), key=lambda function: function.__code__.co_firstlineno)
    for function in functions:
        text, example, doctest = (inspect.getdoc(function) or "").partition(">>> ")
        signature = re.sub(r"(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", f"{function.__name__}{inspect.signature(function)}")
        if len(signature) > 100:
            signature = re.sub(r", (?=\w+:|\*)|(?<=\w\()(?=\w+:)", lambda comma: comma[0].strip() + "\n    ", signature)
            signature = signature.replace(") ->", ",\n) ->")
        sections.append(f"## {function.__name__}\n\n```python\n{signature}\n```\n\n{text.strip()}")
        sections.append(f"```python\n{example}{doctest}\n```")
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    print(page(), end="")
