"""Samples and batches: every token that can be trained is trained once, devices share the work, padding changes nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkv_bone.config import TrainConfig
from rwkv_bone.data.documents import Documents
from rwkv_bone.data.rows import Tally
from rwkv_bone.data.samples import EMPTY, BatchSampler, Samples, magic_prime, magic_slots, pack, summary_of
from rwkv_bone.errors import UserError
from rwkv_bone.training.loader import TrainingData
from tests.conftest import small_model

sizes_of_documents = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(lambda sizes: max(sizes) > 1)


def make(sizes, mask=None, gap=0, base=1000):
    """Documents whose tokens are consecutive numbers, so that each token is known wherever it appears."""
    sizes = np.array(sizes)
    tokens = np.arange(base, base + sizes.sum() + gap * len(sizes))
    return Documents(tokens, np.cumsum(sizes + gap) - sizes - gap, sizes, mask)


def epochs(documents, dataload="pad", ctx_len=512, micro_bsz=1, rank=0, world=1, seed=0, shuffle=False):
    config = TrainConfig(data_file="-", dataload=dataload, ctx_len=ctx_len, micro_bsz=micro_bsz, data_shuffle=shuffle)
    return TrainingData.of_documents(documents, config).epochs(rank, world, seed)


def batches(*args, epoch=0, **options):
    """All batches of an epoch on one device."""
    of = epochs(*args, **options)
    return [of.batch(epoch, number) for number in range(len(of))]


def predicted(samples):
    """All (input, target) pairs that have a loss."""
    rows = [samples[i] for i in range(len(samples))]
    return [(int(x), int(y)) for row in rows for x, y in zip(row.idx, row.targets) if y != -100]


def wanted_pairs(documents, limit=None):
    """(token, its successor) for all documents, of each the first `limit`."""
    return [pair for i in range(len(documents)) for pair in list(zip(*[documents[i][0][k:] for k in (0, 1)]))[:limit]]


@given(sizes_of_documents, st.integers(1, 9))
def test_chunk_and_pack_predict_every_token_but_a_documents_first_exactly_once(sizes, ctx_len):
    documents = make(sizes)
    for dataload in ("chunk", "pack"):
        samples = Samples(documents, dataload, ctx_len)
        assert sorted(predicted(samples)) == wanted_pairs(documents)
        assert samples.cut == 0 and samples.tokens.sum() == samples.trained.sum() == len(wanted_pairs(documents))
        assert max(samples.lengths) <= ctx_len
        assert samples.too_short == sum(size < 2 for size in sizes)


@given(sizes_of_documents, st.integers(1, 9))
def test_pad_and_only_hold_each_document_cut_to_ctx_len(sizes, ctx_len):
    documents = make(sizes)
    for dataload in ("pad", "only"):
        samples = Samples(documents, dataload, ctx_len)
        assert predicted(samples) == wanted_pairs(documents, ctx_len)
        assert len(samples) == sum(size > 1 for size in sizes)
        assert samples.cut == len(wanted_pairs(documents)) - len(wanted_pairs(documents, ctx_len))


@given(sizes_of_documents, st.integers(1, 9), st.data())
def test_only_masked_in_tokens_are_targets(sizes, ctx_len, data):
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=sum(sizes), max_size=sum(sizes))), np.uint8)
    for dataload in ("chunk", "pack", "pad"):
        allowed = {1000 + i for i in np.flatnonzero(mask)}
        wanted = [pair for pair in predicted(Samples(make(sizes), dataload, ctx_len)) if pair[1] in allowed]
        if not wanted:
            with pytest.raises(UserError, match="nothing to train, the mask leaves out"):
                Samples(make(sizes, mask), dataload, ctx_len)
            continue
        samples = Samples(make(sizes, mask), dataload, ctx_len)
        assert predicted(samples) == wanted
        assert samples.trained.tolist() == [int((samples[i].targets != -100).sum()) for i in range(len(samples))]


@given(sizes_of_documents, st.integers(1, 30))
def test_packed_rows_have_a_separator_before_each_piece_but_the_first(sizes, ctx_len):
    seen = 0
    for batch in batches(make(sizes), "pack", ctx_len, micro_bsz=3):
        for idx, targets, reset in zip(batch["idx"], batch["targets"], batch["reset"]):
            firsts = reset.nonzero().flatten().tolist()
            ends = [*(first - 1 for first in firsts[1:]), None]
            assert firsts[0] == 0 and all(idx[end] == 0 and targets[end] == -100 for end in ends[:-1])
            for first, end in zip(firsts, ends):
                piece = idx[first:end]
                piece = piece[piece != 0]  # the last may be followed by padding
                assert (piece.diff() == 1).all() and (targets[first:end][: len(piece)] == piece + 1).all()
                seen += len(piece)
        assert batch["tokens"] == (batch["targets"] != -100).sum()
    assert seen == len(wanted_pairs(make(sizes)))


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_packed_rows_fit_and_no_two_could_be_one(lengths, ctx_len):
    rows = pack(np.array(lengths, np.int64), ctx_len)
    n_rows = len(set(rows.tolist()))
    assert set(rows.tolist()) == set(range(n_rows))
    used = [sum(n + 1 for n, row in zip(lengths, rows) if row == k) - 1 for k in range(n_rows)]
    assert all(0 < slots <= ctx_len for slots in used)
    assert n_rows < 2 or sum(sorted(used)[:2]) + 1 > ctx_len, "two rows would have fitted into one"


# --- get: RWKV-LM's order


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, n))


@given(st.integers(3, 400), st.integers(1, 9))
def test_the_magic_prime_is_the_largest_that_fits(slots, ctx_len):
    wanted = max(p for p in range(2, slots) if p % 3 == 2 and is_prime(p))
    assert magic_prime(slots * ctx_len, ctx_len) == wanted == magic_prime(slots * ctx_len + ctx_len - 1, ctx_len)


def test_magic_primes_that_others_published():
    assert magic_prime(1498226207, 512) == 2926181  # minipile, in RWKV-LM's demo scripts
    assert magic_prime(200499, 4096) == 47


@given(st.integers(3, 300))
def test_an_epoch_of_get_meets_every_slot_once_in_rwkv_lms_order(slots):
    P = magic_prime(slots * 4, 4)
    found = magic_slots(slots * 4, 4).tolist()
    assert found == [int(P * ((math.sqrt(5) - 1) / 2)) * i**3 % P for i in range(1, P + 1)]
    assert sorted(found) == list(range(P))


def test_large_primes_do_not_overflow():
    found = magic_slots(2926182 * 512 + 600, 512)
    P = 2926181
    for i in (1, 2, 1000003, P - 1, P):
        assert found[i - 1] == int(P * ((math.sqrt(5) - 1) / 2)) * i**3 % P


def test_get_reads_slices_across_documents_and_obeys_the_mask():
    mask = np.ones(60, np.uint8)
    mask[10:20] = 0
    documents = make([7, 30, 23], mask)
    found = batches(documents, "get", 5, micro_bsz=2, shuffle=True)
    rows = [row for batch in found for row in batch["idx"].tolist()]
    assert rows == [[1000 + 5 * slot + k for k in range(5)] for slot in magic_slots(60, 5)], "shuffling is not for get"
    targets = {t for batch in found for t in batch["targets"].flatten().tolist()}
    assert targets == {-100, *range(1001, 1010), *range(1020, 1056)}
    assert Samples(documents, "get", 5).cut == 59 - 55


def test_devices_share_gets_samples_as_rwkv_lm_does():
    documents, world, micro_bsz = make([120]), 2, 2
    for rank in range(world):
        mine = batches(documents, "get", 4, micro_bsz, rank, world)
        found = [row[0] for batch in mine for row in batch["idx"].tolist() if row[0]]
        numbers = range(1 + rank, 29 + 1, world)  # i = 1 + index * world + rank
        assert found == [1000 + 4 * magic_slots(120, 4)[i - 1] for i in numbers]


# --- which samples make a batch

layouts = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))


@given(layouts, st.booleans())
def test_devices_together_see_every_sample_once_in_equally_many_batches(layout, shuffle):
    n, micro_bsz, world, epoch = layout
    samplers = [BatchSampler(n, micro_bsz, rank, world, 7, shuffle) for rank in range(world)]
    per_device = [[sampler.batch(epoch, i) for i in range(sampler.batches_per_epoch)] for sampler in samplers]
    samples = [i for batches in per_device for batch in batches for i in batch]
    assert sorted(i for i in samples if i != EMPTY) == list(range(n))
    assert samples.count(EMPTY) < world
    shapes = [[len(batch) for batch in batches] for batches in per_device]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(size == micro_bsz for size in shapes[0][:-1]) and 0 < shapes[0][-1] <= micro_bsz


@given(layouts)
def test_any_batch_is_reached_at_once(layout):
    n, micro_bsz, world, epoch = layout
    sampler, fresh = (BatchSampler(n, micro_bsz, 0, world, 3) for _ in range(2))
    whole = [sampler.batch(epoch, number) for number in range(sampler.batches_per_epoch)]
    assert [fresh.batch(epoch, number) for number in reversed(range(len(whole)))] == whole[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {(seed, epoch): tuple(BatchSampler(50, 1, seed=seed).order(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9 and all(sorted(order) == list(range(50)) for order in orders.values())
    assert BatchSampler(50, 1, seed=1).order(2).tolist() == list(orders[1, 2])
    assert BatchSampler(5, 1, shuffle=False).order(3).tolist() == [0, 1, 2, 3, 4]


def test_the_order_stays_what_it_was():
    """Fixed for good: a run that is resumed under another numpy or another version of this package must meet the same samples."""
    assert BatchSampler(10, 1, seed=5).order(1).tolist() == [3, 0, 1, 7, 6, 2, 4, 5, 9, 8]


# --- batches


def test_rows_are_padded_to_the_longest_rounded_up():
    documents = make([4, 20, 3, 90])
    found = batches(documents, "pad", 64, 2)
    assert [batch["idx"].shape for batch in found] == [(2, 32), (2, 64)]
    row, targets = found[0]["idx"][0], found[0]["targets"][0]
    assert row.tolist() == [1000, 1001, 1002] + [0] * 29
    assert targets.tolist() == [1001, 1002, 1003] + [-100] * 29
    assert found[0]["tokens"] == 3 + 19 and found[1]["tokens"] == 2 + 64
    assert set(found[0]) == {"idx", "targets", "tokens"}
    assert all(t.dtype == torch.int64 for t in found[0].values())
    assert [b["idx"].shape[1] for b in batches(documents, "pad", 70, 2)] == [32, 70], "never beyond ctx_len"
    assert [b["idx"].shape for b in batches(documents, "only", 64, 1)] == [(1, 3), (1, 19), (1, 2), (1, 64)]


def test_token_0_inside_a_document_is_a_token_like_others():
    documents = Documents(np.array([5, 0, 0, 7, 0]), [0], [5])
    batch = batches(documents, "pad", 16)[0]
    assert batch["targets"][0].tolist() == [0, 0, 7, 0] + [-100] * 12 and batch["tokens"] == 4


@given(sizes_of_documents, st.sampled_from(["pad", "chunk", "pack", "only"]), st.integers(1, 3), st.integers(1, 3))
def test_the_summary_counts_what_the_batches_hold(sizes, dataload, micro_bsz, world):
    micro_bsz = 1 if dataload == "only" else micro_bsz
    mask = (np.arange(sum(sizes)) % 3 > 0).astype(np.uint8)
    documents = make(sizes, mask)
    try:
        per_device = [batches(documents, dataload, 7, micro_bsz, rank, world, shuffle=False) for rank in range(world)]
    except UserError as error:
        assert "nothing to train" in str(error)
        return
    first = epochs(documents, dataload, 7, micro_bsz, 0, world)
    summary = summary_of(first.samples, first.sampler, 1 if dataload == "only" else 32)
    found = [batch for device in per_device for batch in device]
    assert summary.slots == sum(batch["idx"].numel() for batch in found)
    assert summary.inputs == sum(int(batch["tokens"]) for batch in found)
    assert summary.trained == sum(int((batch["targets"] != -100).sum()) for batch in found)
    assert summary.batches == len(first) and summary.documents == len(sizes) and summary.longest == max(sizes)
    assert summary.tokens == sum(sizes) and summary.inputs + summary.cut + sum(size > 0 for size in sizes) == sum(sizes)
    assert 0 <= summary.padding < 1


def test_the_summary_for_people():
    mask = np.ones(3 + 90 + 1, np.uint8)
    mask[:3] = 0
    documents = make([3, 90, 1], mask)
    documents.tally = Tally(rows=7, left_out={"empty answers": [4, "d, line 2"]}, unread={"source": 7})
    samples = Samples(documents, "pad", 64)
    lines = summary_of(samples, BatchSampler(len(samples), 2, shuffle=False)).lines()
    assert lines == [
        "data: 3 documents, 94 tokens, longest 90; left out: 1 document of a single token",
        "warning: 4 of 7 rows left out: 4 empty answers (first: d, line 2)",
        "fields not read: source",
        "2 samples (--dataload pad), 1 batch a device, padding 48.4%, cut 25 tokens of 1 document (26.6%)",
        "64 tokens trained, 97.0% of the 66 read",
        "warning: 27% of the tokens are cut off: --ctx_len 90 takes the longest whole, --dataload chunk cuts none",
        "1 sample with no trained token (their answers lie beyond --ctx_len?)",
    ]


# --- which micro batches make a step


def run_of(n, **given):
    config = TrainConfig(data_file="-", ctx_len=8, dataload="pad", **given)
    return TrainingData.of_documents(make([5] * n), config)


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 9), st.integers(1, 3))
def test_a_capped_epoch_goes_on_where_the_last_one_ended(n, micro, many, world, cap, count):
    data = run_of(n, micro_bsz=micro, accumulate_grad_batches=many, epoch_steps=cap, epoch_count=count)
    per_epoch = data.steps_per_epoch(world)
    whole = math.ceil(math.ceil(math.ceil(n / world) / micro) / many)
    assert per_epoch == (min(cap, whole) if cap else whole)
    places = [place for step in range(per_epoch * count) for place in data.places(step, world)]
    of_a_pass = data.micro_batches_per_epoch(world)
    assert places == [divmod(i, of_a_pass) for i in range(len(places))]  # none left out, none twice
    seen = {i for rank in range(world) for place in places for i in data.epochs(rank, world, 3).sampler.batch(*place)}
    unseen = n - len(seen - {EMPTY})
    assert unseen == 0 if len(places) >= of_a_pass else abs(data.unseen(world) - unseen) < world


def test_get_with_capped_epochs_reads_new_slices_in_each():
    """RWKV-LM's epoch of epoch_steps steps is a piece of one long order: N x E steps read N x E x micro_bsz different slices."""
    config = TrainConfig(data_file="-", dataload="get", ctx_len=4, micro_bsz=2, epoch_steps=3, epoch_count=4)
    data = TrainingData.of_documents(make([300]), config)
    rows = [row[0] for step in data.steps(0, 1, 0, 0, 12) for micro in step for row in micro["idx"].tolist()]
    assert rows == [1000 + 4 * slot for slot in magic_slots(300, 4)[:24]] and len(set(rows)) == 24
    (line,) = [line for line in data.describe(1) if "--epoch_steps" in line]
    assert f"{len(data.samples) - 24:,}" in line


