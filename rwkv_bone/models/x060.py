"""RWKV-6 "Finch" (x060), arXiv 2404.05892: token shift with data-dependent lerps, WKV6 time mixing, channel mixing.

The parameters carry the names, shapes and order of BlinkDL's `.pth` files, so `state_dict()` is such a file.
Sizes: B batch, T time, C n_embd, A dim_att = H * N (H heads of size N), F dim_ffn, M mix LoRA, D decay LoRA, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.recompute import recompute_in_backward
from ..ops.wkv6 import recurrence, wkv6
from .base import WebNames
from .rwkv import RWKV, RWKVSizes, cast, linear, orthogonal, shift_difference, squared_relu

LN_X_EPS = 1e-5 * 8**2  # RWKV-LM: 1e-5 * head_size_divisor^2, with divisor 8 in every release
RESCALE_EVERY = 6  # layers between halvings of x in GGUF files, so that float16 holds it, as the released models have it
LERPS = "wkvrg"  # the order of the five data-dependent lerps in time_maa_w2
GGUF_NAMES = {
    "ln1": "attn_norm", "ln2": "attn_norm_2", "att.time_maa_x": "time_mix_lerp_x", "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2", "att.time_decay": "time_mix_decay", "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2", "att.time_faaaa": "time_mix_first", "att.ln_x": "time_mix_ln",
    **{f"att.{name}": f"time_mix_{name}" for name in ("receptance", "key", "value", "gate", "output")},
    "ffn.time_maa_k": "channel_mix_lerp_k", "ffn.time_maa_r": "channel_mix_lerp_r",
    **{f"ffn.{name}": f"channel_mix_{name}" for name in ("key", "receptance", "value")},
}  # fmt: skip


@dataclass(frozen=True)
class RWKV6Sizes(RWKVSizes):
    d_mix_lora: int = 32
    d_decay_lora: int = 64
    time_state: bool = False  # a trained initial state in every layer (state tuning)


class TimeMix(nn.Module):
    def __init__(self, sizes: RWKV6Sizes, layer: int):
        super().__init__()
        C, A, H, N = sizes.n_embd, sizes.dim_att, sizes.n_head, sizes.head_size
        M, D = sizes.d_mix_lora, sizes.d_decay_lora
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        for name in LERPS:
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * M))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, M, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, D))
        self.time_decay_w2 = nn.Parameter(torch.empty(D, A))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        if sizes.time_state:
            self.add_initial_state()
        self.receptance = linear(C, A)
        self.key = linear(C, A)
        self.value = linear(C, A)
        self.output = linear(A, C)
        self.gate = linear(C, A)
        self.ln_x = nn.GroupNorm(H, A, eps=LN_X_EPS)

    def add_initial_state(self) -> None:
        """An initial state of zeros, [value, key] as the community's files have it."""
        H, N = self.time_faaaa.shape
        self.time_state = nn.Parameter(self.time_faaaa.new_zeros(H, N, N))

    def lerps(self, x: Tensor, shift: Tensor | None, reset: Tensor | None) -> tuple[Tensor, ...]:
        """The five inputs xw, xk, xv, xr, xg (B, T, C): x and its shift, mixed by weights that depend on both."""
        B, T, C = x.shape
        dx = shift_difference(x, shift, reset)
        mix = torch.tanh(torch.addcmul(x, dx, self.time_maa_x) @ self.time_maa_w1)  # (B, T, 5M)
        maa = torch.cat([getattr(self, f"time_maa_{name}") for name in LERPS])  # (5, 1, C)
        mix = torch.baddbmm(maa, mix.view(B * T, 5, -1).transpose(0, 1), self.time_maa_w2)  # (5, B T, C)
        weights = mix.view(5, B, T, C)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return torch.addcmul(x, dx, weights).unbind(0)
        # five tensors and not views of one: for autograd, which would keep and join the whole
        return tuple(torch.addcmul(x, dx, weight) for weight in weights.unbind(0))

    def log_decay(self, h: Tensor, forget: Tensor | None) -> tuple[Tensor]:
        """log_w (B, T, H, N) from the decay LoRA's inside h (B, T, D); -inf where `forget` (B, T, 1, 1)."""
        ww = self.time_decay + h @ self.time_decay_w2
        # float32: bf16 would cost 2^-9 of the decay rate
        log_w = -cast(ww, torch.promote_types(ww.dtype, torch.float32)).exp().view(*h.shape[:-1], *self.time_faaaa.shape)
        return (log_w if forget is None else log_w.masked_fill(forget, -math.inf),)

    def gated(self, y: Tensor, g: Tensor) -> tuple[Tensor]:
        """What the output projection reads, (B, T, A)."""
        return (self.ln_x(y.reshape(-1, g.shape[-1])).view(g.shape) * F.silu(g),)

    def forward(
        self, x: Tensor, carry: None, shift: Tensor | None, wkv: Tensor | None, reset: Tensor | None = None, op: str = "auto"
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), wkv (B, H, N, N) -> output (B, T, C), nothing to carry, new shift, new wkv."""
        B, T, _ = x.shape
        u = self.time_faaaa
        H, N = u.shape
        forget = None
        if reset is not None:
            # the separator slot before a document forgets everything and adds nothing, so its successor sees zeros
            forget = F.pad(reset[:, 1:], (0, 1)).view(B, T, 1, 1)
            if wkv is not None:  # its separator was the last slot of the chunk before
                wkv = wkv.masked_fill(reset[:, 0].view(B, 1, 1, 1), 0)
        with recompute_in_backward(self.lerps, x, shift, reset, trained=self.parameters(recurse=False)) as (xw, xk, xv, xr, xg):
            r = self.receptance(xr).view(B, T, H, N)
            k = self.key(xk).view(B, T, H, N)
            v = self.value(xv).view(B, T, H, N)
            g = self.gate(xg)  # (B, T, A)
            h = torch.tanh(xw @ self.time_decay_w1)  # (B, T, D)
        if forget is not None:
            k = k.masked_fill(forget, 0)
        if wkv is None and hasattr(self, "time_state"):
            wkv = self.time_state.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)).expand(B, H, N, N).contiguous()
        with recompute_in_backward(self.log_decay, h, forget, trained=self.parameters(recurse=False)) as (log_w,):
            y, wkv = wkv6(r, k, v, log_w, u, wkv, op)
        with recompute_in_backward(self.gated, y, g, trained=self.ln_x.parameters()) as (gated,):
            return self.output(gated), carry, x.select(1, -1), wkv


class ChannelMix(nn.Module):
    def __init__(self, sizes: RWKV6Sizes):
        super().__init__()
        C, F_ = sizes.n_embd, sizes.dim_ffn
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = linear(C, F_)
        self.receptance = linear(C, C)
        self.value = linear(F_, C)

    def lerps(self, x: Tensor, shift: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs of key and receptance, (B, T, C)."""
        dx = shift_difference(x, shift, reset)
        return torch.addcmul(x, dx, self.time_maa_k), torch.addcmul(x, dx, self.time_maa_r)

    def forward(self, x: Tensor, shift: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C), new shift."""
        with recompute_in_backward(self.lerps, x, shift, reset, trained=(self.time_maa_k, self.time_maa_r)) as (xk, xr):
            k = self.key(xk)  # (B, T, F)
            r = self.receptance(xr)
        with recompute_in_backward(squared_relu, k) as (k,):
            v = self.value(k)
        return torch.sigmoid(r) * v, x.select(1, -1)


class RWKV6(RWKV):
    """An RWKV-6 language model; `LayerState.wkv` is indexed [key, value]."""

    version, title = "x060", "RWKV-6 (x060)"
    Sizes, TimeMix, ChannelMix, recurrence = RWKV6Sizes, TimeMix, ChannelMix, recurrence
    state_rate = 1.0  # the best are 1 to 3: benchmarks/results/state-rate-cpu.md
    gguf_architecture = "rwkv6"
    gguf_lerps = tuple(f"att.time_maa_{name}" for name in LERPS)
    gguf_names = GGUF_NAMES
    releases: ClassVar = {  # World
        name: {"vocab_size": 65536, "n_layer": n_layer, "n_embd": n_embd}
        for name, n_layer, n_embd in (("1.6B", 24, 2048), ("3B", 32, 2560), ("7B", 32, 4096))
    }
    web_names = WebNames(
        renamed={"time_faaaa": "time_first", "time_maa": "time_mix"},
        transposed=("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_state"),
    )

    @classmethod
    def is_time(cls, name: str) -> bool:
        return name.rpartition(".")[2].startswith("time_")

    def lr_multiplier(self, name: str) -> float:
        return 2.0 if name.endswith(".time_decay") else 1.0

    @classmethod
    def gguf_metadata(cls, sizes: RWKV6Sizes, source: str) -> dict[str, int | float]:
        ranks = {"time_mix_extra_dim": sizes.d_mix_lora, "time_decay_extra_dim": sizes.d_decay_lora}
        return {**super().gguf_metadata(sizes, source), **ranks, "rescale_every_n_layers": RESCALE_EVERY}

    @classmethod
    def gguf_change(cls, inner: str, layer: int) -> Callable[[Tensor], Tensor]:
        match inner:
            case "att.time_maa_w1" | "att.time_maa_w2" | "att.time_decay_w1" | "att.time_decay_w2":
                return lambda t: t.transpose(-1, -2)
            case "att.output" | "ffn.value":  # llama.cpp halves x behind every so many layers
                return lambda t: t / 2 ** (layer // RESCALE_EVERY)
        return torch.squeeze

    @classmethod
    def read_sizes(cls, tensors: Mapping[str, Tensor], n_layer: int) -> RWKV6Sizes:
        att = "blocks.0.att."
        vocab_size, n_embd = tensors["emb.weight"].shape
        dim_att, _ = tensors[att + "receptance.weight"].shape
        _, head_size = tensors[att + "time_faaaa"].shape
        _, d_mix_lora, _ = tensors[att + "time_maa_w2"].shape
        d_decay_lora, _ = tensors[att + "time_decay_w2"].shape
        dim_ffn, _ = tensors["blocks.0.ffn.key.weight"].shape
        state = att + "time_state" in tensors
        return RWKV6Sizes(vocab_size, n_layer, n_embd, dim_att, dim_ffn, head_size, d_mix_lora, d_decay_lora, state)

    @classmethod
    def default_sizes(cls, given: Mapping[str, int]) -> RWKV6Sizes:
        n_embd = given["n_embd"]
        wide = n_embd >= 4096  # the World 7B and 14B
        usual = {"d_mix_lora": 64 if wide else 32, "d_decay_lora": 128 if wide else 64}
        sizes: dict[str, Any] = {**usual, **given}
        sizes["dim_att"] = given.get("dim_att") or n_embd
        sizes["dim_ffn"] = given.get("dim_ffn") or int(n_embd * 3.5) // 32 * 32
        return RWKV6Sizes(**sizes)

    @classmethod
    def initial_value(
        cls, name: str, shape: tuple[int, ...], layer: int, sizes: Any, generator: torch.Generator | None
    ) -> Tensor:
        """RWKV-v5/src/model.py: RWKV_Tmix_x060, RWKV_CMix_x060."""
        C, A, L = sizes.n_embd, sizes.dim_att, sizes.n_layer
        gains = {"att.key": 0.1, "att.gate": 0.1, "att.output": 0.0, "ffn.value": 0.0, "ffn.receptance": 0.0}
        channel = torch.arange(C) / C  # 0 to almost 1
        att_channel = torch.arange(A) / max(A - 1, 1)  # 0 to 1
        depth = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
        power = channel ** (1 - layer / L)
        match name:
            case "att.time_maa_v":
                return 1 - (power + 0.3 * depth)
            case "att.time_maa_r" | "att.time_maa_g":
                return 1 - power.sqrt()
            case "att.time_decay":
                return -6 + 5 * att_channel ** (0.7 + 1.3 * depth)
            case "att.time_faaaa":
                return depth * (1 - att_channel) + ((torch.arange(A) + 1) % 3 - 1) * 0.1
            case "att.time_maa_w2" | "att.time_decay_w2":
                return torch.empty(shape).uniform_(-0.01, 0.01, generator=generator)
            case "att.time_maa_w1" | "att.time_decay_w1" | "att.time_state":
                return torch.zeros(shape)
            case "ffn.time_maa_k" | "ffn.time_maa_r":
                return 1 - channel ** ((1 - layer / L) ** 3)
            case _ if ".time_maa_" in name:
                return 1 - power
        gain = gains.get(name.removesuffix(".weight"), 1.0)
        return orthogonal(shape, gain, generator) if gain else torch.zeros(shape)
