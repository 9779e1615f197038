"""rwkv-bone: fine-tune RWKV-7 and RWKV-6 models with Bone (arXiv 2409.15371) and other PEFT methods.

`import rwkv_bone as rb` gives the functions of api.py, which is imported when the first of them is used: see docs/api.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import inject, load_adapter, load_model, loss, merge, methods, save, tokenizer, train

__version__ = "0.1.0"
__all__ = [
    "generate", "inject", "load_adapter", "load_model", "loss", "merge", "methods", "save", "tokenizer", "train",
]  # fmt: skip


def __getattr__(name: str):
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module 'rwkv_bone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
