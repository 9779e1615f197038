"""The rate of state tuning: held-out loss after `--steps` steps of 4 rows of 256 tokens of GSM8K, for each model and rate.

Adam (0.9, 0.99), gradient norm clipped at 1, a constant rate, float32, one thread; every token is trained. Held out are 32
documents of the test file. `python benchmarks/state_rate.py --rates 0.001 0.01 0.1 1`
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from rwkv_bone.doctor import cpu_name
from rwkv_bone.files.models import load_model

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
MODELS = {"tiny-rwkv6-1m": "utf-16-le", "tiny-rwkv7-gsm8k": "utf-8", "tiny-rwkv7-834k": "utf-8"}  # and the text that it reads
T, B = 256, 4


def rows(name: str, documents: int, encoding: str) -> list[bytes]:
    """The documents' bytes in pieces of at most T + 1, each piece beginning with the last byte of the one before."""
    lines = (DATA / "gsm8k" / f"{name}.jsonl").read_text().splitlines()[:documents]
    texts = (f"User: {row['question']}\n\nAssistant: {row['answer']}\0".encode(encoding) for row in map(json.loads, lines))
    return [text[i : i + T + 1] for text in texts for i in range(0, len(text) - 32, T)]


def loss_sum(model: torch.nn.Module, batch: list[bytes]) -> tuple[torch.Tensor, int]:
    """Summed cross entropy and count of the predicted tokens."""
    longest = max(map(len, batch))
    idx = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    targets = torch.tensor([[*row[1:], *[-100] * (longest - len(row))] for row in batch])
    logits, _ = model(idx[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets >= 0).sum())


def held_out(model: torch.nn.Module, encoding: str) -> float:
    batch = rows("test", 32, encoding)
    with torch.no_grad():
        sums, counts = zip(*(loss_sum(model, batch[i : i + 16]) for i in range(0, len(batch), 16)))
    return float(sum(sums)) / sum(counts)


def tuned(name: str, encoding: str, rate: float, steps: int) -> float:
    """Held-out loss after state tuning."""
    model = load_model(DATA / f"{name}.pth", torch.float32).requires_grad_(False)
    states = [model.get_parameter(state).requires_grad_() for state in model.add_initial_state()]
    optimiser = torch.optim.Adam(states, lr=rate, betas=(0.9, 0.99))
    train = rows("train", max(400, 5 * steps), encoding)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        loss, count = loss_sum(model, [train[i] for i in order[B * step : B * (step + 1)]])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(states, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return held_out(model, encoding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.001, 0.01, 0.1, 1])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.steps} steps; {cpu_name()}, torch {torch.__version__}")
    for name in args.models:
        print(f"{name}: base {held_out(load_model(DATA / f'{name}.pth', torch.float32), MODELS[name]):.4f}", flush=True)
        for rate in args.rates:
            print(f"  rate {rate:g}: {tuned(name, MODELS[name], rate, args.steps):.4f}", flush=True)


if __name__ == "__main__":
    main()
