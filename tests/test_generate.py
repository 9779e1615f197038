"""Sampling: the rwkv package's choices, a batch that gives each row what it gives alone, streaming, chat, the command line."""

import io
import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_bone.data.templates import Template
from rwkv_bone.data.tokenizer import ByteTokenizer, open_tokenizer
from rwkv_bone.errors import UserError, run
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.adapters import save_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors, save_tensors
from rwkv_bone.generate import GREEDY, Conversation, Sampling, completions, generate, read, sample, sampling
from rwkv_bone.generate.command import main, shower
from rwkv_bone.models.rwkv import LayerState
from rwkv_bone.peft import METHODS, adapter_tensors, inject, merge
from tests.independent import rwkv_package_generate

UTF16 = ByteTokenizer(256, "utf-16-le")
BYTES = ByteTokenizer(257)


@pytest.mark.parametrize(("method", "version"), [*((name, "x070") for name in METHODS), ("lora", "x060")])
def test_the_model_for_sampling_computes_the_same_from_the_same_tensors(method, make_model):
    model = make_model(dtype=torch.float32)
    inject(model, METHODS[method], METHODS[method].config_from({"r": 4}, method))
    quick, idx = model.for_sampling(), torch.arange(24).view(2, 12)
    assert quick is not model and torch.equal(quick(idx)[0], model(idx)[0])
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(quick(idx)[0], model(idx)[0])
    with torch.no_grad():  # one token after the other has a way of its own
        (want, want_state), (got, state) = model(idx), quick(idx[:, :1])
        for t in range(1, 12):
            got, state = quick(idx[:, t : t + 1], state)
    torch.testing.assert_close(got[:, 0], want[:, -1])
    torch.testing.assert_close(state, want_state)
    model.head.register_forward_hook(lambda *_: None)
    assert model.for_sampling() is model


@pytest.fixture
def byte_model(make_model):
    return make_model(vocab_size=257, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def package():
    """The rwkv package's sampling pipeline."""
    os.environ.update(RWKV_V7_ON="0", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")  # read by the package as it is imported
    from rwkv.utils import PIPELINE

    return PIPELINE


class Parrot(torch.nn.Module):
    """A model that says one script, whatever it is told."""

    def __init__(self, script: list[int], vocab_size: int, heard: int):
        super().__init__()
        self.script, self.heard = torch.tensor([0] * heard + script), heard
        self.sizes, self.device = SimpleNamespace(vocab_size=vocab_size), torch.device("cpu")

    def for_sampling(self):
        return self

    def hidden(self, idx, state=None):
        at = state[0].wkv if state else torch.zeros(len(idx), dtype=torch.int64)
        positions = at.unsqueeze(1) + torch.arange(1, idx.shape[1] + 1)
        return positions, [LayerState(at, positions[:, -1], at)]

    def head(self, positions):
        return 100.0 * torch.nn.functional.one_hot(self.script[positions], self.sizes.vocab_size)


def say(tokenizer, script: list[int], **kwargs):
    """The completion of a prompt by a model that says `script`, and the pieces of text as they came."""
    pieces = []
    prompt = tokenizer.encode("ab")
    model = Parrot(script, tokenizer.vocab_size, len(prompt))
    kwargs = {"max_tokens": len(script), **kwargs}
    (completion,) = generate(model, tokenizer, [prompt], GREEDY, on_text=lambda _, piece: pieces.append(piece), **kwargs)
    return completion, pieces


# ---------------------------------------------------------------- equal to the rwkv package


@pytest.mark.parametrize(("name", "tokenizer"), [("tiny-rwkv6-1m", UTF16), ("tiny-rwkv7-gsm8k", ByteTokenizer(256))])
def test_greedy_tokens_are_the_packages_golden_ones(name, tokenizer, data):
    prompt = np.load(data / f"{name}.prompt64.npz")["tokens"].tolist()
    expected = json.loads((data / f"{name}.json").read_text())["greedy_after_prompt64"]
    model = load_model(data / f"{name}.pth", torch.float32).requires_grad_(False)
    (completion,) = generate(model, tokenizer, [prompt], GREEDY, max_tokens=len(expected["tokens"]))
    assert completion.tokens == expected["tokens"]
    assert completion.text == expected["text"]


@pytest.mark.parametrize(
    ("version", "penalties"),
    [("x060", (0.3, 0.5, 0.9)), *(("x070", p) for p in [(0, 0, 1.0), (0.4, 0.0, 1.0), (0.3, 0.5, 0.9), (-0.1, -0.2, 0.99)])],
)
def test_greedy_tokens_with_and_without_penalties_are_those_of_the_package(make_model, tmp_path, penalties):
    model = make_model(7, torch.float32, vocab_size=257, n_embd=128, dim_att=128, dim_ffn=96, head_size=64)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    given = dict(zip(("temperature", "alpha_presence", "alpha_frequency", "alpha_decay"), (0, *penalties)))
    prompts = [BYTES.encode(text) for text in ("In a shocking finding, 1 2 3", "a")]
    expected = rwkv_package_generate(tmp_path / "m.pth", prompts, 60, **given)
    sampling = Sampling(**given)
    ours = generate(model, BYTES, prompts, sampling, max_tokens=60)
    for completion, tokens in zip(ours, expected):
        assert len(set(tokens)) > 3
        assert completion.tokens == tokens[: tokens.index(0)] if 0 in tokens else tokens


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.85, 0), (1.0, 0), (0.3, 0), (0.0, 0), (0.95, 3), (1.0, 7), (0.9, 500)])
def test_probabilities_are_the_packages(package, monkeypatch, temperature, top_p, top_k):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    logits[5] = logits[7]  # a tie
    expected = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: expected.append(p) or 0)
    package.sample_logits(None, logits.clone(), temperature, 0.9999999 if top_p == 1 else top_p, top_k)
    draws = 20000
    tokens = sample(logits.expand(draws, -1), Sampling(temperature, top_p, top_k), [i / draws for i in range(draws)])
    ours = tokens.bincount(minlength=40) / draws
    assert np.abs(ours.numpy() - expected[0]).max() < 2 / draws


