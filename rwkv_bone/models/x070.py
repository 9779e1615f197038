"""RWKV-7 "Goose" (x070), arXiv 2503.14456: token shift, WKV7 time mixing with a value residual, channel mixing.

The parameters carry the names, shapes and order of BlinkDL's `.pth` files, so `state_dict()` is such a file.
Sizes: B batch, T time, C n_embd = H * N (H heads of size N), F dim_ffn, V vocabulary, D the rank of one of four LoRAs:
w (decay), a (in-context learning rate), v (value residual), g (gate).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from ..ops.recompute import recompute_in_backward
from ..ops.wkv7 import recurrence, wkv7
from .base import GGUFTensor, WebNames
from .rwkv import RWKV, RWKVSizes, cast, linear, orthogonal, shift_difference, squared_relu

LN_X_EPS = 64e-5  # for every head size
LEAST_LOG_W = -math.exp(-0.5)
KK_EPS = 1e-12
LERPS = "rwkvag"  # the inputs of the time mixing, in the order of the file
RANKS = {"w": "d_decay_lora", "a": "d_aaa_lora", "v": "d_mv_lora", "g": "d_gate_lora"}
GGUF_NAMES = {
    "ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "ffn.x_k": "channel_mix_lerp_k",
    **{f"att.{name}{i}": f"time_mix_{name}{i}" for name in RANKS for i in range(3)},
    **{f"att.{name}": f"time_mix_{name}" for name in ("k_k", "k_a", "r_k", "receptance", "key", "value", "output")},
    **{f"ffn.{name}": f"channel_mix_{name}" for name in ("key", "value")},
}  # fmt: skip


@dataclass(frozen=True)
class RWKV7Sizes(RWKVSizes):
    """dim_att is n_embd. Layer 0 has no use for v0, v1 and v2, and files have them or not: `v_in_layer_0`."""

    d_decay_lora: int
    d_aaa_lora: int
    d_mv_lora: int
    d_gate_lora: int
    v_in_layer_0: bool = True
    time_state: bool = False  # a trained initial state in every layer (state tuning)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def one_token(x: Tensor, shift: Tensor | None, reset: Tensor | None) -> bool:
    """Whether x (B, T, C) is one token of each row after others, without gradients: what `forward_one` is for."""
    return x.shape[1] == 1 and shift is not None and reset is None and not torch.is_grad_enabled()


class TimeMix(nn.Module):
    v0: Tensor
    v1: Tensor
    v2: Tensor
    mix: Tensor  # this and the next ones: see `prepare`
    down: Tensor
    up: Tensor
    offsets: Tensor
    scales: Tensor
    minus_k_k: Tensor
    minus_k_a: Tensor
    rest_k_a: Tensor

    def __init__(self, sizes: RWKV7Sizes, layer: int):
        super().__init__()
        C, H, N = sizes.n_embd, sizes.n_head, sizes.head_size
        Dw, Da, Dv, Dg = sizes.d_decay_lora, sizes.d_aaa_lora, sizes.d_mv_lora, sizes.d_gate_lora
        self.first = layer == 0
        for name in LERPS:
            setattr(self, f"x_{name}", parameter(1, 1, C))
        self.w0 = parameter(1, 1, C)
        self.r_k = parameter(H, N)
        self.w1 = parameter(C, Dw)
        self.w2 = parameter(Dw, C)
        self.a1 = parameter(C, Da)
        self.a2 = parameter(Da, C)
        self.a0 = parameter(1, 1, C)
        self.g1 = parameter(C, Dg)
        self.g2 = parameter(Dg, C)
        for name, shape in (("v2", (Dv, C)), ("v1", (C, Dv)), ("v0", (1, 1, C))):
            if not self.first:
                setattr(self, name, parameter(*shape))
            elif sizes.v_in_layer_0:  # kept for the file; not used, so not trained
                self.register_buffer(name, torch.empty(shape))
        self.k_k = parameter(1, 1, C)
        self.k_a = parameter(1, 1, C)
        if sizes.time_state:
            self.add_initial_state()
        self.receptance = linear(C, C)
        self.key = linear(C, C)
        self.value = linear(C, C)
        self.output = linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=LN_X_EPS)

    def add_initial_state(self) -> None:
        """An initial state of zeros, [value, key]."""
        H, N = self.r_k.shape
        self.time_state = nn.Parameter(self.r_k.new_zeros(H, N, N))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("k_k", "k_a", "time_state"):  # after v0, also where that is a buffer: there are readers that go by position
            if prefix + name in destination:
                destination[prefix + name] = destination.pop(prefix + name)

    def lerps(self, x: Tensor, shift: Tensor | None, reset: Tensor | None) -> tuple[Tensor, ...]:
        """The six inputs xr, xw, xk, xv, xa, xg (B, T, C): x moved towards the token before it."""
        dx = shift_difference(x, shift, reset)
        return tuple(torch.addcmul(x, dx, getattr(self, f"x_{name}")) for name in LERPS)

    def operands(self, r: Tensor, k: Tensor, w: Tensor, a: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        """log_w, k, -kk and kk a (B, T, H, N) as WKV7 reads them, the bonus (B, T, H, 1), and v (B, T, H, N) behind layer 0.

        r, k (B, T, C); w, a (B, T, D), the insides of the LoRAs; residual: v, v_first (B, T, C) and the inside of v's LoRA.
        """
        H, N = self.r_k.shape
        heads = (*k.shape[:-1], H, N)
        # float32: x in bf16 would put the rate of decay off by up to 1.6%
        x = self.w0 + cast(w @ self.w2, torch.promote_types(w.dtype, torch.float32))
        log_w = -(F.logsigmoid(x) - 0.5).exp()  # -e^-0.5 sigmoid(x), with exact gradients for large x too
        a = torch.sigmoid(self.a0 + a @ self.a2)
        kk = F.normalize((k * self.k_k).view(heads), dim=-1, eps=KK_EPS)  # of the key before the next line
        k = (k * (1 + (a - 1) * self.k_a)).view(heads)
        bonus = (r.view(heads) * k * self.r_k).sum(-1, keepdim=True)
        found = (log_w.view(heads), k, -kk, kk * a.view(heads), bonus)
        if not residual:
            return found
        v, v_first, mix = residual
        return *found, torch.lerp(v, v_first, torch.sigmoid(self.v0 + mix @ self.v2)).view(heads)

    def gated(self, y: Tensor, g: Tensor) -> tuple[Tensor]:
        """What the output projection reads, (B, T, C); g (B, T, D) is the inside of the gate's LoRA."""
        return (y * (g @ self.g2),)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor | None,
        wkv: Tensor | None,
        reset: Tensor | None = None,
        op: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, v_first (B, T, C), shift (B, C), wkv (B, H, N, N) -> output (B, T, C), v_first, new shift, new wkv.

        v_first is the value of layer 0, which makes it.
        """
        B, T, C = x.shape
        H, N = self.r_k.shape
        own = tuple(self.parameters(recurse=False)) if torch.is_grad_enabled() else ()  # a fifth of a sampled token
        with recompute_in_backward(self.lerps, x, shift, reset, trained=own) as (xr, xw, xk, xv, xa, xg):
            r = self.receptance(xr)
            k = self.key(xk)
            v = self.value(xv)
            w = torch.tanh(xw @ self.w1)
            a = xa @ self.a1
            g = torch.sigmoid(xg @ self.g1)
            residual = () if v_first is None else (v, v_first, xv @ self.v1)
        if wkv is None and hasattr(self, "time_state"):
            wkv = self.time_state.to(torch.promote_types(x.dtype, torch.float32)).expand(B, H, N, N).contiguous()
        with recompute_in_backward(self.operands, r, k, w, a, *residual, trained=own) as operands:
            log_w, k, minus_kk, kk_a, bonus, *mixed = operands
            if v_first is None:
                v_first, mixed = v, [v.view(B, T, H, N)]
            (v,) = mixed
            y, wkv = wkv7(r.view(B, T, H, N), log_w, k, v, minus_kk, kk_a, wkv, reset, op)
            y = self.ln_x(y.reshape(B * T, C)).view(B, T, H, N)
            y = torch.addcmul(y, bonus, v).view(B, T, C)
        with recompute_in_backward(self.gated, y, g, trained=own) as (gated,):
            return self.output(gated), v_first, x.select(1, -1), wkv

    @torch.no_grad()
    def prepare(self) -> None:
        """For `forward_one`: x_* (7, 1, C) of r, k, v and the LoRAs w, a, v, g; for w, a and v, in layer 0 without v, matrices
        (3, C, D) and (3, D, C), padded with zeros to the largest D, the offsets (3, 1, C), and scales (3, 1, 1).
        """
        loras = "wa" if self.first else "wav"
        self.mix = torch.stack([getattr(self, f"x_{name}")[0] for name in f"rkv{loras}g"])
        self.down = pad_sequence([getattr(self, f"{name}1").T for name in loras], batch_first=True).mT.contiguous()
        self.up = pad_sequence([getattr(self, f"{name}2") for name in loras], batch_first=True)
        offsets = torch.stack([getattr(self, f"{name}0")[0] for name in loras])
        self.offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        self.scales = self.offsets.new_tensor([LEAST_LOG_W, -1, 1][: len(offsets)]).view(-1, 1, 1)
        self.minus_k_k, self.minus_k_a = -self.k_k.view_as(self.r_k), -self.k_a.view_as(self.r_k)
        self.rest_k_a = 1 + self.minus_k_a

    def forward_one(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor | None,
        wkv: Tensor | None,
        reset: Tensor | None = None,
        op: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`forward`, for one token in half as many calls: they are what the time of a small model's token goes into."""
        if not one_token(x, shift, reset):
            return self.forward(x, v_first, shift, wkv, reset, op)
        assert shift is not None and wkv is not None
        B, T, C = x.shape
        heads = (B, T, *self.r_k.shape)
        x = x.view(B, C)
        mixed = torch.lerp(x, cast(shift, x.dtype), self.mix)  # (7, B, C)
        r, k, v = mixed[:3].unbind()
        r, k, v = self.receptance(r).view(heads), self.key(k).view(heads), self.value(v).view(heads)
        inside = torch.bmm(mixed[3:-1], self.down)  # (3, B, D)
        inside[0].tanh_()
        gates = (torch.bmm(inside, self.up) + self.offsets).sigmoid_().mul_(self.scales).view(-1, *heads)
        g = torch.mm(torch.mm(mixed[-1], self.g1).sigmoid_(), self.g2)
        minus_a, *residual = cast(gates[1:], x.dtype).unbind()
        minus_kk = k * self.minus_k_k
        minus_kk /= torch.linalg.vector_norm(minus_kk, dim=-1, keepdim=True).clamp_min_(KK_EPS)
        k = k * torch.addcmul(self.rest_k_a, minus_a, self.minus_k_a)
        if v_first is None:
            v_first = v.view(B, T, C)
        else:
            v = torch.lerp(v, v_first.view(heads), *residual)
        state = cast(wkv, gates.dtype).contiguous()
        y, wkv = recurrence.unchecked((r, gates[0], k, v, minus_kk, minus_kk * minus_a, state, None), op)
        y = torch.addcmul(self.ln_x(y.view(B, C)).view(heads), (r * k * self.r_k).sum(-1, keepdim=True), v)
        return self.output(y.view(B, C) * g).view(B, T, C), v_first, x, wkv


