"""How exact training in fp16 would be: activations and their gradients rounded to fp16 and to bf16, in models of some 24 layers.

    python benchmarks/fp16.py ../shared/data/tiny-rwkv6-1m.pth --encoding utf-16-le --text ../shared/data/eval_text_ascii.txt
    python benchmarks/fp16.py ../shared/data/tiny-rwkv7-gsm8k.pth --text ../shared/data/gsm8k/test.jsonl

A trained model is deepened without changing much of what it computes: each layer but the first is there several times, its
outputs divided by that number. What every embedding, norm, linear layer and block gives is rounded, and so is its gradient. The
loss is the mean over 32,768 tokens, as in a usual step. The error is that of the projections' gradients against float32.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.files.models import load_model

LAYERS, TOKENS, STEP = 24, 2048, 32768
ROUNDED = (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding)


def deepened(model: nn.Module) -> nn.Module:
    first, *others = model.blocks
    times = round((LAYERS - 1) / len(others))
    for block in others:
        for projection in (block.att.output, block.ffn.value):
            projection.weight.data /= times
    model.blocks = nn.ModuleList([first, *(copy.deepcopy(block) for block in others for _ in range(times))])
    return model


def gradients(model: nn.Module, idx: Tensor, scale: float) -> tuple[float, Tensor]:
    hidden, _ = model.hidden(idx[:, :-1])
    loss = F.cross_entropy(model.head(hidden)[0].float(), idx[0, 1:], reduction="sum")
    weights = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    found = torch.autograd.grad(loss * scale / STEP, weights)
    return loss.item() / TOKENS, torch.cat([g.flatten() for g in found]) / scale


def rounding(dtype: torch.dtype, seen: dict[str, float]) -> type[torch.autograd.Function]:
    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            seen["largest"] = max(seen["largest"], x.abs().max().item())
            return x.to(dtype).float()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            z = g.to(dtype).float()
            seen["gradients"] += g.count_nonzero().item()
            seen["vanished"] += ((z == 0) & (g != 0)).sum().item()
            return z

    return Rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--encoding", default="utf-8")
    args = parser.parse_args()
    model = deepened(load_model(args.model, torch.float32))
    idx = torch.tensor([list(args.text.read_text().encode(args.encoding)[: TOKENS + 1])])
    exact_loss, exact = gradients(model, idx, 1.0)
    print(f"{args.model.name}, {len(model.blocks)} layers, float32: loss {exact_loss:.5f}")
    for dtype, scale in ((torch.float16, 1.0), (torch.float16, 2.0**10), (torch.float16, 2.0**16), (torch.bfloat16, 1.0)):
        seen = {"largest": 0.0, "gradients": 0.0, "vanished": 0.0}
        apply = rounding(dtype, seen).apply
        hooks = [m.register_forward_hook(lambda m, x, y: apply(y)) for m in model.modules() if isinstance(m, ROUNDED)]  # noqa: B023
        hooks += [b.register_forward_hook(lambda m, x, y: (apply(y[0]), *y[1:])) for b in model.blocks]  # noqa: B023
        loss, found = gradients(model, idx, scale)
        for hook in hooks:
            hook.remove()
        off, vanished = (found - exact).norm() / exact.norm(), seen["vanished"] / seen["gradients"]
        print(f"{str(dtype)[6:]}, loss times {scale:.0f}: loss {loss:.5f}, gradients off by {off:.1e}, {vanished:.0%} vanish, "
              f"largest activation {seen['largest']:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