@pytest.mark.parametrize("V", [3, 1000, 65536])
def test_the_last_token_can_be_drawn_and_no_impossible_one(V):
    logits = torch.zeros(3, V)
    logits[:, 0] = logits[:, -1] = -torch.inf
    assert sample(logits, Sampling(top_p=1.0), [0.0, 0.5, 1 - 2**-53]).tolist() == [1, V // 2, V - 2]


@pytest.mark.parametrize("top_p", [0.3, 0.999])
def test_large_vocabularies_have_the_packages_probabilities_too(package, monkeypatch, top_p):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2))  # 0.3 takes some hundred tokens, 0.999 thousands
    expected = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: expected.append(p) or 0)
    package.sample_logits(None, logits.clone(), 0.7, top_p)
    kept = np.cumsum(expected[0])
    draws = [0.0, 0.1, 0.37, 0.5, 0.9, 1 - 2**-53]
    tokens = sample(logits.expand(len(draws), -1), Sampling(0.7, top_p), draws)
    for token, draw in zip(tokens.tolist(), draws):
        assert expected[0][token] > 0
        assert kept[token] - expected[0][token] - 1e-5 <= draw <= kept[token] + 1e-5


def test_top_k_keeps_k_tokens_even_of_equal_ones():
    draws = [i / 1000 for i in range(1000)]
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(1000, -1)
    assert set(sample(logits, Sampling(1.0, 1.0, 2), draws).tolist()) == {1, 2}
    assert set(sample(logits, Sampling(1.0, 1.0, 4), draws).tolist()) == {0, 1, 2, 3}


def test_a_model_that_gives_no_numbers_is_an_error(byte_model):
    byte_model.head.weight[3] = float("nan")
    with pytest.raises(UserError, match="not a number"):
        generate(byte_model, BYTES, ["a"])


# ---------------------------------------------------------------- a batch is its rows


PROMPTS = ["a", "", "Once upon a time", "éü", "a", "zz zz zz zz", "Once upon a time!", "b" * 50]


