"""Adapter files: a flat `.pth` with the community's names, and one record more in its archive.

The record `rwkv_bone.json` holds method, options, step, fingerprint of the base: all that the tensors do not say. So base file +
adapter file = model. The sidecar `.json` of the same name is the record's copy, for people and scripts to read.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import UserError
from ..interop import hf_peft as hf
from ..interop.rwkv_peft import UNAIDED, Foreign, translate
from ..interop.web_rwkv import web_tensor
from ..models import LanguageModel
from ..models.base import WebNames
from ..peft import METHODS, AdapterLinear
from ..peft.adapter import Weight, weight_and_bias
from .atomic import atomic
from .pth import FLOATS, Streamed, check_file, check_sums, layout_of, open_tensors, write_pth
from .safetensors import is_safetensors

RECORD = "rwkv_bone.json"


def sidecar(path: str | Path) -> Path:
    return Path(path).with_suffix(".json")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write an adapter's `.pth` with what it says about itself, and the sidecar.

    info: method, options, base (file, fingerprint, sizes), step, ... The options are completed with the method's defaults.
    """
    info = dict(info)
    if info["method"] in METHODS:
        info["options"] = vars(method_of(info, path)[1])
    text = json.dumps({"rwkv_bone": __version__, **info}, indent=1).encode()
    # The .pth alone decides: it is one file, written at once, and a sidecar that is older or missing changes nothing.
    write_pth(path, layout_of(tensors), tensors.items(), {RECORD: text})
    with atomic(sidecar(path)) as file:
        file.write(text)


