"""Shared by the tests: where the real files are, small models, and the comparison that all of them use."""

import os
import signal
from functools import partial
from pathlib import Path

# before torch is imported, here and in the programs that tests start: small tensors gain nothing from more threads, and on
# a busy machine threads that wait for each other in a spin cost a hundredfold
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell's background jobs are begun with interrupts ignored, nohup's with SIGHUP, and so would the programs be that tests stop
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis
import pytest
import torch

from rwkv_bone.models import MODELS, LanguageModel

hypothesis.settings.register_profile("ours", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("ours")

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights, data and golden files."""
    if not DATA.is_dir():
        pytest.skip(f"needs the real files in {DATA}")
    return DATA


@pytest.fixture(scope="session")
def tiny(data) -> Path:
    """A really trained RWKV-6 of a million parameters (12 layers, C 64, heads of size 8, vocabulary 256, bf16)."""
    return data / "tiny-rwkv6-1m.pth"


@pytest.fixture(scope="session", autouse=True)
def draw():
    """The drawing of a run's picture, which takes as long as a short run: without it here but where a test asks for it."""
    from rwkv_bone.training import summary

    drawn, summary.draw = summary.draw, lambda folder: False
    yield drawn
    summary.draw = drawn


SMALL = {"vocab_size": 50, "n_layer": 2, "n_embd": 24, "dim_att": 16, "dim_ffn": 40, "head_size": 8}
SMALL_OF = {
    "x060": {"d_mix_lora": 4, "d_decay_lora": 6},
    "x070": {"d_decay_lora": 3, "d_aaa_lora": 4, "d_mv_lora": 5, "d_gate_lora": 6},
}


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, version: str = "x070", **sizes) -> LanguageModel:
    """A new model in which no parameter is zero, so that every path counts."""
    kind = MODELS[version]
    given = {**SMALL, **SMALL_OF[version], **sizes}
    if version == "x070":
        given["dim_att"] = given["n_embd"]
    model = kind(kind.Sizes(**given)).initialise(seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


each_version = pytest.mark.parametrize("version", SMALL_OF)


@pytest.fixture
def version() -> str:
    """The version of RWKV that a test's models have: the one that most people tune, or each of them by `each_version`."""
    return "x070"


@pytest.fixture
def make_model(version):
    return partial(small_model, version=version)