@pytest.mark.parametrize("time_state", [False, True])
@pytest.mark.parametrize("at_once", [1, 24, 10000])
def test_prompts_of_different_lengths_read_at_once_give_what_each_gives_alone(make_model, monkeypatch, time_state, at_once):
    model = make_model(vocab_size=257, time_state=time_state)
    monkeypatch.setattr(sampling, "TOKENS_AT_ONCE", at_once)
    prompts = [BYTES.encode(prompt) or [0] for prompt in PROMPTS]
    _, start = model(torch.tensor([[5, 6, 7]]))
    for state in (None, start):
        logits, after = read(model, prompts, state)
        for i, prompt in enumerate(prompts):
            alone, alone_after = model(torch.tensor([prompt]), state)
            torch.testing.assert_close(logits[i], alone[0, -1], rtol=1e-10, atol=1e-10)
            for layer, alone_layer in zip(after, alone_after):
                for ours, expected in zip(layer, alone_layer):
                    torch.testing.assert_close(ours[i], expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(0.8, 1.0, 20, alpha_frequency=0)])
@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_a_row_says_the_same_in_any_batch_and_order(byte_model, sampling, batch_size):
    prompts = list(dict.fromkeys(PROMPTS))
    alone = [generate(byte_model, BYTES, [prompt], sampling, 20, ("a",), 3)[0] for prompt in prompts]
    together = generate(byte_model, BYTES, prompts, sampling, 20, ("a",), 3, batch_size)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.reason for c in together] == [c.reason for c in alone]
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    shuffled = generate(byte_model, BYTES, [prompts[i] for i in order], sampling, 20, ("a",), 3, batch_size)
    assert [c.tokens for c in shuffled] == [alone[i].tokens for i in order]


def test_a_seed_repeats_its_samples_and_another_does_not(byte_model):
    once, again, other = ([c.tokens for c in generate(byte_model, BYTES, ["a", "b"], seed=s, max_tokens=12)] for s in (1, 1, 2))
    assert once == again
    assert once[0] != other[0] and once[1] != other[1]


def test_the_same_prompt_twice_gives_two_samples(byte_model):
    first, second = generate(byte_model, BYTES, ["a", "a"], max_tokens=12)
    assert first.tokens != second.tokens


def test_going_on_from_a_state_is_going_on_from_its_text(byte_model):
    shared = BYTES.encode("Q: 1+1?\nA: 2\n\n")
    _, state = byte_model(torch.tensor([shared]))
    prompts = [BYTES.encode(text) for text in ("Q: 2+2?\nA:", "Q: 7?\nA:")]
    short = generate(byte_model, BYTES, prompts, GREEDY, 12, state=state)
    whole = generate(byte_model, BYTES, [shared + prompt for prompt in prompts], GREEDY, 12)
    assert [c.tokens for c in short] == [c.tokens for c in whole]


def test_an_empty_prompt_begins_a_document(byte_model):
    empty, explicit = generate(byte_model, BYTES, ["", [0]], GREEDY, 8)
    assert empty.tokens == explicit.tokens


def test_finished_rows_make_room_before_the_batch_is_over(byte_model, monkeypatch):
    sizes = []
    monkeypatch.setattr(sampling, "step", lambda model, tokens, state: sizes.append(len(tokens)) or step(model, tokens, state))
    said = generate(byte_model, BYTES, [f"{i}" for i in range(12)], GREEDY, 16, ("f", "g"), 0, 4)
    tokens = sum(len(c.tokens) + (c.reason == "end") for c in said)  # the end is a token that is not said
    assert max(sizes) == 4 and sum(sizes) == tokens - 12  # the first comes from the prompt
    assert len(sizes) < 3 * 16  # three batches one after the other, each as long as its longest


step = sampling.step


# ---------------------------------------------------------------- ends and streams


def test_characters_and_stop_strings_come_whole_or_not_at_all():
    script = BYTES.encode("naïve 日本 text\n\nUs and them\n\nUser: more")
    completion, pieces = say(BYTES, script, stop=("\n\nUser:", "never"))
    assert completion.text == "".join(pieces) == "naïve 日本 text\n\nUs and them"
    assert completion.reason == "stop"
    assert "日" in pieces and "\n\nUs " in pieces and "\ufffd" not in "".join(pieces)