def test_an_epoch_of_rwkv_peft_has_exactly_epoch_steps_steps():
    data = run_of(6, micro_bsz=2, epoch_steps=7, repeat_data=True)
    assert data.steps_per_epoch(1) == 7
    assert [data.places(step, 1) for step in range(7)] == [[divmod(i, 3)] for i in range(7)]
    assert run_of(6, micro_bsz=2, epoch_steps=7).steps_per_epoch(1) == 3


def test_steps_from_any_step_on_are_those_of_the_whole_run():
    data = run_of(9, micro_bsz=2, accumulate_grad_batches=2, epoch_count=3)
    whole = list(data.steps(0, 1, 5, 0, 9))
    for a, b in zip(whole[4:], data.steps(0, 1, 5, 4, 9), strict=True):
        assert all(torch.equal(one[name], two[name]) for one, two in zip(a, b, strict=True) for name in one)


@pytest.mark.parametrize("options, message", [
    ({"dataload": "random"}, "--dataload random is not known; choose from pad, only, chunk, pack, get"),
    ({"dataload": "only", "micro_bsz": 2}, "one document a batch, not --micro_bsz 2"),
    ({"dataload": "get", "ctx_len": 10}, "needs 3 x ctx_len tokens, got 29 for ctx_len 10"),
    ({"ctx_len": 0}, "--ctx_len"),
    ({"micro_bsz": 0}, "--micro_bsz"),
])  # fmt: skip
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        batches(make([29]), **options)


