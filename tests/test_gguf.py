"""GGUF files: the `gguf` package reads what llama.cpp's own names and formulas say, and llama.cpp computes what we compute."""

import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch

from rwkv_bone.data.templates import Template
from rwkv_bone.data.tokenizer import open_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.files.adapters import save_adapter
from rwkv_bone.files.models import about_record, load_model
from rwkv_bone.files.pth import layout_of, open_tensors, save_tensors, write_pth
from rwkv_bone.merging.command import main
from rwkv_bone.models import MODELS
from rwkv_bone.peft import METHODS, adapter_tensors, inject
from tests.conftest import each_version

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parents[1]
SIZES = {"vocab_size": 256, "n_layer": 7, "n_embd": 32, "dim_att": 32, "dim_ffn": 64}  # more layers than RWKV-6's rescaling skips
METADATA = {"context_length": 1 << 20, "embedding_length": 32, "block_count": 7, "feed_forward_length": 64, "wkv.head_size": 8,
            "attention.head_count": 0, "attention.layer_norm_epsilon": pytest.approx(1e-5)}  # fmt: skip
RANKS = {"x060": {"time_mix_extra_dim": 4, "time_decay_extra_dim": 6, "rescale_every_n_layers": 6},
         "x070": {f"attention.{name}_lora_rank": rank
                  for name, rank in {"decay": 3, "iclr": 4, "value_residual_mix": 5, "gate": 6}.items()}}  # fmt: skip
# The names in Hugging Face's folders, from which llama.cpp converts, and which gguf's own tables map
HUGGING_FACE = {
    "x060": {"blocks.0.ln0": "rwkv.blocks.0.pre_ln", "blocks.": "rwkv.blocks.", ".att.": ".attention.", ".ffn.": ".feed_forward.",
             "emb.": "rwkv.embeddings.", "ln_out": "rwkv.ln_out"},
    "x070": {"blocks.0.ln0": "model.layers.0.pre_norm", "blocks.": "model.layers.", ".att.": ".attention.",
             ".ffn.": ".feed_forward.", "emb.": "model.embeddings.", "ln_out": "model.norm"},
}  # fmt: skip
TRANSPOSED = re.compile(r"time_mix_([avg][12]|w[12]|decay_w[12])\.weight$")
FLOAT32 = re.compile(r"time_mix_(w[12]|decay_w[12]|first|lerp_fused)\.weight$")


def run(*argv) -> int:
    return main([str(word) for word in argv])


def theirs(version: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A .pth's tensors in float32 as conversion/rwkv.py of llama.cpp makes them, under gguf's names of them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[f"RWKV{version[2]}"], SIZES["n_layer"])
    lerps = {"x060": [f"time_maa_{x}" for x in "wkvrg"], "x070": [f"x_{x}" for x in "rwkvag"]}[version]
    found = {}
    for layer in range(SIZES["n_layer"]):
        found[f"blk.{layer}.time_mix_lerp_fused.weight"] = torch.stack([tensors[f"blocks.{layer}.att.{x}"] for x in lerps])
    for name, tensor in tensors.items():
        if name.split(".att.")[-1] in lerps or re.match(r"blocks\.0\.att\.v\d", name):
            continue
        their = name
        for ours, other in HUGGING_FACE[version].items():
            their = re.sub(rf"^{re.escape(ours)}", other, their) if ours[0] != "." else their.replace(ours, other)
        their = names.get_name(their, try_suffixes=(".weight", ".bias"))
        assert their, name
        their = their if their.endswith((".weight", ".bias")) else f"{their}.weight"
        tensor = tensor.transpose(-1, -2) if TRANSPOSED.search(their) else tensor.squeeze()
        if version == "x060" and their in ("blk.6.time_mix_output.weight", "blk.6.channel_mix_value.weight"):
            tensor = tensor / 2
        found[their] = tensor.flatten() if their.endswith("r_k.weight") else tensor
        if their.startswith("blk.0.time_mix_a"):  # layer 0 has no v's of its own
            found[their.replace("_a", "_v")] = tensor
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.fixture
def world(version, make_model, tmp_path) -> Path:
    """A bf16 base with heads of 8 and a Bone adapter on it."""
    torch.manual_seed(0)
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.bfloat16, **SIZES).state_dict())
    model = load_model(tmp_path / "base.pth")
    config = METHODS["bone"].config_from({"r": 8}, "bone")
    inject(model, METHODS["bone"], config)
    tensors = {name: 0.1 * torch.randn_like(tensor) for name, tensor in adapter_tensors(model).items()}
    base = {"file": "base.pth", "fingerprint": model.fingerprint}
    save_adapter(tmp_path / "adapter.pth", tensors, {"method": "bone", "options": vars(config), "base": base})
    return tmp_path