def test_of_two_stop_strings_the_first_in_the_text_counts():
    assert say(BYTES, BYTES.encode("one two three"), stop=("wo t", "two th", "two"))[0].text == "one "


def test_a_possible_stop_string_at_the_end_is_text():
    completion, pieces = say(BYTES, BYTES.encode("hm\n\nUse"), stop=("\n\nUser:",))
    assert completion.text == "".join(pieces) == "hm\n\nUse"
    assert completion.reason == "length"


def test_the_end_of_document_ends_and_is_not_text():
    completion, _ = say(BYTES, [*BYTES.encode("done"), 0, *BYTES.encode("not this")])
    assert (completion.text, completion.reason, completion.tokens) == ("done", "end", BYTES.encode("done"))


def test_half_a_character_at_the_end_is_shown_as_such():
    completion, pieces = say(BYTES, BYTES.encode("é日")[:-1])
    assert completion.text == "".join(pieces) == "é\ufffd"


def test_an_end_of_two_bytes_is_one_only_on_a_characters_border():
    text = "a\u6200b\u0100c"  # in UTF-16: 61 00 | 00 62 | ...: the zeros are not one character
    completion, pieces = say(UTF16, [*UTF16.encode(text), 0, 0, 65, 0])
    assert completion.text == "".join(pieces) == text
    assert completion.reason == "end"


def test_world_tokens_stream_whole_characters():
    tokenizer = open_tokenizer("world")
    text = "A 🙂 and 𠜎𠜱, naïve"
    script = tokenizer.encode(text)
    completion, pieces = say(tokenizer, script)
    assert completion.text == "".join(pieces) == text
    assert len(pieces) < len(script) and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -1, "at least 0"),
        ("top_p", 1.5, "from 0 to 1"),
        ("top_k", -1, "at least 0"),
        ("alpha_decay", 2, "from 0 to 1"),
        ("alpha_presence", float("nan"), "a number"),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(name, value, message):
    with pytest.raises(UserError, match=f"--{name} must be {message}"):
        Sampling(**{name: value})


def test_no_tokens_no_rows_and_empty_stop_strings_are_refused(byte_model):
    for kwargs, message in (({"max_tokens": 0}, "max_tokens 0"), ({"batch_size": 0}, "batch_size 0"), ({"stop": ("",)}, "empty")):
        with pytest.raises(UserError, match=message):
            generate(byte_model, BYTES, ["a"], **kwargs)


# ---------------------------------------------------------------- chat


def test_a_conversation_goes_on_as_if_its_whole_text_had_been_given(byte_model):
    conversation = Conversation(byte_model, BYTES)
    text = ""
    for message in ("Hi there.\n\n\nHow are you?", "Then what?", "1+1"):
        reply = conversation.ask(message, GREEDY, max_tokens=15)
        text += f"User: {message}\n\nAssistant:".replace("\n\n\nHow", "\nHow")
        expected = generate(byte_model, BYTES, [text], GREEDY, 15, ("\n\nUser:",))[0].text.rstrip()
        assert reply == expected
        text += reply + "\n\n"


def test_an_interrupted_reply_counts_as_far_as_it_came(byte_model):
    conversation, said = Conversation(byte_model, BYTES), []

    def interrupt(piece):
        said.append(piece)
        if len(said) == 4:
            raise KeyboardInterrupt

    reply = conversation.ask("Hi", GREEDY, 40, on_text=interrupt)
    assert reply == "".join(said).rstrip()
    text = f"User: Hi\n\nAssistant:{reply}\n\nUser: Go on\n\nAssistant:"
    assert conversation.ask("Go on", GREEDY, 8) == generate(byte_model, BYTES, [text], GREEDY, 8, ("\n\nUser:",))[0].text.rstrip()