class ChannelMix(nn.Module):
    def __init__(self, sizes: RWKV7Sizes):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, sizes.n_embd))
        self.key = linear(sizes.n_embd, sizes.dim_ffn)
        self.value = linear(sizes.dim_ffn, sizes.n_embd)

    def lerp(self, x: Tensor, shift: Tensor | None, reset: Tensor | None) -> tuple[Tensor]:
        """The input of key, (B, T, C)."""
        return (torch.addcmul(x, shift_difference(x, shift, reset), self.x_k),)

    def forward(self, x: Tensor, shift: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C), new shift."""
        with recompute_in_backward(self.lerp, x, shift, reset, trained=(self.x_k,)) as (xk,):
            k = self.key(xk)  # (B, T, F)
        with recompute_in_backward(squared_relu, k) as (k,):
            return self.value(k), x.select(1, -1)

    def prepare(self) -> None:
        self.mix = self.x_k.view(-1)

    def forward_one(self, x: Tensor, shift: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`, for one token in fewer calls."""
        if not one_token(x, shift, reset):
            return self.forward(x, shift, reset)
        assert shift is not None
        B, T, C = x.shape
        x = x.view(B, C)
        k = self.key(torch.lerp(x, cast(shift, x.dtype), self.mix))
        return self.value(torch.relu(k).square_()).view(B, T, C), x