def test_documents_with_nothing_to_predict_are_an_error():
    with pytest.raises(UserError, match="no document has two tokens"):
        batches(make([1, 0, 1]))


# --- with a model: the loss is that of each document alone


def summed_losses(model, data):
    """{target token's place: its loss}: in float64, every document's tokens being distinct."""
    found = {}
    for batch in data:
        hidden, _ = model.hidden(batch["idx"], reset=batch.get("reset"))
        losses = torch.nn.functional.cross_entropy(
            model.head(hidden).transpose(1, 2), batch["targets"], ignore_index=-100, reduction="none"
        )
        where = batch["targets"] != -100
        found |= dict(zip(batch["targets"][where].tolist(), losses[where].tolist()))
    return found


@pytest.mark.parametrize("sizes", [[5, 12, 2, 7, 3, 9], [2, 2, 2, 17, 16]])
def test_packed_and_padded_tokens_have_the_loss_they_have_alone(sizes):
    model = small_model(vocab_size=100)
    documents = make(sizes, base=1)
    with torch.no_grad():
        alone = summed_losses(model, batches(documents, "only", 16, 1))
        for dataload in ("pad", "pack"):
            together = summed_losses(model, batches(documents, dataload, 16, 3))
            assert together.keys() == alone.keys()
            assert max(abs(together[k] - alone[k]) for k in alone) < 1e-10