def read_info(path: str | Path) -> dict[str, Any] | None:
    """What an adapter says about itself, checked for its types; None if the file is another program's."""
    check_sums(path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == RECORD]
        text = archive.read(names[0]) if names else None
    if text is None:
        return None
    try:
        info = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its record {RECORD} is not JSON") from None
    wanted = {"method": str, "options": dict, "base": dict}
    if not isinstance(info, dict) or not all(isinstance(info.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{path}: its record {RECORD} lacks method, options or base, or they are of another type")
    return info


class Adapter:
    """An adapter's file, opened and checked against the model that it is for. Its tensors are read as they are used.

    `layers`: projection -> keys of its adapter's tensors. `parts`: tensors of the base that were trained in full beside it.
    """

    def __init__(self, path: str | Path, kind: type[LanguageModel], sizes: Any, foreign: Foreign = UNAIDED):
        self.path, self.kind, self.sizes = Path(path), kind, sizes
        tensors, self.info = read_adapter(path, foreign, kind.web_names)
        self.method, self.config = method_of(self.info, path)
        shapes = kind.shapes(sizes, initial_state="state" in kind.capabilities)
        self.parts = [name for name in tensors if name in shapes]
        self.initial_state = any(map(kind.is_initial_state, self.parts))
        whole = sum(not kind.is_initial_state(name) for name in shapes) == len(self.parts)
        if self.method is None and whole and kind.recognises(tensors):
            raise UserError(f"{path}: is a whole model, not an adapter: use it as it is, or as the base")
        self.check_model(kind, sizes)
        self.layers: dict[str, list[str]] = {}
        for name in tensors:
            if name not in shapes:
                layer, _, key = name.rpartition(".")
                self.layers.setdefault(layer, []).append(key)
        self.check(tensors, shapes)
        own = "foreign" not in self.info
        self.tensors = Streamed(lambda: open_tensors(path) if own else open_foreign(path, foreign, kind.web_names)[0])

    def check_model(self, kind: type[LanguageModel], sizes: Any) -> None:
        """The version and the sizes of the base that the adapter names must be these; by --force neither."""
        base = self.info["base"]
        if base.get("version", kind.version) != kind.version:
            raise UserError(f"{self.path}: is an adapter for a {base['version']} model, and the base is {kind.title}")
        named, here = base.get("sizes"), asdict(sizes)
        if isinstance(named, dict) and any(named[name] != here[name] for name in named if type(here.get(name)) is int):
            raise self.of_another_base("give that one")

    def check(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor must find its place in the model, and have the shape that is wanted there."""
        with torch.device("meta"):
            linears = {name for name, module in self.kind(self.sizes).named_modules() if isinstance(module, nn.Linear)}
        odd = [layer for layer in self.layers if self.method is None or layer not in linears]
        if odd:
            names = [name for name in tensors if name.rpartition(".")[0] in odd]
            raise UserError(f"{self.path}: {len(names)} tensors that this model has no place for ({', '.join(names[:3])})")
        wanted = {name: shapes[name] for name in self.parts}
        for layer in self.layers:
            wanted |= {f"{layer}.{key}": shape for key, shape in self.shapes_at(shapes[f"{layer}.weight"]).items()}
        if self.initial_state:
            wanted |= {name: shape for name, shape in shapes.items() if self.kind.is_initial_state(name)}  # all layers' or none
        if missing := [name for name in wanted if name not in tensors]:
            raise UserError(f"{self.path}: lacks {len(missing)} of its tensors ({', '.join(missing[:3])})")
        for name, tensor in tensors.items():
            if name not in wanted:
                raise UserError(f"{self.path}: {name} is no tensor of the method {self.info['method']}")
            if tuple(tensor.shape) != wanted[name] or tensor.dtype not in FLOATS or tensor.is_meta:
                came, options = f"{tensor.dtype} {tuple(tensor.shape)}", f" and {self.config}" if self.config else ""
                raise UserError(f"{self.path}: {name} is {came}; for this model{options} it must be {wanted[name]}")

    def shapes_at(self, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors on a projection of that shape."""
        assert self.method and self.config
        try:
            with torch.device("meta"):
                layer = self.method(torch.empty(weight), self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (RuntimeError, TypeError, OverflowError):  # a size beyond all measure
            raise UserError(f"{self.path}: {self.config} cannot be put on a projection of {weight}") from None
        return {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items() if key != "weight"}

    def check_base(self, fingerprint: str, force: bool = False) -> None:
        """The base must be the one that was trained on. Other programs' files do not say which that was."""
        if "foreign" not in self.info and self.info["base"].get("fingerprint") != fingerprint and not force:
            raise self.of_another_base("give that one (or merge.py --force)")

    def of_another_base(self, cure: str) -> UserError:
        known = self.info["base"].get("file") or "one without a name"
        return UserError(f"{self.path}: was trained on another base ({known}); {cure}")

    def changes(self, name: str) -> bool:
        """Whether the base's tensor of that name is another after merging."""
        return name in self.parts or name.removesuffix(".weight") in self.layers

    def layer(self, name: str, weight: Weight, bias: Tensor | None = None) -> AdapterLinear:
        """The adapter on one projection, whose base weight and bias are given."""
        assert self.method and self.config
        if f"{name}.weight" in self.parts:
            weight = self.tensors[f"{name}.weight"].to(weight.device)
        layer = self.method.on(weight, self.config, bias)
        layer.load_state_dict({key: self.tensors[f"{name}.{key}"] for key in self.layers[name]}, strict=False)
        return layer

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What becomes of the base's tensor, in float32 or more where an adapter is on it: not rounded yet."""
        if name.removesuffix(".weight") in self.layers:
            return self.layer(name.removesuffix(".weight"), weight).merged_weight()
        return self.tensors[name].to(weight.device) if name in self.parts else weight

    def merged_panels(self, name: str, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`merged` as panels (rows, their values); a panel is valid until the next one is drawn."""
        if name.removesuffix(".weight") in self.layers:
            return self.layer(name.removesuffix(".weight"), weight).merged_panels()
        return iter([(slice(None), self.merged(name, weight))])


def read_adapter(
    path: str | Path, foreign: Foreign = UNAIDED, web: WebNames | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and what it says about itself.

    Other programs' are translated: folders of peft, RWKV-PEFT's files, as far as `foreign` tells enough of them, and initial
    states of web-rwkv, by the names `web` of the model.
    """
    if not hf.is_folder(path):
        check_file(path)
        if not is_safetensors(path) and (info := read_info(path)) is not None:
            return open_tensors(path), info
    return open_foreign(path, foreign, web)


def open_foreign(path: str | Path, foreign: Foreign, web: WebNames | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if hf.is_folder(path):
        return hf.read_folder(path)
    tensors = open_tensors(path)
    if web and is_safetensors(path):
        tensors = {name: web_tensor(web, name, tensor) for name, tensor in tensors.items()}
    return translate(path, tensors, foreign, open_tensors(foreign.init) if foreign.init else None)


def load_adapter(
    model: LanguageModel, path: str | Path, force: bool = False, foreign: Foreign = UNAIDED
) -> dict[str, Any]:
    """Put a saved adapter on the base model it was trained on; every tensor of the file is used. Returns what it says of itself.

    The adapter and the parts of the base that were trained with it train on; the rest is frozen.
    """
    adapter = Adapter(path, type(model), model.sizes, foreign)
    adapter.check_base(model.fingerprint, force)
    if adapter.initial_state:
        model.add_initial_state()
    model.requires_grad_(False)
    for name in adapter.layers:
        model.set_submodule(name, adapter.layer(name, *weight_and_bias(model, name)))
    for name in adapter.parts:
        parameter = model.get_parameter(name)
        parameter.data.copy_(adapter.tensors[name])
        parameter.requires_grad_(True)
    return adapter.info


def method_of(info: Mapping[str, Any], path: str | Path) -> tuple[type[AdapterLinear] | None, AdapterLinear.Config | None]:
    """The method and its options that an adapter names; None for `none`: parts of the base alone."""
    if info["method"] == "none":
        return None, None
    method = METHODS.get(info["method"])
    if method is None:
        raise UserError(f"{path}: unknown method {info['method']!r}; this program has {', '.join(METHODS)}")
    try:
        return method, method.config_from(info["options"], info["method"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