@each_version
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0", "fp32"])
def test_the_file_holds_the_merged_tensors_as_llama_cpps_converter_makes_them(dtype, version, world):
    job = ["--base_model", world / "base.pth", "--peft_checkpoint", world / "adapter.pth"]
    assert run(*job, "--output", world / "merged.pth", "--dtype", "fp32") == 0
    assert run(*job, "--output", world / "merged.gguf", "--dtype", dtype) == 0
    reader = gguf.GGUFReader(world / "merged.gguf")
    wanted = theirs(version, open_tensors(world / "merged.pth"))
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    matrices = {"fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "fp32": "F32"}[dtype]
    for tensor in reader.tensors:
        value = wanted[tensor.name].contiguous()
        kind = "F32" if value.dim() < 2 or FLOAT32.search(tensor.name) else matrices
        kind = "F16" if kind == "Q8_0" and value.shape[-1] % 32 else kind
        assert tensor.tensor_type.name == kind, tensor.name
        assert list(tensor.shape) == list(value.shape)[::-1], tensor.name  # ggml counts dimensions from the innermost
        expected = gguf.quants.quantize(value.numpy(), tensor.tensor_type)
        if kind == "F16" and version == "x060":  # halved after rounding: the last bit of a subnormal number may differ
            assert abs(expected.astype("f8") - tensor.data).max() <= 2**-24, tensor.name
        else:
            assert expected.tobytes() == tensor.data.tobytes(), tensor.name
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[f"RWKV{version[2]}"]]}
    written = {re.sub(r"blk\.\d+", "blk.{bid}", name).rpartition(".")[0] for name in wanted}
    assert {name for name in known - written if not re.search(r"lerp_[wkvrg]$", name)} == set()  # those are in the fused one


@each_version
def test_the_file_says_what_llama_cpp_asks_for(version, world):
    assert run("--base_model", world / "base.pth", "--output", world / "tuned.gguf", "--dtype", "q8_0") == 0
    fields = {name: field.contents() for name, field in gguf.GGUFReader(world / "tuned.gguf").fields.items()}
    architecture = f"rwkv{version[2]}"
    found = {name.removeprefix(f"{architecture}."): value for name, value in fields.items() if name.startswith(architecture)}
    assert found == METADATA | RANKS[version]
    general = {"architecture": architecture, "type": "model", "name": "tuned", "file_type": gguf.LlamaFileType.MOSTLY_Q8_0}
    assert general.items() <= {name.removeprefix("general."): value for name, value in fields.items()}.items()
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "rwkv" and len(tokens) == 256
    assert (tokens[0], tokens[10], tokens[65], tokens[255]) == ("<s>", "\\n", "A", "\\xff")


@each_version
def test_worlds_vocabulary_is_written_whole_and_its_blank_line_ends_an_answer_of_a_world_model(version, make_model, tmp_path):
    sizes = {"vocab_size": 65536, "n_embd": 8, "dim_att": 8, "dim_ffn": 8}
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.bfloat16, **sizes).state_dict())
    assert run("--base_model", tmp_path / "base.pth", "--output", tmp_path / "base.gguf") == 0
    if MODELS[version].template != "world":  # answers of G1 may hold blank lines
        assert b"eot_token_id" not in (tmp_path / "base.gguf").read_bytes()
        return
    fields = gguf.GGUFReader(tmp_path / "base.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 65536
    world = open_tokenizer("world")
    for token in range(1, 65530):  # llama.cpp undoes the escapes of a Python literal
        assert tokens[token].encode().decode("unicode_escape").encode("latin-1") == world.decode_bytes([token]), token
    assert types == [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 65529, *[gguf.TokenType.UNUSED] * 6]
    ends = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot")}
    assert ends == {"bos": 0, "eos": 0, "eot": world.encode("\n\n")[0]}
    template = jinja2.Template(fields["tokenizer.chat_template"].contents())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}]
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text == "System: Be brief.\n\nUser: Hi\n\nAssistant:"


