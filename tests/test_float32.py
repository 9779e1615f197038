"""The choice of who multiplies float32 matrices: as exact as before, and only where it helps."""

import pytest
import torch

from rwkv_bone.ops import float32


@pytest.fixture(autouse=True)
def asked_anew():
    float32.onednn_is_right.cache_clear()
    yield
    float32.onednn_is_right.cache_clear()
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def onednn(monkeypatch):
    """A processor for which oneDNN is taken."""
    monkeypatch.setattr(float32, "amd", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(float32, "error_of_a_product", lambda: 6e-7)


def test_what_is_chosen_on_this_machine_is_exact():
    float32.set_matmul_backend("cpu", 4096)
    assert float32.error_of_a_product() < 1e-6
    torch.manual_seed(0)
    x, w, b = torch.randn(700, 300), torch.randn(500, 300), torch.randn(4, 300, 40)
    for made, exact in (
        (x @ w.T, x.double() @ w.double().T),
        (x.T @ (x @ w.T), x.double().T @ (x.double() @ w.double().T)),
        (torch.ones(700, 500).addmm_(x, w.T), 1 + x.double() @ w.double().T),
        (torch.bmm(x.expand(4, -1, -1), b), torch.bmm(x.double().expand(4, -1, -1), b.double())),
    ):
        assert (made - exact).norm() < 1e-6 * exact.norm()


def test_onednn_is_taken_for_many_tokens_on_an_amd_processor_with_avx512(onednn, monkeypatch):
    assert float32.set_matmul_backend("cpu", 256) == "oneDNN"
    assert torch.get_float32_matmul_precision() == "medium"
    assert float32.set_matmul_backend("cpu", 255) == ""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("lacks", ["amd", "avx512", "exactness"])
def test_else_the_choice_is_torchs(onednn, monkeypatch, lacks):
    if lacks == "amd":
        monkeypatch.setattr(float32, "amd", lambda: False)
    elif lacks == "avx512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(float32, "error_of_a_product", lambda: 2e-3)  # bf16's
    assert float32.set_matmul_backend("cpu", 4096) == ""
    assert torch.get_float32_matmul_precision() == "highest"


def test_on_a_gpu_tf32_is_used_where_it_was_asked_for_and_nowhere_else(onednn):
    assert float32.set_matmul_backend("cuda", 4096, tf32=True) == ""
    assert torch.get_float32_matmul_precision() == "high"
    assert float32.set_matmul_backend("cuda", 4096) == ""
    assert torch.get_float32_matmul_precision() == "highest"
