"""How well a model predicts texts: mean negative log-likelihood per token, perplexity, bits per byte.

Each document begins at a zero state (or the model's trained initial state), so its first token is given, not predicted; an
end of document is predicted like any token, unless it is left out. The state is carried from chunk to chunk: memory does not
grow with a document's length, and the result does not depend on the chunk.

    loss            sum of -log p over the counted tokens / their number, in nats;   perplexity  exp(loss)
    bits per byte   loss / ln 2 * tokens / bytes of UTF-8, over whole documents (so the first token is charged the mean)

Counted are all tokens, or where a mask says which tokens are trained, those: then the loss is the validation loss of training.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.documents import Documents
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..models import LanguageModel
from ..models.base import select
from ..terminal import Progress
from .results import Results

LOGITS_AT_ONCE = 1 << 25  # tokens x vocabulary whose logits are held at a time

Document = tuple[np.ndarray, np.ndarray]  # tokens (T,), which of them count bool (T,)


def identity(documents: Documents) -> str:
    """What tells one data set from another: a hash of all tokens, borders and masks."""
    digest = hashlib.sha256(np.ascontiguousarray(documents.sizes).tobytes())
    for array in (documents.tokens, documents.mask):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def without_end(document: Document, end: tuple[int, ...]) -> Document:
    tokens, counted = document
    cut = len(tokens) - len(end)
    return (tokens[:cut], counted[:cut]) if cut >= 0 and tuple(tokens[cut:].tolist()) == end else document


@torch.no_grad()
def document_losses(
    model: LanguageModel, documents: Sequence[Document], chunk: int, report: Callable[[int], None] = lambda tokens: None
) -> list[tuple[float, int]]:
    """For each document the sum of its counted tokens' negative log-likelihoods (nats), and how many those are.

    `report` is called with the number of tokens that each chunk has predicted.
    """
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
    docs, device = [documents[i] for i in order], model.device
    sums = torch.zeros(len(docs), dtype=torch.float64)
    counts = torch.zeros(len(docs), dtype=torch.int64)
    at, state = 0, None
    while n := sum(len(tokens) - 1 > at for tokens, _ in docs):  # the rows that go on are the first n
        width = min(chunk, len(docs[0][0]) - 1 - at)
        idx = np.zeros((n, width), np.int64)  # what follows a document's end changes nothing before it
        targets = np.full((n, width), -100, np.int64)
        for row, (tokens, counted) in enumerate(docs[:n]):
            piece = tokens[at : at + width + 1]
            idx[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = np.where(counted[at + 1 : at + width + 1], piece[1:], -100)
        state = None if state is None else select(state, slice(n))
        hidden, state = model.hidden(torch.from_numpy(idx).to(device), state)
        sums[:n] += token_losses(model, hidden, torch.from_numpy(targets).to(device)).sum(1).cpu()
        counts[:n] += torch.from_numpy((targets >= 0).sum(1))
        report(sum(min(width, len(tokens) - 1 - at) for tokens, _ in docs[:n]))
        at += width
    found = dict(zip(order, zip(sums.tolist(), counts.tolist())))
    return [found[i] for i in range(len(documents))]


def token_losses(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods (B, T) in float64 of targets (B, T) after hidden (B, T, C); 0 where a target is -100."""
    counted = targets >= 0
    losses = []
    size = max(1, LOGITS_AT_ONCE // model.sizes.vocab_size)
    for part, wanted in zip(hidden[counted].split(size), targets[counted].split(size)):
        logits = model.head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, wanted, reduction="none").double())
    out = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    if losses:
        out[counted] = torch.cat(losses)
    return out


ITEM = {"nll": int | float, "counted": int, "tokens": int, "bytes": int | None, "masked": bool}


def measure(
    model: LanguageModel,
    documents: Documents,
    results: Results,
    tokenizer: Tokenizer | None = None,
    count_end: bool = True,
    batch_size: int = 8,
    chunk: int = 1024,
) -> None:
    """Add the losses of the documents that `results` does not hold yet.

    tokenizer   for the bytes of the text; None: they are not known, and a document's end is token 0
    count_end   whether predicting the ends of documents counts
    """
    if batch_size < 1 or chunk < 1:
        raise UserError(f"--batch_size {batch_size} and --chunk_len {chunk} must be at least 1")
    documents.check_vocabulary(model.sizes.vocab_size)
    end = tokenizer.end if tokenizer else (0,)
    todo = sorted((i for i in range(len(documents)) if i not in results.done), key=lambda i: -documents.sizes[i])
    done = documents.total_tokens - int(documents.sizes[todo].sum())  # tokens of the documents that are measured
    nats, counted = 0.0, 0
    with Progress(documents.total_tokens, done, "tokens") as progress:

        def report(predicted: int) -> None:
            progress.update(progress.done + predicted, f"loss {nats / counted:.4f}" if counted else "")

        for at in range(0, len(todo), batch_size):
            ids = todo[at : at + batch_size]
            batch = [documents[i] if count_end else without_end(documents[i], end) for i in ids]
            for i, (ids_, trained), (nll, count) in zip(ids, batch, document_losses(model, batch, chunk, report)):
                size = len(tokenizer.decode(ids_.tolist()).encode()) if tokenizer else None
                masked = not trained.all()
                results.add({"id": i, "nll": nll, "counted": count, "tokens": len(ids_), "bytes": size, "masked": bool(masked)})
                nats, counted = nats + nll, counted + count
            done += int(documents.sizes[ids].sum())  # first tokens and ends that are left out are not predicted
            progress.update(done, f"loss {nats / counted:.4f}" if counted else "")


def summary(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Loss, perplexity, bits per byte (None where bytes are not known or only some tokens count), and what they were taken of."""
    nll: list[float] = []
    counted, tokens, masked = 0, 0, False
    bytes_: int | None = 0
    for item in results:
        nll.append(item["nll"])
        counted, tokens, masked = counted + item["counted"], tokens + item["tokens"], masked or item["masked"]
        bytes_ = None if bytes_ is None or item["bytes"] is None else bytes_ + item["bytes"]
    if not counted:
        raise UserError("no token to predict: each document has at most one token, or none that is trained")
    loss = math.fsum(nll) / counted
    return {
        "documents": len(nll),
        "tokens": tokens,
        "counted": counted,
        "masked": masked,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) * tokens / bytes_ if bytes_ and not masked else None,
    }


def describe(found: dict[str, Any], count_end: bool) -> str:
    """The summary for people."""
    bits = "" if found["bits_per_byte"] is None else f", {found['bits_per_byte']:.4f} bits per byte"
    documents = "1 document" if found["documents"] == 1 else f"{found['documents']:,} documents"
    which = "trained tokens" if found["masked"] else "tokens"
    return (
        f"loss {found['loss']:.6f} nats per token, perplexity {found['perplexity']:.4f}{bits}\n"
        f"over {found['counted']:,} {which} of {documents} ({found['tokens']:,} tokens), each from a zero "
        f"state, its first token given; ends of document are {'counted' if count_end else 'left out'}"
    )
