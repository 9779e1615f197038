"""Methods as RWKV-PEFT's command lines name them: what `--peft NAME` and its JSON mean here.

The same word has meant two methods there. "bone" was the weight guide until November 2024; `bone_mode` and, from February 2025,
`--peft disha` with its `mode` then chose between "bat" (the weight guide, `bone` here) and "bone" (MiSS, `miss` here).
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError

LOAD, INIT, MODE, PARTS = "load", "init", "mode", "parts"  # what a key can mean besides an option of the method

# flag -> the `--peft` names it serves, and its keys: what each means here, and its type
LORA = {
    "lora_r": ("r", int),
    "lora_alpha": ("alpha", float),
    "lora_dropout": ("lora_dropout", float),
    "lora_load": (LOAD, str),
    "lora_parts": (PARTS, str),
}
PISSA = {
    "pissa_r": ("r", int),
    "svd_niter": ("svd_niter", int),
    "pissa_load": (LOAD, str),
    "pissa_init": (INIT, str),
    "pissa_parts": (PARTS, str),
}
BONE = {"bone_r": ("r", int), "bone_load": (LOAD, str), "bone_mode": (MODE, str), "bone_parts": (PARTS, str)}
DISHA = {"r": ("r", int), "load": (LOAD, str), "mode": (MODE, str)}
PEFT = {  # the keywords of peft's LoraConfig and MissConfig, and what RWKV-PEFT's help calls them
    "r": ("r", int),
    "alpha": ("alpha", float),
    "dropout": ("lora_dropout", float),
    "svd_niter": ("svd_niter", int),
    "load": (LOAD, str),
    "target_modules": (PARTS, list),
    "use_dora": ("use_dora", bool),
    "use_rslora": ("use_rslora", bool),
    "init_lora_weights": ("start", object),
    "init_weights": ("start", object),
    "mini_r": ("mini_r", int),
    **LORA,
}
CONFIGS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, type]]]] = {
    "lora_config": (("lora", "rslora", "lora_plus", "dora"), LORA),
    "pissa_config": (("pissa",), PISSA),
    "bone_config": (("bone",), BONE),
    "disha_config": (("disha", "miss"), DISHA),
    "miss_config": (("miss",), DISHA),
    "peft_config": ((), PEFT),  # every method
}
MODES = {"bat": "bone", "bone": "miss"}
TODAY = ("receptance", "key", "value", "output")  # target modules since October 2025


class Choice(NamedTuple):
    method: str
    options: dict[str, Any]  # of the method's Config; what was not given is not here
    load: str  # an adapter's file to start from, or ""
    init: str  # PiSSA there: the file of A and B as they started, which `load` needs beside it; or ""
    parts: tuple[str, ...] = ()  # what *_parts or target_modules name: projections to adapt, and parts to train in full


def method_from_community(peft: str, configs: Mapping[str, str]) -> Choice:
    """What `--peft PEFT` with the JSON texts of `configs` ({"bone_config": '{"bone_load":"","bone_r":64}'}) chooses.

    Names of this program (`bone`, `miss`, `lora`, ...) pass through. Raises UserError for broken JSON, an unknown key, a value of
    another type, and a config of another method than the one chosen.
    """
    found: dict[str, Any] = {}
    for flag, text in configs.items():
        if flag not in CONFIGS:
            raise UserError(f"--{flag}: unknown; --peft takes {', '.join('--' + name for name in CONFIGS)}")
        serves, keys = CONFIGS[flag]
        if (serves and peft not in serves) or peft == "none":
            raise UserError(f"--{flag} is for --peft {' or '.join(serves or ['METHOD'])}, not for --peft {peft}")
        for name, value in parse(flag, text, keys).items():
            if found.setdefault(name, value) != value:
                raise UserError(f"--{flag}: {name} is given twice, as {found[name]!r} and {value!r}")
    parts = found.pop(PARTS, "")
    parts = tuple(parts.replace(",", " ").split() if isinstance(parts, str) else map(str, parts))
    mode = found.pop(MODE, "bat" if peft == "bone" else None)
    if peft == "miss":
        mode = None  # its only one
    if peft == "disha" and mode is None:
        raise UserError('--peft disha: needs --disha_config with "mode": "bat" (the weight guide) or "bone" (MiSS)')
    if mode is not None and mode not in MODES:
        raise UserError(f'mode {mode!r} of --{peft}_config: wanted "bat" (the weight guide) or "bone" (MiSS)')
    load, init = found.pop(LOAD, ""), found.pop(INIT, "")
    method = of_peft(MODES[mode] if mode else peft, found)
    if "peft_config" in configs and method in ("lora", "rslora", "dora"):  # LoraConfig's own defaults
        found = {"r": 8, "alpha": 8.0, **found}
    return Choice(method, found, load, init, parts)


def of_peft(method: str, found: dict[str, Any]) -> str:
    """The method that the keywords of peft choose; they are taken out of `found`."""
    dora, rslora, start = found.pop("use_dora", False), found.pop("use_rslora", False), found.pop("start", True)
    if method == "lora" and dora and not rslora:
        method = "dora"
    elif method == "lora" and rslora and not dora:
        method = "rslora"
    elif dora or rslora:
        raise UserError(f"--peft_config: use_dora and use_rslora choose one variant of lora, not of {method}, and not both")
    if method == "miss":
        mini_r = found.pop("mini_r", 1)  # which only "mini" reads
        if start == "mini":
            found["mini_r"] = mini_r
            return method
    if start in (True, False):
        return method
    if method == "miss" and start == "bat":
        return "bone_col"
    if method == "lora" and str(start).startswith("pissa"):
        if niter := str(start).rpartition("_")[2]:
            found |= {"svd_niter": int(niter)} if niter.isdigit() else {}
        found.pop("lora_dropout", None)
        return "pissa"
    if method == "lora" and start == "olora":
        found.pop("lora_dropout", None)
        return "olora"
    raise UserError(f"--peft_config: initial weights {start!r} of --peft {method} are not supported")


def parse(flag: str, text: str, keys: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """The JSON object of one flag, by what its keys mean."""
    try:
        given = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        cure = "put it in single quotes, or the shell takes its double quotes and blanks away"
        raise UserError(f"--{flag}: not JSON ({error}): {text!r}; {cure}") from None
    if not text.lstrip().startswith("{"):
        raise UserError(f'--{flag}: wanted a JSON object such as {{"{next(iter(keys))}": ...}}, got {text!r}')
    meant: dict[str, Any] = {}
    for key, value in given:
        if key not in keys:
            raise UserError(f"--{flag}: unknown key {key}; it has {', '.join(keys)}")
        name, kind = keys[key]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not object and type(value) is not kind:
            article = "an" if kind is int else "a"
            raise UserError(f"--{flag}: {key} is {article} {kind.__name__}, not {json.dumps(value)}")
        if meant.setdefault(name, value) != value:
            raise UserError(f"--{flag}: {key} is given twice, as {meant[name]!r} and {value!r}")
    return meant
