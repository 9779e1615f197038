"""PEFT methods. `METHODS` is the registry: one file and one line for each."""

from .adapter import AdapterLinear, adapter_tensors, adapters, attach, disabled, inject, merge
from .bone import BoneLinear
from .bone_col import BoneColLinear
from .dora import DoraLinear
from .lora import LoraLinear
from .lora_ga import LoraGaLinear, start_from_gradients
from .lora_plus import LoraPlusLinear
from .miss import MissLinear
from .olora import OloraLinear
from .pissa import PissaLinear
from .rslora import RsLoraLinear

METHODS: dict[str, type[AdapterLinear]] = {
    "bone": BoneLinear,
    "bone_col": BoneColLinear,
    "miss": MissLinear,
    "lora": LoraLinear,
    "rslora": RsLoraLinear,
    "lora_plus": LoraPlusLinear,
    "pissa": PissaLinear,
    "olora": OloraLinear,
    "lora_ga": LoraGaLinear,
    "dora": DoraLinear,
}

__all__ = [
    "METHODS",
    "AdapterLinear",
    "adapter_tensors",
    "adapters",
    "attach",
    "disabled",
    "inject",
    "merge",
    "start_from_gradients",
]
