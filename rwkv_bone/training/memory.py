"""How much memory a training step will take, by part: an estimate from sizes alone, printed before the first step."""

from ..models.x060 import RWKV, ModelConfig
from .loss import CHUNK_BYTES


def bytes_of(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def estimate(model: RWKV, config: ModelConfig, tokens: int, sequences: int, grad_cp: bool) -> dict[str, int]:
    """Bytes by part for micro batches of `sequences` rows that hold `tokens` tokens together.

    Activations are counted from the tensors that autograd keeps in one block: inputs of the projections and of what stands
    between them, in the base's dtype (WKV6's decay in float32).
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    width = model.emb.weight.element_size()
    masters = sum(4 * p.numel() for p in trained if p.element_size() < 4)
    C, A, F = config.n_embd, config.dim_att, config.dim_ffn
    M, D = config.d_mix_lora, config.d_decay_lora
    # time mix: x, ln, shift difference, 5 lerps and their deltas, r k v g y, ln_x, gate; channel mix: k before and after
    block = tokens * (width * (19 * C + 10 * A + 3 * F + 10 * M + 2 * D) + 12 * A)
    state = sequences * config.n_head * config.head_size**2 * 4
    border = tokens * width * C + 2 * state
    activations = config.n_layer * border + block if grad_cp else config.n_layer * (block + 2 * state)
    head = min(CHUNK_BYTES, 4 * tokens * config.vocab_size) * 3 + 2 * tokens * width * C
    return {
        "base weights": bytes_of(frozen),
        "trained weights": bytes_of(trained) + masters,
        "gradients": bytes_of(trained),
        "optimiser": sum(8 * p.numel() for p in trained),
        "activations": activations,
        "head and loss": head,
    }


def in_words(size: float) -> str:
    """A number of bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
