"""Adapters that RWKV-PEFT wrote: a flat `.pth` that says nothing of itself but the names and shapes of its tensors.

    blocks.N.att.key.bone (in/r, r, r)                   the weight guide, `bone` here; also under the name .disha
    blocks.N.att.key.bone (r, out)                       MiSS, `miss` here; also under the name .disha
    blocks.N.att.key.lora_A (r, in), .lora_B (out, r)    LoRA, scaled by alpha / r, and alpha is in no file; or PiSSA, not scaled,
                                                         if its file of init_lora_A, init_lora_B is given: W - B0 A0 + B A
    blocks.N.att.key.lora_M (out,) or (out, 1)           DoRA, beside lora_A and lora_B; (1, in), by columns, is RWKV-LM-RLHF's
    blocks.N.att.time_decay, ...                         parts of the base that were trained in full

Names may begin with `model.`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UserError

# (last component of a name, dimensions) -> method, this program's name of the tensor, the dimension that is r
KINDS = {
    ("bone", 3): ("bone", "bone", 1),
    ("disha", 3): ("bone", "bone", 1),
    ("bone", 2): ("miss", "bone", 0),
    ("disha", 2): ("miss", "bone", 0),
    ("lora_A", 2): ("lora", "lora_A", 0),
    ("lora_B", 2): ("lora", "lora_B", 1),
}
INIT = "init_pissa.pth"  # RWKV-PEFT's name of that file, in the run's folder


class Foreign(NamedTuple):
    """What a person must add to such a file, where its method needs it."""

    lora_alpha: float | None = None
    init: str | Path = ""  # PiSSA: the file of A and B as they started
    method: str = ""  # what the person says that it is, lora or pissa; "" if nothing
    lora_dropout: float = 0.0  # of the training that goes on with it


UNAIDED = Foreign()


def translate(
    path: str | Path, tensors: Mapping[str, Tensor], told: Foreign = UNAIDED, init: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under this program's names, and what an adapter of this program would say about itself.

    init: the tensors of `told.init`, where that is given.
    """
    ours: dict[str, Tensor] = {}
    found: dict[str, int] = {}
    for name, tensor in without_prefix(tensors).items():
        layer, _, last = name.rpartition(".")
        if last == "lora_M":
            found.setdefault("dora", 0)
            ours[f"{layer}.lora_magnitude_vector"] = magnitudes(path, name, tensor)
            continue
        method, key, r_dim = KINDS.get((last, tensor.dim()), ("none", last, 0))
        ours[f"{layer}.{key}"] = tensor
        if method != "none":
            found.setdefault(method, tensor.shape[r_dim])
    if "dora" in found:
        found["dora"] = found.pop("lora", 0)
    if len(found) > 1:
        raise UserError(f"{path}: holds tensors of {' and '.join(sorted(found))}; an adapter has one method")
    method, r = found.popitem() if found else ("none", 0)
    options: dict[str, Any] = {"r": r} if r else {}
    if init is not None:
        if method != "lora":
            raise UserError(f"{path}: is no PiSSA, which --lora_init is for: it holds no lora_A and lora_B")
        method = "pissa"
        options["alpha"] = float(r)  # a scale of 1
        ours |= starts(path, ours, without_prefix(init))
    elif method in ("lora", "dora"):
        options["alpha"] = alpha_of(path, method, told)
        if told.lora_dropout:
            options["lora_dropout"] = told.lora_dropout
    elif method == "none" and (what := no_adapter(ours)):
        raise UserError(f"{path}: is {what}")
    return ours, {"method": method, "options": options, "base": {}, "foreign": "RWKV-PEFT"}


def alpha_of(path: str | Path, method: str, told: Foreign) -> float:
    """The alpha of a LoRA, which the person tells. A PiSSA without its file of initial values is none: no alpha makes it one."""
    beside = Path(path).parent / INIT
    if method == "lora" and (told.method == "pissa" or (told.lora_alpha is None and beside.is_file())):
        where = f"it lies beside it, {beside}" if beside.is_file() else f"RWKV-PEFT writes it as {INIT} into the run's folder"
        raise UserError(f"{path}: a PiSSA of RWKV-PEFT needs its A and B as they started: give --pissa_init ({where})")
    if told.lora_alpha is None:
        cure = "give --lora_alpha as it was trained with" + (
            f"; for a PiSSA give --pissa_init {INIT}" if method == "lora" else ""
        )
        raise UserError(f"{path}: a {'LoRA' if method == 'lora' else 'DoRA'} of RWKV-PEFT does not say its alpha; {cure}")
    if not told.lora_alpha > 0:
        raise UserError(f"--lora_alpha must be above 0, not {told.lora_alpha}")
    return float(told.lora_alpha)


def magnitudes(path: str | Path, name: str, tensor: Tensor) -> Tensor:
    """DoRA's magnitude of each row of W', (out,)."""
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        raise UserError(
            f"{path}: {name} {tuple(tensor.shape)} is of a DoRA that scales the columns of W (RWKV-LM-RLHF's); here and in "
            "peft DoRA scales the rows; merge it with the program that made it"
        )
    return tensor.reshape(-1)


def no_adapter(names: Iterable[str]) -> str:
    """What a file that holds no method's tensors is, if it is no adapter; "" for parts of a model that were trained in full."""
    names = list(names)
    if "emb.weight" in names and any(name.startswith("blocks.0.") and name.endswith(".weight") for name in names):
        return "a whole model, not an adapter: use it as it is, or as the base"
    if any(name.rpartition(".")[2].startswith("init_lora_") for name in names):
        return "a PiSSA's file of initial values, not the adapter: give it as --pissa_init beside that"
    if any(name.rpartition(".")[2] in ("exp_avg", "exp_avg_sq", "momentum_buffer") for name in names):
        return "an optimiser's checkpoint, not an adapter"
    if names and not any(name.startswith(("blocks.", "emb.", "head.", "ln_out.")) for name in names):
        return f"no adapter of an RWKV model: it holds {', '.join(names[:3])}"
    return ""


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def starts(path: str | Path, tensors: Mapping[str, Tensor], init: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's A and B as they started, for each pair that was trained."""
    pairs = {name: name.replace(".lora_", ".init_lora_") for name in tensors if name.endswith((".lora_A", ".lora_B"))}
    if odd := sorted({*pairs.values()} ^ {*init}):
        raise UserError(f"{path}: --lora_init is another run's: {len(odd)} names differ ({', '.join(odd[:3])})")
    return {start: init[start] for start in pairs.values()}