def test_a_template_changes_a_chats_markers(byte_model):
    source = """{% for m in messages %}{% if m.role == "user" %}Q: {{ m.content }}{{ "\n" }}{% else %}A:
{%- generation %} {{ m.content }}
{% endgeneration %}{% endif %}{% endfor %}"""
    template = Template("mine", source)
    reply = Conversation(byte_model, BYTES, template).ask("Hi", GREEDY, 8)
    assert reply == generate(byte_model, BYTES, ["Q: Hi\nA:"], GREEDY, 8, ("\nQ:",))[0].text.rstrip()


# ---------------------------------------------------------------- command line


@pytest.fixture
def model_file(byte_model, tmp_path):
    save_tensors(tmp_path / "m.pth", {name: x.float() for name, x in byte_model.state_dict().items()})
    return str(tmp_path / "m.pth")


@pytest.fixture
def float_model(model_file):
    return load_model(model_file, torch.float32)


def test_one_prompt_is_continued_on_the_terminal(model_file, float_model, capsys):
    main(["--model", model_file, "--prompt", "Once", "--max_tokens", "20", "--seed", "5", "--top_k", "30"])
    expected = generate(float_model, BYTES, ["Once"], Sampling(top_k=30), 20, seed=5)[0].text
    assert capsys.readouterr().out == expected + "\n"


def test_prompts_of_a_file_are_continued_in_order(model_file, float_model, tmp_path, capsys):
    prompts = ["One", "Two words", "3"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    asked = [f"User: {prompt}\n\nAssistant:" for prompt in prompts for _ in range(2)]
    expected = [c.text.lstrip() for c in generate(float_model, BYTES, asked, max_tokens=9, stop=("\n\nUser:", "e"))]
    out = tmp_path / "out.jsonl"
    for file in ("p.txt", "p.jsonl"):
        argv = ["--model", model_file, "--prompt_file", str(tmp_path / file), "--instruct", "--samples", "2", "--max_tokens", "9",
                "--stop", "e", "--out", str(out), "--batch_size", "2"]  # fmt: skip
        if out.exists():
            with pytest.raises(UserError, match="exists; give another name, or --overwrite"):
                main(argv)
        main([*argv, "--overwrite"])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in rows] == expected
        assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    capsys.readouterr()
    main(["--model", model_file, "--prompt", "a", "--prompt", "b", "--max_tokens", "3"])
    out = capsys.readouterr().out
    assert out.index("--- 1 of 2: a\n") < out.index("--- 2 of 2: b\n")


def test_an_answer_is_shown_without_the_space_before_it(capsys):
    for strip, shown in ((True, "an  answer"), (False, "  an  answer")):
        show = shower(strip)
        for piece in (" ", " an", "  ", "answer"):
            show(0, piece)
        assert capsys.readouterr().out == shown


