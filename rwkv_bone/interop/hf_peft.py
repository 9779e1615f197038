"""Adapters as folders of Hugging Face peft: `adapter_config.json` and `adapter_model.safetensors`, written and read.

    LORA   <module>.lora_A.weight (r, in), <module>.lora_B.weight (out, r), DoRA: <module>.lora_magnitude_vector (out,)
    MISS   <module>.miss_block: (r, out), with init_weights "mini" (r, mini_r), with "bat" (out/r, r, r): `bone_col` here
    BONE   <module>.bone_block: MISS under the name that it had in peft 0.14 to 0.18; read only

each name preceded by `base_model.model.`; of modules that were trained in full, `base_model.model.<module>.weight` stands beside.
PiSSA, OLoRA and LoRA-GA are written as the LoRA of rank 2r that they are beside an untouched base. peft has no row Bone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import safetensors
from ..files.atomic import atomic
from ..files.folder import read_json
from ..peft import METHODS, AdapterLinear
from ..peft.lora import LoraLinear, RankConfig
from ..peft.miss import MissConfig
from ..peft.shifted import ShiftedLoraLinear

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# our name of a tensor -> peft's
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
MISS = {"bone": "miss_block", "bone_col": "miss_block"}
# LoRA's options of peft under which its tensors alone, on the base alone, would not be the model
HARMLESS = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
}
UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that leave the base as it is


# ---------------------------------------------------------------- writing


def write_folder(folder: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write an adapter as peft loads it. tensors, info: as `checkpoint.read_adapter` gives them (method, options)."""
    theirs, config = to_peft(tensors, info["method"], info["options"])
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in theirs.items()}
    with atomic(Path(folder) / TENSORS) as file:
        safetensors.write_safetensors(file, layout, theirs.items())
    with atomic(Path(folder) / CONFIG) as file:  # last: with it the folder is an adapter
        file.write(json.dumps(config, indent=2).encode() + b"\n")