OWN = """\
{% for m in messages -%}
<{{ m.role }}> {%- if m.role == "assistant" %}{% generation %} {{ m.content | no_blank_lines }};{% endgeneration %}
{%- else %} {{ m.content }}{% endif %}
{% endfor -%}
{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize(
    ("source", "asked"), [(OWN, "<user> Hi<assistant>"), ("{{ messages[0].content }}", "User: Hi\n\nAssistant:")]
)
def test_a_template_of_ones_own_goes_into_the_file_if_it_can_ask(make_model, tmp_path, source, asked):
    records = about_record({"template": Template("mine.jinja", source).identity()})
    tensors = make_model(dtype=torch.bfloat16, **SIZES).state_dict()
    write_pth(tmp_path / "base.pth", layout_of(tensors), tensors.items(), records)
    assert run("--base_model", tmp_path / "base.pth", "--output", tmp_path / "base.gguf") == 0
    written = gguf.GGUFReader(tmp_path / "base.gguf").fields["tokenizer.chat_template"].contents()
    theirs = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(written)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.render(messages=messages, add_generation_prompt=True) == asked
    if source == OWN:
        talk = [*messages, {"role": "assistant", "content": "Ho"}]
        assert theirs.render(messages=talk) == "".join(text for text, _ in Template("mine.jinja", source).segments(talk))


@pytest.mark.parametrize(("sizes", "flags", "message"), [
    ({}, ("--dtype", "q8_0", "--format", "pth"), "q8_0 is a type of GGUF files"),
    ({}, ("--verify",), "--verify reads .pth and safetensors"),
    ({"vocab_size": 50}, (), "a vocabulary of 50 is neither World's (65536) nor bytes"),
    ({"dim_att": 16, "version": "x060"}, (), "dim_att 16 is not n_embd, 32, and llama.cpp knows no such model"),
    ({"time_state": True}, (), "no place for a trained initial state"),
])  # fmt: skip
def test_what_a_gguf_file_cannot_hold_is_refused_in_one_line(sizes, flags, message, make_model, tmp_path):
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.bfloat16, **{**SIZES, **sizes}).state_dict())
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run("--base_model", tmp_path / "base.pth", "--output", tmp_path / "out.gguf", *flags)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["base.pth"]


def test_a_full_disk_leaves_nothing(make_model, tmp_path):
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.bfloat16, **SIZES).state_dict())
    argv = [sys.executable, "merge.py", "--base_model", str(tmp_path / "base.pth"), "--output", str(tmp_path / "out.gguf")]
    limited = f"import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999)); os.execv({argv[0]!r}, {argv!r})"
    done = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: .*out\.gguf: cannot be written.*\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base.pth"]


# RWKV-7 with heads of 64 alone: llama.cpp's own kernel for the CPU is wrong for smaller ones (measured with AVX-512)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-rwkv6-1m", "tiny-rwkv7-834k", "random RWKV-7"])
def test_llama_cpp_continues_as_we_do(name, make_model, data, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is built from source")
    base = data / f"{name}.pth"
    if name.startswith("random"):
        base, wide = tmp_path / "base.pth", {"n_embd": 128, "dim_att": 128, "dim_ffn": 256, "head_size": 64, "vocab_size": 256}
        save_tensors(base, make_model(dtype=torch.float32, version="x070", **wide).state_dict())
    assert run("--base_model", base, "--output", tmp_path / "tiny.gguf", "--dtype", "fp32") == 0
    prompt = list("Natalia sold clips to 48 of her friends".encode("utf-16-le" if "rwkv6" in name else "utf-8"))
    llama = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), n_ctx=512, n_threads=1, verbose=False)
    theirs = [token for token, _ in zip(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), range(64))]
    model, ours = load_model(base, torch.float32), []
    logits, state = model(torch.tensor([prompt]))
    for _ in theirs:
        ours.append(int(logits[0, -1].argmax()))
        logits, state = model(torch.tensor([ours[-1:]]), state)
    assert theirs == ours
