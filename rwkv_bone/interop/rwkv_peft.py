"""Adapters that RWKV-PEFT wrote: a flat `.pth` that says nothing of itself but the names and shapes of its tensors.

    blocks.N.att.key.bone (in/r, r, r)                   the weight guide, `bone` here; also under the name .disha
    blocks.N.att.key.bone (r, out)                       MiSS, `miss` here; also under the name .disha
    blocks.N.att.key.lora_A (r, in), .lora_B (out, r)    LoRA, scaled by alpha / r, and alpha is in no file; or PiSSA, not scaled,
                                                         if its file of init_lora_A, init_lora_B is given: W - B0 A0 + B A
    blocks.N.att.time_decay, ...                         parts of the base that were trained in full

Names may begin with `model.`.
"""

from collections.abc import Mapping
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


class Foreign(NamedTuple):
    """What a person must add to such a file, where its method needs it."""

    lora_alpha: float | None = None
    init: str | Path = ""  # PiSSA: the file of A and B as they started


UNAIDED = Foreign()


def translate(
    path: str | Path, tensors: Mapping[str, Tensor], lora_alpha: float | None = None, init: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under this program's names, and what an adapter of this program would say about itself."""
    ours: dict[str, Tensor] = {}
    found: dict[str, int] = {}
    for name, tensor in without_prefix(tensors).items():
        layer, _, last = name.rpartition(".")
        method, key, r_dim = KINDS.get((last, tensor.dim()), ("none", last, 0))
        ours[f"{layer}.{key}"] = tensor
        if method != "none":
            found.setdefault(method, tensor.shape[r_dim])
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
    elif method == "lora":
        if lora_alpha is None:
            raise UserError(f"{path}: a LoRA of RWKV-PEFT does not say its alpha; give --lora_alpha as it was trained with")
        if not lora_alpha > 0:
            raise UserError(f"--lora_alpha must be above 0, not {lora_alpha}")
        options["alpha"] = float(lora_alpha)
    return ours, {"method": method, "options": options, "base": {}, "foreign": "RWKV-PEFT"}


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def starts(path: str | Path, tensors: Mapping[str, Tensor], init: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's A and B as they started, for each pair that was trained."""
    pairs = {name: name.replace(".lora_", ".init_lora_") for name in tensors if name.endswith((".lora_A", ".lora_B"))}
    if odd := sorted({*pairs.values()} ^ {*init}):
        raise UserError(f"{path}: --lora_init is another run's: {len(odd)} names differ ({', '.join(odd[:3])})")
    return {start: init[start] for start in pairs.values()}