class RWKV7(RWKV):
    """An RWKV-7 language model; `LayerState.wkv` is indexed [value, key]."""

    version, title = "x070", "RWKV-7 (x070)"
    Sizes, TimeMix, ChannelMix, recurrence = RWKV7Sizes, TimeMix, ChannelMix, recurrence
    state_rate = 1e-3  # small models gain most at 0.3 to 1, which users found to destroy large ones: state-rate-cpu.md
    gguf_architecture = "rwkv7"
    gguf_lerps = tuple(f"att.x_{name}" for name in LERPS)
    gguf_names = GGUF_NAMES
    template = "g1"
    releases: ClassVar = {  # of rwkv7-g1, with its LoRA ranks of w, a, v, g
        f"G1 {name}": {"vocab_size": 65536, "n_layer": n_layer, "n_embd": n_embd, **dict(zip(RANKS.values(), ranks))}
        for name, n_layer, n_embd, ranks in (
            ("0.1B", 12, 768, (64, 64, 32, 128)),
            ("0.4B", 24, 1024, (64, 64, 32, 128)),
            ("1.5B", 24, 2048, (96, 96, 64, 256)),
            ("2.9B", 32, 2560, (96, 96, 64, 320)),
            ("7.2B", 32, 4096, (128, 128, 96, 480)),
            ("13.3B", 61, 4096, (192, 192, 128, 384)),
        )
    }
    web_names = WebNames(renamed={}, transposed=(*(f".att.{name}{i}" for name in RANKS for i in (1, 2)), ".att.time_state"))

    @classmethod
    def is_time(cls, name: str) -> bool:
        return re.search(r"\.(att|ffn)\.\w+$", name) is not None  # the mixings' own parameters

    def lr_multiplier(self, name: str) -> float:
        return 2.0 if name.endswith(".att.w0") else 1.0

    def describe(self) -> str:
        return f"{super().describe()}, LoRA ranks {', '.join(f'{name} {getattr(self.sizes, d)}' for name, d in RANKS.items())}"

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], source: str) -> RWKV7Sizes:
        if found := next((name for name in tensors if ".s_emb" in name or ".qkv" in name), None):
            raise UserError(
                f"{source}: an rwkv7a or rwkv7b model (DeepEmbed: it has {found}), which is another architecture; "
                "use a plain RWKV-7 model, such as one of the rwkv7-g1 files"
            )
        return super().sizes_of(tensors, source)

    @classmethod
    def gguf_metadata(cls, sizes: RWKV7Sizes, source: str) -> dict[str, int | float]:
        names = {"w": "decay", "a": "iclr", "v": "value_residual_mix", "g": "gate"}
        ranks = {f"attention.{names[lora]}_lora_rank": getattr(sizes, rank) for lora, rank in RANKS.items()}
        return {**super().gguf_metadata(sizes, source), **ranks}

    @classmethod
    def gguf_tensors(cls, sizes: RWKV7Sizes) -> Iterator[GGUFTensor]:
        for tensor in super().gguf_tensors(replace(sizes, v_in_layer_0=False)):
            yield tensor
            if tensor.name.startswith("blk.0.time_mix_a"):  # llama.cpp demands a v0, v1, v2 of layer 0 with a's rank, unused
                yield tensor._replace(name=tensor.name.replace("_a", "_v"))

    @classmethod
    def gguf_change(cls, inner: str, layer: int) -> Callable[[Tensor], Tensor]:
        match inner:
            case "att.w1" | "att.w2" | "att.a1" | "att.a2" | "att.v1" | "att.v2" | "att.g1" | "att.g2":
                return lambda t: t.transpose(0, 1)
            case "att.r_k":
                return torch.flatten
        return torch.squeeze

    @classmethod
    def read_sizes(cls, tensors: Mapping[str, Tensor], n_layer: int) -> RWKV7Sizes:
        vocab_size, n_embd = tensors["emb.weight"].shape
        _, head_size = tensors["blocks.0.att.r_k"].shape
        dim_ffn, _ = tensors["blocks.0.ffn.key.weight"].shape
        v_in_layer_0 = any(f"blocks.0.att.v{i}" in tensors for i in range(3))
        ranks = {}
        for name, size in RANKS.items():
            layer = 1 if name == "v" and n_layer > 1 else 0
            has = name != "v" or layer or v_in_layer_0
            _, ranks[size] = tensors[f"blocks.{layer}.att.{name}1"].shape if has else (n_embd, 0)
        state = "blocks.0.att.time_state" in tensors
        return RWKV7Sizes(
            vocab_size, n_layer, n_embd, n_embd, dim_ffn, head_size, **ranks, v_in_layer_0=v_in_layer_0, time_state=state
        )

    @classmethod
    def default_sizes(cls, given: Mapping[str, int]) -> RWKV7Sizes:
        """With the LoRA ranks of RWKV-LM (RWKV-v7/train_temp/src/model.py)."""
        C = given["n_embd"]
        if given.get("dim_att", 0) not in (0, C):
            raise UserError(f"--dim_att {given['dim_att']}: in {cls.title} it is --n_embd, {C}; leave it out")
        sizes = {size: max(32, round(factor * C**0.5 / 32) * 32) for size, factor in zip(RANKS.values(), (2.5, 2.5, 1.7, 5))}
        sizes |= {name: size for name, size in given.items() if size}
        return RWKV7Sizes(**{**sizes, "dim_att": C, "dim_ffn": sizes.get("dim_ffn", 4 * C)})

    @classmethod
    def initial_value(
        cls, name: str, shape: tuple[int, ...], layer: int, sizes: RWKV7Sizes, generator: torch.Generator | None
    ) -> Tensor:
        """RWKV-v7/train_temp/src/model.py: RWKV_Tmix_x070, RWKV_CMix_x070."""
        C, L, N = sizes.n_embd, sizes.n_layer, sizes.head_size
        powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        channel = torch.arange(C) / C  # 0 to almost 1
        whole = torch.arange(C) / max(C - 1, 1)  # 0 to 1
        linear = whole - 0.5
        zigzag = (torch.arange(C) % N) / max((N - 1) / 2, 0.5) - 1  # in each head -1 to 1
        zigzag = zigzag * zigzag.abs()
        depth = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
        rest = 1 - layer / L  # 1 to almost 0
        match name.removeprefix("att."):
            case "x_r" | "x_w" | "x_k" | "x_v" | "x_a" | "x_g" as lerp:
                return 1 - channel ** (powers[lerp] * rest)
            case "ffn.x_k":
                return 1 - channel ** (rest**4)
            case "w0":
                return -6 + 6 * whole ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
            case "a0":
                return -0.19 + 0.3 * zigzag + 0.4 * linear
            case "v0":
                return 0.73 - 0.4 * linear
            case "k_k":
                return 0.71 - 0.1 * linear
            case "k_a":
                return torch.full(shape, 1.02)
            case "r_k":
                return torch.full(shape, -0.04)
            case "w2" | "a2" | "v2" | "g2":
                return orthogonal(shape, 0.1 * max(1.0, math.sqrt(shape[0] / shape[1])), generator)
            case "key.weight" | "receptance.weight" | "value.weight" | "ffn.key.weight" as projection:
                return orthogonal(shape, 0.1 if projection == "key.weight" else 1.0, generator)
        return torch.zeros(shape)  # output, ffn.value, the LoRAs' first matrices, the initial state