def test_an_adapter_is_merged_before_sampling(model_file, float_model, tmp_path, capsys):
    bone = METHODS["bone"]
    inject(float_model, bone, bone.config_from({"r": 8}, "bone"))
    tensors = {n: 0.1 * torch.randn(t.shape) for n, t in adapter_tensors(float_model).items()}
    float_model.load_state_dict(tensors, strict=False)
    base = {"file": "m.pth", "fingerprint": float_model.fingerprint}
    save_adapter(tmp_path / "a.pth", tensors, {"method": "bone", "options": {"r": 8}, "base": base})
    merge(float_model)
    outputs = []
    for adapter in ([], ["--peft_checkpoint", str(tmp_path / "a.pth")]):
        main(["--model", model_file, "--prompt", "Once", "--max_tokens", "20", "--temperature", "0", *adapter])
        outputs.append(capsys.readouterr().out)
    assert outputs[1] == generate(float_model, BYTES, ["Once"], Sampling(0), 20)[0].text + "\n"
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize("known, flags, warned", [
    ({"kind": "byte", "encoding": "utf-16-le"}, ["--encoding", "utf-8"], "with bytes of utf-8; give --encoding utf-16-le"),
    ({"kind": "byte", "encoding": "utf-16-le"}, ["--encoding", "utf-16-le"], ""),
    ({"kind": "byte", "encoding": "utf-16-le"}, [], ""),  # taken from the record
    ({"kind": "byte", "encoding": "utf-8"}, [], ""),
    ({"kind": "world", "encoding": "utf-8"}, ["--tokenizer", "byte"], "give --tokenizer world"),
    ({"kind": "world", "encoding": "utf-8"}, ["--encoding", "utf-16-le"], "give --tokenizer world --encoding utf-8"),
    ({"kind": "tokenizer.json", "encoding": "utf-8"}, [], "give --tokenizer PATH/tokenizer.json"),
    (None, [], ""),  # an older adapter's record
    ({"kind": ["?"], "encoding": 5}, [], ""),
    ("?", [], ""),
])  # fmt: skip
def test_a_tokenizer_other_than_the_adapters_is_warned_of_with_the_flag(known, flags, warned, model_file, tmp_path, capsys):
    base = {"fingerprint": load_model(model_file).fingerprint}
    tensors = {"head.weight": open_tensors(model_file)["head.weight"]}
    told = {"tokenizer": known} if known else {}
    save_adapter(tmp_path / "a.pth", tensors, {"method": "none", "options": {}, "base": base, **told})
    files = ["--model", model_file, "--peft_checkpoint", str(tmp_path / "a.pth")]
    main([*files, "--prompt", "Once", "--max_tokens", "2", *flags])
    said = capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"text": "Once"}\n')
    evaluate(["loss", *files, "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), *flags])
    for stderr in (said, capsys.readouterr().err):
        warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == bool(warned) and warned in "".join(warnings)


def test_chat_answers_each_line_and_new_forgets(model_file, float_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nGo on\n/new\n\nHi\n/help\n/system Be brief.\nHi\n/what\n/exit\nHi\n"))
    main(["--model", model_file, "--chat", "--max_tokens", "6", "--temperature", "0"])
    conversation = Conversation(float_model, BYTES)
    first, second = (conversation.ask(message, Sampling(0), 6) for message in ("Hi", "Go on"))
    out = capsys.readouterr().out
    brief = Conversation(float_model, BYTES, system="Be brief.").ask("Hi", Sampling(0), 6)
    replies = [part.split("\n\nUser: ")[0].rstrip() for part in out.split("\nAssistant:")[1:]]
    assert replies == [first, second, first, brief]
    said = [part.splitlines()[0] for part in out.split("User: ")[1:]]
    assert said == ["Hi", "Go on", "/new", "", "Hi", "/help", "/system Be brief.", "Hi", "/what", "/exit"]
    assert out.count("/reset forgets") == 2 and "no command /what" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --prompt_file, or --chat"),
        (["--chat", "--prompt", "a"], "--chat takes no prompts"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompt", "a", "--max_tokens", "0"], "must be at least 1"),
        (["--prompt", "a", "--promt"], "unknown flag --promt; did you mean --prompt"),
        (["--prompt", "a", "--device", "tpu"], "--device takes auto, cpu, cuda"),
        (["--prompt", "a", "--device", "cpu", "--op", "cuda"], "--op cuda does not run on --device cpu"),
        (["--prompt", "a", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--prompt", "a", "--tokenizer", "world"], "ids up to 65529, but the model's vocabulary is 257"),
        (["--prompt", "a", "--peft_checkpoint", "none.pth"], "none.pth"),
        (["--prompt_file", "none.txt"], "none.txt: No such file"),
        (["--prompt_file", os.devnull], "holds no prompt"),
        (["--prompt", "a\udce9"], "surrogate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model_file, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run(lambda: main(["--model", model_file, *arguments]))
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(("row", "message"), [("{", "broken JSON"), ("[1]", "wanted"), ('{"prompt": 1}', "wanted")])
def test_a_broken_prompt_file_is_told_by_prompt(model_file, tmp_path, row, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + row)
    with pytest.raises(UserError, match=f"prompt 2: {message}"):
        main(["--model", model_file, "--prompt_file", str(tmp_path / "p.jsonl")])


def test_completions_come_as_they_are_done(byte_model):
    each = completions(byte_model, BYTES, ["a", "b" * 9], GREEDY, 4, batch_size=1)
    assert next(each).index == 1  # the longest prompt is read first
    assert next(each).index == 0
