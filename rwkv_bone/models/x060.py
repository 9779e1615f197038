"""RWKV-6 "Finch" (x060), arXiv 2404.05892: token shift with data-dependent lerps, WKV6 time mixing, channel mixing.

The parameters carry the names, shapes and order of BlinkDL's `.pth` files, so `state_dict()` is such a file.
Sizes: B batch, T time, C n_embd, A dim_att = H * N (H heads of size N), F dim_ffn, M mix LoRA, D decay LoRA, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..ops.recompute import recomputed, remade
from ..ops.wkv6 import wkv6

LN_X_EPS = 1e-5 * 8**2  # RWKV-LM: 1e-5 * head_size_divisor^2, with divisor 8 in every release
LERPS = "wkvrg"  # the order of the five data-dependent lerps in time_maa_w2


class LayerState(NamedTuple):
    """What one block remembers: the last inputs of its two mixers, and the WKV state."""

    att_shift: Tensor  # (B, C)
    wkv: Tensor  # (B, H, N, N), indexed [key, value], at least float32
    ffn_shift: Tensor  # (B, C)


State = list[LayerState]


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    d_mix_lora: int = 32
    d_decay_lora: int = 64
    time_state: bool = False  # a trained initial state in every layer (state tuning)

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    @classmethod
    def new(cls, vocab_size: int, n_layer: int, n_embd: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 64):
        """A new model's sizes, with RWKV-LM's defaults for what is not given (0)."""
        dim_att = dim_att or n_embd
        dim_ffn = dim_ffn or int(n_embd * 3.5) // 32 * 32
        for name, size in dict(vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, head_size=head_size).items():
            if size < 1:
                raise UserError(f"a new model needs --{name} of at least 1, not {size}")
        if dim_ffn < 1:
            raise UserError(f"--n_embd {n_embd} is too small for a default channel-mix size; give --dim_ffn")
        if dim_att % head_size:
            raise UserError(f"head size {head_size} does not divide dim_att {dim_att}; give another --head_size_a")
        wide = n_embd >= 4096  # the World 7B and 14B
        return cls(vocab_size, n_layer, n_embd, dim_att, dim_ffn, head_size, 64 if wide else 32, 128 if wide else 64)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], name: str = "the file") -> "ModelConfig":
        """Read every size from the tensors' shapes; raise UserError unless they are an RWKV-6 model, whole and consistent."""
        version = checkpoint_version(tensors)
        if version != 6:
            what = f"an RWKV-{version} model" if version else "not an RWKV model (no blocks.0.att tensors of one)"
            raise UserError(f"{name}: wanted an RWKV-6 (x060) .pth, this is {what}")
        layers = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))}
        try:
            vocab_size, n_embd = tensors["emb.weight"].shape
            att = "blocks.0.att."
            dim_att, _ = tensors[att + "receptance.weight"].shape
            _, head_size = tensors[att + "time_faaaa"].shape
            _, d_mix_lora, _ = tensors[att + "time_maa_w2"].shape
            d_decay_lora, _ = tensors[att + "time_decay_w2"].shape
            dim_ffn, _ = tensors["blocks.0.ffn.key.weight"].shape
        except KeyError as error:
            raise UserError(f"{name}: an RWKV-6 model without {error.args[0]}; the file is damaged or cut") from None
        except ValueError:
            raise UserError(f"{name}: tensors of the wrong rank for an RWKV-6 model; the file is damaged") from None
        if dim_att % head_size:
            raise UserError(f"{name}: head size {head_size} does not divide dim_att {dim_att}; the file is damaged")
        config = cls(
            vocab_size, len(layers), n_embd, dim_att, dim_ffn, head_size, d_mix_lora, d_decay_lora,
            time_state=att + "time_state" in tensors,
        )  # fmt: skip
        config.check(tensors, name)
        return config

    def check(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Compare names and shapes with what the sizes demand: a file is used whole or not at all."""
        wanted = self.shapes()
        missing = [key for key in wanted if key not in tensors]
        unknown = [key for key in tensors if key not in wanted]
        if missing or unknown:
            parts = [
                f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("missing", missing), ("unknown", unknown))
                if keys
            ]
            raise UserError(f"{name}: not a whole RWKV-6 model of {self.n_layer} layers: {' and '.join(parts)} tensors")
        for key, shape in wanted.items():
            if tuple(tensors[key].shape) != shape:
                got = tuple(tensors[key].shape)
                raise UserError(f"{name}: {key} is {got}, the other tensors of the file ask for {shape}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the `.pth`, in its order."""
        with torch.device("meta"):
            return {key: tuple(value.shape) for key, value in RWKV(self).state_dict().items()}


def checkpoint_version(tensors: Mapping[str, Tensor]) -> int:
    """The RWKV version that a state dict's names tell (4 to 7), or 0 if they are no RWKV's."""
    att = {key.split(".att.", 1)[1] for key in tensors if re.match(r"blocks\.\d+\.att\.", key)}
    if "r_k" in att:
        return 7
    if "time_maa_x" in att or "time_maa_w1" in att:
        return 6
    if "time_decay" in att:
        return 5 if any(name.startswith("ln_x") for name in att) else 4
    return 0


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes as long as a small addition even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def shift_difference(x: Tensor, last: Tensor | None, reset: Tensor | None) -> Tensor:
    """x one step earlier, less x. `last` (B, C), or zeros, comes first; zeros where `reset` (B, T) marks a document's start."""
    first = torch.zeros_like(x[:, :1]) if last is None else cast(last, x.dtype).unsqueeze(1)
    previous = torch.cat([first, x[:, :-1]], 1) if x.shape[1] > 1 else first
    if reset is not None:
        previous = previous.masked_fill(reset.unsqueeze(-1), 0)
    return previous - x if previous is first else previous.sub_(x)  # not in place: `first` is the state's


class TimeMix(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        M, D = config.d_mix_lora, config.d_decay_lora
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        for name in LERPS:
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * M))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, M, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, D))
        self.time_decay_w2 = nn.Parameter(torch.empty(D, A))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        if config.time_state:
            self.time_state = nn.Parameter(torch.empty(H, N, N))  # [value, key], as the community stores it
        self.receptance = nn.Linear(C, A, bias=False)
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.output = nn.Linear(A, C, bias=False)
        self.gate = nn.Linear(C, A, bias=False)
        self.ln_x = nn.GroupNorm(H, A, eps=LN_X_EPS)

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
        self, x: Tensor, shift: Tensor | None, wkv: Tensor | None, reset: Tensor | None = None, op: str = "auto"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C), wkv (B, H, N, N) -> output (B, T, C), new shift, new wkv."""
        B, T, _ = x.shape
        u = self.time_faaaa
        H, N = u.shape
        forget = None
        if reset is not None:
            # the separator slot before a document forgets everything and adds nothing, so its successor sees zeros
            forget = F.pad(reset[:, 1:], (0, 1)).view(B, T, 1, 1)
            if wkv is not None:  # its separator was the last slot of the chunk before
                wkv = wkv.masked_fill(reset[:, 0].view(B, 1, 1, 1), 0)
        with remade(self.lerps, x, shift, reset, trained=self.parameters(recurse=False)) as (xw, xk, xv, xr, xg):
            r = self.receptance(xr).view(B, T, H, N)
            k = self.key(xk).view(B, T, H, N)
            v = self.value(xv).view(B, T, H, N)
            g = self.gate(xg)  # (B, T, A)
            h = torch.tanh(xw @ self.time_decay_w1)  # (B, T, D)
        if forget is not None:
            k = k.masked_fill(forget, 0)
        if wkv is None and hasattr(self, "time_state"):
            wkv = self.time_state.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)).expand(B, H, N, N).contiguous()
        with remade(self.log_decay, h, forget, trained=self.parameters(recurse=False)) as (log_w,):
            y, wkv = wkv6(r, k, v, log_w, u, wkv, op)
        with remade(self.gated, y, g, trained=self.ln_x.parameters()) as (gated,):
            return self.output(gated), x.select(1, -1), wkv


class ChannelMix(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_ = config.n_embd, config.dim_ffn
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, F_, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(F_, C, bias=False)

    def lerps(self, x: Tensor, shift: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs of key and receptance, (B, T, C)."""
        dx = shift_difference(x, shift, reset)
        return torch.addcmul(x, dx, self.time_maa_k), torch.addcmul(x, dx, self.time_maa_r)

    def forward(self, x: Tensor, shift: Tensor | None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) -> output (B, T, C), new shift."""
        with remade(self.lerps, x, shift, reset, trained=(self.time_maa_k, self.time_maa_r)) as (xk, xr):
            k = self.key(xk)  # (B, T, F)
            r = self.receptance(xr)
        with remade(squared_relu, k) as (k,):
            v = self.value(k)
        return torch.sigmoid(r) * v, x.select(1, -1)


class SquaredRelu(torch.autograd.Function):
    """relu(x)^2 with one temporary of x's size in each direction, where autograd's own takes three."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(2).mul_(g)


