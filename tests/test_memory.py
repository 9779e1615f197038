"""What training is said to take before it begins is what it takes; and what is promised not to be kept is not."""

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.config import TrainConfig
from rwkv_bone.files.models import load_model
from rwkv_bone.models import MODELS, LanguageModel
from rwkv_bone.peft import METHODS, inject
from rwkv_bone.peft.quant import quantise_model
from rwkv_bone.training import loss, memory
from rwkv_bone.training.infctx import backward_in_chunks
from rwkv_bone.training.loss import cross_entropy_sum
from rwkv_bone.training.memory import bytes_of, estimate, table_rows
from rwkv_bone.training.optimiser import make_optimiser
from tests.hf_models import make_folder
from tests.watch import peak_bytes


def config(**given) -> TrainConfig:
    return TrainConfig(data_file="none", lr_init=1e-4, **given)


def training(model: LanguageModel, B: int, T: int, config: TrainConfig):
    """The first two steps: the optimiser's state is made at the end of the first."""
    idx = torch.randint(model.sizes.vocab_size, (B, T + 1))
    micro = {"idx": idx[:, :-1], "targets": idx[:, 1:]}
    model = model.with_execution(grad_cp=config.grad_cp)
    reset = (torch.arange(T) % (T // 2) == 0).repeat(B, 1) if config.dataload == "pack" else None

    def forward(piece, state=None):
        hidden, state = model.hidden(piece["idx"], state, reset)
        return cross_entropy_sum(hidden, model.head.weight, piece["targets"], config.wants_l2wrap(model)), state

    def steps():
        optimiser = make_optimiser(model, config)
        for _ in range(2):
            for _ in range(config.accumulate_grad_batches):
                if config.train_type == "infctx":
                    backward_in_chunks(forward, micro, config.chunk_ctx, config.truncate, lambda loss, last: loss.backward())
                else:
                    forward(micro)[0].backward()
            optimiser.step()
            optimiser.zero_grad()

    return steps


CASES = {
    "bone": ({}, {}),
    "bone, blocks recomputed": ({}, {"grad_cp": True}),
    "lora": ({}, {"peft": "lora", "peft_options": {"r": 8}}),
    "dora, accumulated": ({}, {"peft": "dora", "peft_options": {"r": 8}, "accumulate_grad_batches": 2}),
    "bf16": ({"dtype": torch.bfloat16}, {}),
    "bf16, blocks recomputed": ({"dtype": torch.bfloat16}, {"grad_cp": True}),
    "a large head": ({"vocab_size": 8192, "n_layer": 2}, {}),
    "the whole model": ({"vocab_size": 2048}, {"peft": "none"}),
    "the whole model in bf16": ({"vocab_size": 2048, "dtype": torch.bfloat16}, {"peft": "none"}),
    "int8": ({}, {"quant": "int8"}),
    "packed": ({}, {"dataload": "pack"}),
    "chunks": ({"T": 256}, {"train_type": "infctx", "chunk_ctx": 64}),
}


def new_model(version: str, **sizes) -> LanguageModel:
    kind = MODELS[version]
    return kind(kind.new_sizes(**sizes)).initialise(0)


CASES_OF = {"x070": CASES, "x060": ("bone", "the whole model")}


@pytest.mark.parametrize(("version", "name"), [(version, name) for version, names in CASES_OF.items() for name in names])
def test_the_estimate_is_within_10_percent_of_what_a_step_takes(version, name):
    sizes, flags = CASES[name]
    sizes = {"vocab_size": 256, "n_layer": 5, "n_embd": 128, "B": 2, "T": 128, "dtype": torch.float32, **sizes}
    B, T, dtype = (sizes.pop(key) for key in ("B", "T", "dtype"))
    compare_with_a_step(new_model(version, **sizes).to(dtype), B, T, config(**flags))


HF_CASES = {
    "bone, packed, blocks recomputed": (torch.float32, {"peft_options": {"r": 32}, "dataload": "pack", "grad_cp": True}),
    "lora in bf16": (torch.bfloat16, {"peft": "lora", "peft_options": {"r": 8}}),
    "the whole model in bf16, packed": (torch.bfloat16, {"peft": "none", "dataload": "pack"}),
}


@pytest.mark.parametrize("name", HF_CASES)
def test_so_it_is_of_a_llama(name, tmp_path):
    """Whose attention takes a mask for packed documents, and none for others."""
    pytest.importorskip("transformers", reason="the extra hf")
    dtype, flags = HF_CASES[name]
    make_folder(tmp_path, vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=5, head_dim=32)
    compare_with_a_step(load_model(tmp_path, dtype), 2, 512, config(**flags))


def compare_with_a_step(model: LanguageModel, B: int, T: int, given: TrainConfig) -> None:
    if given.quant != "none":
        quantise_model(model, given.quant)
    if given.peft != "none":
        method = METHODS[given.peft]
        inject(model, method, method.Config(given.peft_options.get("r", 8)))
    else:
        model.requires_grad_(True)
    parts = estimate(model, B, T, given)
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    model_itself = bytes_of([*model.parameters(), *model.buffers()])
    measured = peak_bytes(training(model, B, T, given))
    assert sum(parts.values()) - model_itself == pytest.approx(measured, rel=0.1)
    assert parts["base weights"] == bytes_of(frozen)


@pytest.mark.parametrize("peft", ["none", "bone", "dora"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_operations_without_values_take_what_torchs_own_rules_say(version, peft, monkeypatch):
    kind = MODELS[version]
    for dtype, flags in ((torch.float32, {}), (torch.bfloat16, {"train_type": "infctx", "chunk_ctx": 32})):
        model = kind(kind.new_sizes(vocab_size=64, n_layer=1, n_embd=64)).to(dtype)
        if peft != "none":
            inject(model, METHODS[peft], METHODS[peft].Config(8))
        ours = memory.step_bytes(model, 2, 64, config(**flags), 1)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "rule", lambda op: op)
            assert ours == pytest.approx(memory.step_bytes(model, 2, 64, config(**flags), 1), rel=0.01)


@pytest.mark.parametrize("flags", [{}, {"train_type": "infctx", "chunk_ctx": 32}])
def test_of_many_rows_a_few_are_run_and_say_what_all_take(flags, monkeypatch):
    model = new_model("x070", vocab_size=64, n_layer=1, n_embd=64)
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    whole = sum(estimate(model, 48, 64, config(**flags)).values())
    monkeypatch.setattr(memory, "TOKENS", 8 * 64)
    assert sum(estimate(model, 48, 64, config(**flags)).values()) == pytest.approx(whole, rel=0.01)
    began = time.process_time()
    assert sum(estimate(model, 10**20, 64, config(**flags), cuda=True).values()) > 10**23
    assert time.process_time() - began < 5


def test_chunked_cross_entropy_takes_less_than_a_tenth_of_the_plain_one(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1 << 20)
    B, T, C, V = 4, 64, 8, 16384
    hidden, weight = torch.randn(B, T, C, requires_grad=True), torch.randn(V, C)
    targets = torch.randint(V, (B, T))

    def plain():
        F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum").backward()

    ours = peak_bytes(lambda: cross_entropy_sum(hidden, weight, targets, True).backward())
    assert ours < peak_bytes(plain) / 10


def test_frozen_weights_never_get_a_gradient():
    model = new_model("x070", vocab_size=256, n_layer=2, n_embd=64)
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    training(model, 1, 16, config())()
    made = []
    for p in model.parameters():
        p.register_hook(lambda g, p=p: made.append(p)) if p.requires_grad else None
    idx = torch.randint(256, (1, 17))
    hidden, _ = model.hidden(idx[:, :-1])
    cross_entropy_sum(hidden, model.head.weight, idx[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.endswith(".bone"), name
    assert len(made) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_program_says():
    doc = (Path(__file__).parents[1] / "docs" / "memory.md").read_text().splitlines()
    rows = table_rows("G1 0.1B", "bone", 64)
    assert len(rows) == 3 and not set(rows) - set(doc)