@torch.no_grad()
def to_peft(
    tensors: Mapping[str, Tensor], method: str, options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under peft's names, and peft's configuration."""
    if method not in METHODS or method == "bone":
        raise UserError(f"peft has no method {method}; merge the adapter instead, or write it as a LoRA first")
    config = METHODS[method].config_from(options, method)
    mini_r = config.mini_r if isinstance(config, MissConfig) else 0
    size = 2 * config.r * max(1, mini_r)  # any that the method can have
    own = set(layer_of(METHODS[method], config, size, size).state_dict()) - {"weight"}
    layers: dict[str, dict[str, Tensor]] = {}
    parts = {}
    for name, tensor in tensors.items():
        projection, _, key = name.rpartition(".")
        if key in own:
            layers.setdefault(projection, {})[key] = tensor
        else:
            parts[name] = tensor
    if odd := [name for name in parts if name.rpartition(".")[2] not in ("weight", "bias")]:
        raise UserError(f"peft cannot hold {odd[0]}, trained in full ({len(odd)} such tensors); merge the adapter instead")
    common = {
        "peft_type": "MISS" if method in ("miss", "bone_col") else "LORA",
        "r": config.r,
        "target_modules": list(layers),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in parts}) or None,
        "bias": "none",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }
    theirs: dict[str, Tensor] = {}
    if method in ("miss", "bone_col"):
        form = "bat" if method == "bone_col" else "mini" if mini_r else True
        special = {"init_weights": form, "miss_dropout": 0.0, "mini_r": mini_r or 1}
        for name, found in layers.items():
            (block,) = found.values()
            theirs[f"{PREFIX}{name}.miss_block"] = block
    else:
        assert isinstance(config, RankConfig)
        special = {
            "lora_alpha": config.alpha,
            "lora_dropout": getattr(config, "lora_dropout", 0.0),
            "use_rslora": method == "rslora",
            "use_dora": method == "dora",
            "init_lora_weights": True,
        }
        for name, found in layers.items():
            layer = layer_of(METHODS[method], config, len(found["lora_B"]), found["lora_A"].shape[1])
            assert isinstance(layer, LoraLinear)
            layer.load_state_dict(found, strict=False, assign=True)
            found["lora_A"], found["lora_B"] = layer.factors()
            theirs |= {f"{PREFIX}{name}.{LORA[key]}": found[key].detach() for key in LORA if key in found}
            if isinstance(layer, ShiftedLoraLinear):
                common["r"], special["lora_alpha"] = 2 * config.r, layer.scale * 2 * config.r
    return theirs | {PREFIX + name: tensor for name, tensor in parts.items()}, common | special


def layer_of(method: type[AdapterLinear], config: AdapterLinear.Config, out: int, in_: int) -> AdapterLinear:
    """A layer that holds no memory."""
    with torch.device("meta"):
        return method(torch.empty(out, in_), config)


# ---------------------------------------------------------------- reading


def is_folder(path: str | Path) -> bool:
    """Whether `path` is peft's: a folder with its configuration, or the file of tensors beside one."""
    path = Path(path)
    beside = path.suffix == ".safetensors" and os.path.isfile(path.parent / CONFIG)
    return beside or path.name == TENSORS or os.path.isfile(path / CONFIG)


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors, mapped, under our names, and what it says about itself, as `files.adapters.read_adapter` gives them.

    folder: the folder, or its file of tensors.
    """
    inside = Path(folder).is_dir()
    path = (Path(folder) if inside else Path(folder).parent) / CONFIG
    file = Path(folder) / TENSORS if inside else Path(folder)
    config = read_json(path)
    try:
        return from_peft(safetensors.open_safetensors(file)[0], config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under our names, and method and options. UserError where they would not be the same model here."""
    for key, harmless in HARMLESS.items():
        if config.get(key, harmless) not in (harmless, None):
            raise UserError(f"peft's {key}={config[key]!r} is not supported; only {harmless!r} is")
    if config.get("peft_type") == "LORA":
        method, names = lora_method(config), LORA
        options = {"r": config.get("r"), "alpha": config.get("lora_alpha"), "lora_dropout": config.get("lora_dropout", 0.0)}
        if options["alpha"] == 0:  # which would mean alpha = r here
            raise UserError("peft's lora_alpha=0 is not supported: such an adapter does nothing")
    elif config.get("peft_type") in ("MISS", "BONE"):
        if config.get("init_weights") not in (True, False, "bat", "mini") or config.get("miss_dropout", 0) != 0:
            raise UserError("MiSS of peft is read with init_weights true, false, \"bat\" or \"mini\", and without dropout")
        method = "bone_col" if config["init_weights"] == "bat" else "miss"
        suffix = MISS["bone"] if config["peft_type"] == "MISS" else "bone_block"
        names, options = {"bone_col" if method == "bone_col" else "bone": suffix}, {"r": config.get("r")}
        if config["init_weights"] == "mini":
            options["mini_r"] = config.get("mini_r", 1)
    else:
        raise UserError(f"peft_type {config.get('peft_type')!r} is not supported; LORA, MISS and BONE are")
    METHODS[method].config_from(options, method)
    ours = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        for key, suffix in names.items():
            if bare.endswith(f".{suffix}"):
                ours[f"{bare.removesuffix(suffix)}{key}"] = tensor
                break
        else:
            if not name.startswith(PREFIX) or any(key in name for key in ("lora_", "miss_", "bone_")):
                raise UserError(f"{name}: a tensor of no known meaning in a {config['peft_type']} folder")
            ours[bare] = tensor  # of a module that was trained in full
    return ours, {"method": method, "options": options, "base": {}, "foreign": "peft"}


def lora_method(config: Mapping[str, Any]) -> str:
    """Which of our methods a LoraConfig is."""
    init = config.get("init_lora_weights", True)
    if init not in UNTOUCHED:
        raise UserError(
            f"init_lora_weights {init!r} changed the base, and the folder does not say how; save it with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )
    if config.get("use_dora") and config.get("use_rslora"):
        raise UserError("DoRA with use_rslora is not supported")
    return "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