def squared_relu(x: Tensor) -> tuple[Tensor]:
    return (SquaredRelu.apply(x) if torch.is_grad_enabled() else torch.relu(x).square_(),)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: LayerState | None, reset: Tensor | None = None, op: str = "auto"
    ) -> tuple[Tensor, LayerState]:
        if self.first:
            x = self.ln0(x)
        shift, wkv, ffn_shift = state or (None, None, None)
        delta, shift, wkv = self.att(self.ln1(x), shift, wkv, reset, op)
        x = x + delta
        delta, ffn_shift = self.ffn(self.ln2(x), ffn_shift, reset)
        return x + delta, LayerState(shift, wkv, ffn_shift)


def recomputed_block(block: Callable, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
    """A block of which autograd keeps the inputs alone."""

    def flat(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = block(x, LayerState(*state) if state else None)
        return x, *new

    x, *new = recomputed(flat, x, *(state or ()))
    return x, LayerState(*new)


class RWKV(nn.Module):
    """An RWKV-6 language model. `op` picks the WKV6 kernel (ops/wkv6.py); `grad_cp` recomputes blocks in backward."""

    fingerprint: str  # what tells the loaded weights from others; see checkpoint.py

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.op = "auto"
        self.grad_cp = False
        self.file_dtype = torch.bfloat16  # of the .pth that the model came from, or will become
        # not filled: a normal distribution on the meta device would import half of torch, for seconds
        self.emb = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) after each token of idx (B, T), and the state to go on from; see `hidden`."""
        x, state = self.hidden(idx, state, reset)
        return self.head(x), state

    def hidden(self, idx: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """What the head is applied to, (B, T, C), and the new state.

        idx (B, T) int64, T >= 1. A sequence in chunks, each with the state of the one before, gives what the whole gives.
        reset (B, T) bool marks the first token of each packed document; the slot before it is a separator.
        """
        x = self.emb(idx)
        new_state = []
        for layer, block in enumerate(self.blocks):
            run = partial(block, reset=reset, op=self.op)
            if self.grad_cp and torch.is_grad_enabled():
                run = partial(recomputed_block, run)
            x, layer_state = run(x, state[layer] if state is not None else None)
            new_state.append(layer_state)
        return self.ln_out(x), new_state

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> "RWKV":
        """Fill every parameter as RWKV-LM's x060 does for a new model."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, tensor in initial_values(self.config, generator):
            self.get_parameter(name).copy_(tensor)
        return self


def initial_values(config: ModelConfig, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
    """RWKV-LM's initial value of each parameter (RWKV-v5/src/model.py: RWKV_Tmix_x060, RWKV_CMix_x060, generate_init_weight)."""
    C, A, L = config.n_embd, config.dim_att, config.n_layer
    gains = {"att.key": 0.1, "att.gate": 0.1, "att.output": 0.0, "ffn.value": 0.0, "ffn.receptance": 0.0}
    channel = torch.arange(C) / C  # 0 to almost 1
    att_channel = torch.arange(A) / max(A - 1, 1)  # 0 to 1

    for key, shape in config.shapes().items():
        layer = int(key.split(".")[1]) if key.startswith("blocks.") else 0
        name = key.split(".", 2)[2] if key.startswith("blocks.") else key
        depth = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
        power = channel ** (1 - layer / L)
        match name:
            case "emb.weight":
                value = torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
            case "head.weight":
                gain = 0.5 * max(1.0, math.sqrt(config.vocab_size / C))
                value = nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)
            case "att.ln_x.weight":
                value = torch.full(shape, ((1 + layer) / L) ** 0.7)
            case "att.time_maa_v":
                value = 1 - (power + 0.3 * depth)
            case "att.time_maa_r" | "att.time_maa_g":
                value = 1 - power.sqrt()
            case "att.time_decay":
                value = -6 + 5 * att_channel ** (0.7 + 1.3 * depth)
            case "att.time_faaaa":
                value = depth * (1 - att_channel) + ((torch.arange(A) + 1) % 3 - 1) * 0.1
            case "att.time_maa_w2" | "att.time_decay_w2":
                value = torch.empty(shape).uniform_(-0.01, 0.01, generator=generator)
            case "att.time_maa_w1" | "att.time_decay_w1" | "att.time_state":
                value = torch.zeros(shape)
            case _ if ".time_maa_" in name:
                value = 1 - power
            case _ if name.endswith(".bias"):
                value = torch.zeros(shape)
            case _ if "ln" in name:
                value = torch.ones(shape)
            case _:
                gain = gains.get(name.removesuffix(".weight"), 1.0)
                value = nn.init.orthogonal_(torch.empty(shape), gain, generator=generator) if gain else torch.zeros(shape)
        yield key, value.view(shape)
