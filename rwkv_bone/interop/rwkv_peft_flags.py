"""The command lines of RWKV-PEFT: which method, options and files its `--peft NAME --*_config JSON` means here.

The same word has meant two methods there. "bone" was the weight guide until November 2024; `bone_mode` and, from February 2025,
`--peft disha` with its `mode` then chose between "bat" (the weight guide, `bone` here) and "bone" (MiSS, `miss` here).
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError


class Choice(NamedTuple):
    method: str
    options: dict[str, Any]  # of the method's Config; what was not given is not here
    load: str  # an adapter's file to start from, or ""
    init: str  # PiSSA there: the file of A and B as they started, which `load` needs beside it; or ""


LOAD, INIT, MODE, PARTS = "load", "init", "mode", "parts"  # what a key can mean besides an option of the method

# flag -> the `--peft` names it serves, and its keys: what each means here, and its type
LORA = {
    "lora_r": ("r", int),
    "lora_alpha": ("alpha", float),
    "lora_dropout": ("lora_dropout", float),
    "lora_load": (LOAD, str),
    "lora_parts": (PARTS, str),
}
PISSA = {"pissa_r": ("r", int), "svd_niter": ("svd_niter", int), "pissa_load": (LOAD, str), "pissa_init": (INIT, str)}
BONE = {"bone_r": ("r", int), "bone_load": (LOAD, str), "bone_mode": (MODE, str)}
DISHA = {"r": ("r", int), "load": (LOAD, str), "mode": (MODE, str)}
PEFT = {
    "r": ("r", int),
    "alpha": ("alpha", float),
    "dropout": ("lora_dropout", float),
    "svd_niter": ("svd_niter", int),
    "load": (LOAD, str),
    **LORA,
}
CONFIGS = {
    "lora_config": (("lora", "rslora", "lora_plus", "dora"), LORA),
    "pissa_config": (("pissa",), PISSA),
    "bone_config": (("bone",), BONE),
    "disha_config": (("disha",), DISHA),
    "peft_config": ((), PEFT),  # every method
}
MODES = {"bat": "bone", "bone": "miss"}


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
    if found.pop(PARTS, "att,ffn") not in ("att,ffn", "ffn,att"):
        raise UserError("--lora_config: lora_parts is not used here; say --parts instead")
    mode = found.pop(MODE, "bat" if peft == "bone" else None)
    if peft == "disha" and mode is None:
        raise UserError('--peft disha: needs --disha_config with "mode": "bat" (the weight guide) or "bone" (MiSS)')
    if mode is not None and mode not in MODES:
        raise UserError(f'mode {mode!r} of --{peft}_config: wanted "bat" (the weight guide) or "bone" (MiSS)')
    return Choice(MODES[mode] if mode else peft, found, load=found.pop(LOAD, ""), init=found.pop(INIT, ""))


def parse(flag: str, text: str, keys: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """The JSON object of one flag, by what its keys mean."""
    try:
        given = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise UserError(f"--{flag}: not JSON ({error}): {text!r}; put it in single quotes") from None
    if not text.lstrip().startswith("{"):
        raise UserError(f'--{flag}: wanted a JSON object such as {{"{next(iter(keys))}": ...}}, got {text!r}')
    meant: dict[str, Any] = {}
    for key, value in given:
        if key not in keys:
            raise UserError(f"--{flag}: unknown key {key}; it has {', '.join(keys)}")
        name, kind = keys[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"--{flag}: {key} is {'a' if kind is not int else 'an'} {kind.__name__}, not {json.dumps(value)}")
        if meant.setdefault(name, value) != value:
            raise UserError(f"--{flag}: {key} is given twice, as {meant[name]!r} and {value!r}")
    return meant
