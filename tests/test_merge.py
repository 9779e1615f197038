"""merge.py: the written file is base + adapter rounded once, other programs can read it, and it is whole or not there."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.adapters import load_adapter, read_adapter, read_info, save_adapter
from rwkv_bone.files.models import fingerprint, load_model, open_model
from rwkv_bone.files.pth import open_tensors, save_tensors, write_pth
from rwkv_bone.interop.rwkv_peft import Foreign
from rwkv_bone.merging import command as merging
from rwkv_bone.merging.merge import Merge
from rwkv_bone.merging.verify import verify
from rwkv_bone.models.x070 import RWKV7
from rwkv_bone.peft import METHODS, adapter_tensors, adapters, inject, merge
from rwkv_bone.peft.quant import quantise_model
from tests.conftest import each_version
from tests.independent import rwkv_package_logits
from tests.runs import program

ROOT = Path(__file__).resolve().parents[1]
R = 5  # divides neither 16 nor 24 nor 40


def run(*argv) -> int:
    return merging.main([str(word) for word in argv])


def perturb(model, size: float = 0.05) -> None:
    """Train, as it were: every trainable entry moves."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def train_in_full(model, parts) -> None:
    for name, p in model.named_parameters():
        if any(model.in_part(name, part) for part in parts):
            p.requires_grad_(True)


def save_trained(path: Path, base: Path, method: str = "bone", parts=("time", "ln"), size: float = 0.05, **options):
    """A model on `base` with a trained adapter, and the adapter's file."""
    model = load_model(base)
    cls = METHODS[method]
    config = cls.config_from({"r": R, **options}, method)
    inject(model, cls, config)
    for layer in adapters(model).values():
        if cls.starts_from_gradient:
            layer.start_at(0.1 * torch.randn_like(layer.lora_A), 0.1 * torch.randn_like(layer.lora_B))
    train_in_full(model, parts)
    perturb(model, size)
    info = {"method": method, "options": vars(config), "base": {"file": base.name, "fingerprint": model.fingerprint}}
    save_adapter(path, adapter_tensors(model), info)
    return model


@pytest.fixture
def base(make_model, tmp_path) -> Path:
    torch.manual_seed(0)
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.bfloat16).state_dict())
    return tmp_path / "base.pth"


@pytest.fixture
def paths(base, tmp_path) -> dict[str, Path]:
    """A bf16 base, a Bone adapter on it with trained parts, and a place for the result."""
    save_trained(tmp_path / "adapter.pth", base)
    return {"base": base, "adapter": tmp_path / "adapter.pth", "out": tmp_path / "merged.pth"}


def arguments(paths, *more):
    return ["--base_model", paths["base"], "--peft_checkpoint", paths["adapter"], "--output", paths["out"], *more]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(("method", "version"), [*((name, "x070") for name in METHODS), ("bone", "x060")])
def test_the_merged_file_is_base_plus_adapter_rounded_once(method, base, tmp_path):
    model = save_trained(tmp_path / "a.pth", base, method)
    exact = model.double()
    merge(exact)
    run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth")
    before, after = open_tensors(base), open_tensors(tmp_path / "m.pth")
    assert [(n, t.dtype, t.shape) for n, t in before.items()] == [(n, t.dtype, t.shape) for n, t in after.items()]
    for name, wanted in exact.state_dict().items():
        if wanted.equal(before[name].double()):
            assert after[name].equal(before[name]), name
        half_a_unit = 2.0**-9 * 2 ** wanted.abs().clamp(min=1e-30).log2().floor().add(1)  # of bf16, at each entry
        assert ((after[name].double() - wanted).abs() <= half_a_unit * (1 + 1e-3)).all(), name
    changed = {n for n in before if not before[n].equal(after[n])}
    assert changed == {n for n, _ in load_model(base).named_parameters() if n not in ("emb.weight", "head.weight")}


def test_bone_is_merged_by_its_formula(paths):
    """W'_ij = W_ij + W_ij B_j + B_j, block by block in float64; rounded to bf16 where the sum in float32 cannot tip it."""
    run(*arguments(paths))
    before, after, adapter = (open_tensors(paths[key]) for key in ("base", "out", "adapter"))
    for layer in ("att.key", "att.output", "ffn.key", "ffn.value"):
        W, B = before[f"blocks.1.{layer}.weight"].double(), adapter[f"blocks.1.{layer}.bone"].double()
        wanted = W.clone()
        for j, block in enumerate(B):
            columns = slice(j * R, min((j + 1) * R, W.shape[1]))
            width = columns.stop - columns.start
            for i in range(0, W.shape[0], R):
                rows = slice(i, min(i + R, W.shape[0]))
                wanted[rows, columns] += W[rows, columns] @ block[:width, :width] + block[: rows.stop - rows.start, :width]
        merged = after[f"blocks.1.{layer}.weight"].double()
        assert (merged - wanted).abs().max() < 2**-8 * wanted.abs().max()
        assert (merged == wanted.bfloat16()).double().mean() > 0.999


def test_a_model_of_float32_loses_nothing_and_says_so(make_model, tmp_path, capsys):
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.float32).state_dict())
    model = save_trained(tmp_path / "a.pth", tmp_path / "base.pth")
    run("--base_model", tmp_path / "base.pth", "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth")
    merge(model)
    assert all(t.equal(open_tensors(tmp_path / "m.pth")[name]) for name, t in model.state_dict().items())
    assert re.search(r"\n +all +\d+ +\d+\.\d+% +0\.000% +0\.000%\n", capsys.readouterr().out)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-rwkv6-1m", "tiny-rwkv7-gsm8k"])
def test_the_rwkv_package_gives_the_merged_file_the_logits_of_base_plus_adapter(name, data, tmp_path):
    """On really trained weights. Widened to float32 first, as the package computes ln0(emb) in the file's dtype."""
    run("--base_model", data / f"{name}.pth", "--output", tmp_path / "base.pth", "--dtype", "fp32")
    model = save_trained(tmp_path / "a.pth", tmp_path / "base.pth", parts=["time"], size=0.003)
    run("--base_model", tmp_path / "base.pth", "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth")
    tokens = list("The merged".encode("utf-16-le"))
    adapted = model(torch.tensor([tokens]))[0][0]
    plain = rwkv_package_logits(tmp_path / "base.pth", tokens)
    assert (adapted - plain).abs().max() > 0.1
    assert (adapted - rwkv_package_logits(tmp_path / "m.pth", tokens)).abs().max() < 1e-4


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(("step", "dtype", "noted"), [(1e-4, "bf16", True), (1e-4, "fp32", False), (0.1, "bf16", False)])
def test_an_update_that_rounding_mostly_takes_is_noted_with_the_cure(step, dtype, noted, base, tmp_path, capsys):
    head = open_tensors(base)["head.weight"].float()
    info = {"method": "none", "options": {}, "base": {"fingerprint": fingerprint(open_tensors(base))}}
    save_adapter(tmp_path / "a.pth", {"head.weight": head * (1 + step)}, info)
    run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth", "--dtype", dtype)
    note = f"note       rounding took 100% of {tmp_path / 'a.pth'}'s update; --dtype fp32 keeps it"
    printed = capsys.readouterr().out
    assert (note in printed, "note " in printed) == (noted, noted)


def test_the_report_gives_what_rounding_lost(paths, capsys):
    run(*arguments(paths))
    printed = capsys.readouterr().out
    before, after, adapter = (open_tensors(paths[key]) for key in ("base", "out", "adapter"))
    exact = load_model(paths["base"], torch.float64)
    load_adapter(exact, paths["adapter"])
    merge(exact)
    sums = torch.zeros(5, dtype=torch.float64)
    for layer in (0, 1):
        W, E, M = (x[f"blocks.{layer}.ffn.key.weight"].double() for x in (before, exact.state_dict(), after))
        moved = W != E
        squares = [x.square().sum() for x in (W, E - W, M - E)]
        sums += torch.stack([*squares, moved.sum(), (moved & (M == W)).sum()])
    weight, update, lost, moved, vanished = sums.tolist()
    row = re.search(r"ffn\.key +2 +(\S+)% +(\S+)% +(\S+)%\n", printed)
    assert [float(x) for x in row.groups()] == pytest.approx(
        [100 * (update / weight) ** 0.5, 100 * (lost / update) ** 0.5, 100 * vanished / moved], abs=2e-3
    )
    assert vanished > 0
    assert f"changed    {2 * 6 + len([n for n in adapter if n in before])} of {len(before)} tensors by" in printed


def test_output_that_is_no_terminal_has_no_control_codes(paths):
    done = program([ROOT / "merge.py", *arguments(paths, "--verify")], ROOT)
    assert done.returncode == 0 and not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout + done.stderr)
    headings = [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert headings == ["base", "adapter", "changed", "written", "verified"]


def test_verify_compares_the_written_file_with_base_plus_adapter(paths, tmp_path, capsys):
    def differences(job, path):
        return [float(x) for x in re.search(r"within (\S+) of .* up to (\S+) from", verify(job, path)).groups()]

    run(*arguments(paths, "--dtype", "fp32", "--verify"))
    assert "same next token at 32 of 32 positions" in capsys.readouterr().out
    job = Merge(paths["base"], [paths["adapter"]])
    far, moved = differences(job, paths["out"])
    assert far < 1e-4 < 0.1 < moved
    assert differences(job, paths["base"]) == [moved, moved]  # the base is no merge


# ---------------------------------------------------------------- quantised bases


@pytest.mark.parametrize(("kind", "version"), [("int8", "x060"), ("int8", "x070"), ("nf4", "x070")])
def test_quant_merges_onto_the_base_as_training_saw_it(kind, make_model, tmp_path, capsys):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    save_tensors(tmp_path / "base.pth", make_model(dtype=torch.float32, n_embd=32, dim_att=32, dim_ffn=64).state_dict())
    save_trained(tmp_path / "a.pth", tmp_path / "base.pth")
    argv = ["--base_model", tmp_path / "base.pth", "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth"]
    run(*argv, "--quant", kind, "--verify")
    printed = capsys.readouterr().out
    assert f"its projections of att and ffn as they are in {kind}, dequantised" in printed
    assert float(re.search(r"within (\S+) of", printed)[1]) < 1e-4
    trained = load_model(tmp_path / "base.pth")
    quantise_model(trained, kind)
    load_adapter(trained, tmp_path / "a.pth")
    merge(trained)
    merged, base = open_tensors(tmp_path / "m.pth"), open_tensors(tmp_path / "base.pth")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert merged["emb.weight"].equal(base["emb.weight"])
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in base.items()}


@pytest.mark.parametrize("told, flags, noted", [
    ("int8", [], True), ("int8", ["--quant", "int8"], False), ("int8", ["--as", "lora"], False),
    (None, [], False), (["?"], [], False),
])  # fmt: skip
def test_an_adapter_of_a_quantised_base_is_noted_with_the_flag(told, flags, noted, base, tmp_path, capsys):
    save_trained(tmp_path / "a.pth", base, "lora", parts=())
    tensors, info = read_adapter(tmp_path / "a.pth")
    save_adapter(tmp_path / "a.pth", tensors, {**info, "tokenizer": {"kind": "byte"}, **({"quant": told} if told else {})})
    run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth", *flags)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note") and "trained on" in line]
    assert len(notes) == noted
    if noted:
        assert "on an int8 base" in notes[0] and "the full weights; --quant int8 puts it onto the dequantised base" in notes[0]
    if "lora" in flags:  # which is the same adapter, written differently
        assert (made := read_adapter(tmp_path / "m.pth")[1])["quant"] == told and made["tokenizer"] == {"kind": "byte"}


# ---------------------------------------------------------------- several adapters


def test_adapters_in_order_are_merged_as_one_after_the_other(base, tmp_path):
    names = [tmp_path / f"{x}.pth" for x in ("a", "b", "c")]
    before = base
    for name, method in zip(names, ("bone", "lora", "miss")):
        save_trained(name, before, method)
        after = tmp_path / f"on_{name.name}"
        run("--base_model", before, "--peft_checkpoint", name, "--output", after)
        before = after
    run("--base_model", base, "--peft_checkpoint", *names, "--output", tmp_path / "m.pth", "--verify")
    assert (tmp_path / "m.pth").read_bytes() == before.read_bytes()


def test_the_second_adapter_must_have_been_trained_on_the_merge_of_the_first(base, make_model, tmp_path):
    save_tensors(tmp_path / "other.pth", make_model(seed=5, dtype=torch.bfloat16).state_dict())
    save_trained(tmp_path / "a.pth", base)
    save_trained(tmp_path / "sibling.pth", base)
    save_trained(tmp_path / "stranger.pth", tmp_path / "other.pth")
    argv = ["--base_model", base, "--output", tmp_path / "m.pth", "--peft_checkpoint", tmp_path / "a.pth"]
    with pytest.raises(UserError, match=r"sibling\.pth: was trained on the base itself, not on its merge with .*a\.pth"):
        run(*argv, tmp_path / "sibling.pth")
    with pytest.raises(UserError, match=r"stranger\.pth: was trained on another base \(other\.pth\)"):
        run(*argv, tmp_path / "stranger.pth")
    assert not (tmp_path / "m.pth").exists()
    assert not list(tmp_path.glob("*.tmp"))
    run(*argv, tmp_path / "sibling.pth", tmp_path / "stranger.pth", "--force")


@each_version
def test_a_state_tuned_adapter_adds_its_tensors_in_the_models_order(base, tmp_path, capsys):
    tensors = open_tensors(base)
    states = {f"blocks.{i}.att.time_state": torch.randn(open_model(base).sizes.n_head, 8, 8) for i in (0, 1)}
    save_adapter(tmp_path / "s.pth", states, {"method": "none", "options": {}, "base": {"fingerprint": fingerprint(tensors)}})
    torch.save(states, tmp_path / "foreign.pth")
    for name in ("s", "foreign"):
        run("--base_model", base, "--state_checkpoint", tmp_path / f"{name}.pth", "--output", tmp_path / f"{name}_m.pth")
        assert re.search(r"\n +time +2 +new ", capsys.readouterr().out)  # the base has none to compare with
        kind, sizes, merged, _ = open_model(tmp_path / f"{name}_m.pth")
        assert list(merged) == list(kind.shapes(sizes))
        assert sizes.time_state
        assert {n: t for n, t in merged.items() if n not in states}.keys() == tensors.keys()
        assert all(merged[n].equal(t.bfloat16()) for n, t in states.items())
    assert (tmp_path / "s_m.pth").read_bytes() == (tmp_path / "foreign_m.pth").read_bytes()


@each_version
@torch.no_grad()
def test_states_are_written_alone_in_the_form_that_other_programs_read(base, tmp_path, capsys):
    """As a .pth for the rwkv package, by the recipe of its chats; as a .st with the last two dimensions swapped, as web-rwkv's
    converter has it; each of them is read back as the same adapter."""
    from safetensors.torch import load_file

    H = open_model(base).sizes.n_head
    states = {f"blocks.{i}.att.time_state": torch.randn(H, 8, 8).half().float() for i in (0, 1)}
    base_info = {"fingerprint": fingerprint(open_tensors(base))}
    save_adapter(tmp_path / "s.pth", states, {"method": "none", "options": {}, "base": base_info})
    argv = ["--base_model", base, "--peft_checkpoint", tmp_path / "s.pth"]
    for name in ("alone.pth", "alone.st"):
        run(*argv, "--as", "state", "--output", tmp_path / name)
    run(*argv, "--output", tmp_path / "m.pth", "--verify")
    assert "initial state" in capsys.readouterr().out
    run(*argv, "--output", tmp_path / "m.st")
    alone, web, inside = (load_file(tmp_path / "alone.st"), torch.load(tmp_path / "alone.pth"), load_file(tmp_path / "m.st"))
    for name, state in states.items():
        assert alone[name].equal(state.half().transpose(1, 2))
        assert inside[name].equal(state.half().transpose(1, 2))
        assert web[name].equal(state)
        assert open_model(tmp_path / "m.st").tensors[name].equal(state.half())
    for name in ("alone.pth", "alone.st"):
        run("--base_model", base, "--state_checkpoint", tmp_path / name, "--output", tmp_path / f"{name}_m.pth")
        assert (tmp_path / f"{name}_m.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()
    with pytest.raises(UserError, match="holds no trained initial state"):
        run("--base_model", base, "--as", "state", "--output", tmp_path / "none.pth")


# ---------------------------------------------------------------- RWKV-PEFT's adapters


LAYERS = ["blocks.0.att.receptance", "blocks.1.att.output", "blocks.0.ffn.key", "blocks.1.ffn.value"]


def foreign_case(kind: str, W: torch.Tensor):
    """Tensors of RWKV-PEFT for one projection, and W' by the documented formula in float64 (r = 8 divides, as it must there)."""
    out, in_ = W.shape
    if kind in ("bone", "disha"):  # the weight guide: block (i, j) of W is multiplied by B_j
        B = 0.1 * torch.randn(in_ // 8, 8, 8, dtype=torch.float64)
        blocks = W.view(out // 8, 8, in_ // 8, 8).permute(0, 2, 1, 3)
        return {f".{kind}": B}, (blocks + blocks @ B + B).permute(0, 2, 1, 3).reshape(out, in_)
    if kind in ("miss", "miss_disha"):  # y = x W^T + (sum of x's pieces) D
        D = 0.1 * torch.randn(8, out, dtype=torch.float64)
        x = torch.eye(in_, dtype=torch.float64)
        y = x @ W.T + x.view(in_, in_ // 8, 8).sum(1) @ D
        return {".disha" if kind == "miss_disha" else ".bone": D}, y.T
    A, B, A0, B0 = (0.3 * torch.randn(*shape, dtype=torch.float64) for shape in ((8, in_), (out, 8), (8, in_), (out, 8)))
    if kind == "lora":
        return {".lora_A": A, ".lora_B": B}, W + (24 / 8) * B @ A
    return {".lora_A": A, ".lora_B": B, ".init_lora_A": A0, ".init_lora_B": B0}, W - B0 @ A0 + B @ A


@pytest.mark.parametrize(("version", "prefix"), [("x070", ""), ("x060", "model.")])
@pytest.mark.parametrize("kind", ["bone", "disha", "miss", "miss_disha", "lora", "pissa"])
def test_adapters_of_rwkv_peft_are_merged_by_their_documented_formulas(kind, version, prefix, make_model, tmp_path, capsys):
    save_tensors(tmp_path / "base.pth", make_model().state_dict())  # float64: nothing is rounded
    base = open_tensors(tmp_path / "base.pth")
    trained, init, wanted = {}, {}, {}
    for layer in LAYERS:
        tensors, wanted[f"{layer}.weight"] = foreign_case(kind, base[f"{layer}.weight"])
        trained |= {prefix + layer + key: t for key, t in tensors.items() if "init" not in key}
        init |= {f"model.{layer}{key}": t for key, t in tensors.items() if "init" in key}
    for name in ("blocks.0.att.x_w" if version == "x070" else "blocks.0.att.time_maa_x", "blocks.1.ln2.weight", "ln_out.bias"):
        wanted[name] = torch.randn_like(base[name])
        trained[prefix + name] = wanted[name]
    torch.save(trained, tmp_path / "foreign.pth")
    torch.save(init, tmp_path / "init_pissa.pth")
    more = {
        "lora": ["--lora_alpha", "24", "--type", "lora"],
        "pissa": ["--lora_init", tmp_path / "init_pissa.pth", "--type", "pissa"],
    }
    argv = ["--base_model", tmp_path / "base.pth", "--lora_checkpoint", tmp_path / "foreign.pth", "--output", tmp_path / "m.pth"]
    run(*argv, *more.get(kind, []))
    assert "of RWKV-PEFT, on an unknown base" in capsys.readouterr().out
    merged = open_tensors(tmp_path / "m.pth")
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted.get(name, base[name]), rtol=1e-12, atol=1e-12, msg=name)
    foreign = Foreign(24.0 if kind == "lora" else None, tmp_path / "init_pissa.pth" if kind == "pissa" else "")
    model = load_model(tmp_path / "base.pth")
    load_adapter(model, tmp_path / "foreign.pth", foreign=foreign)  # the start of a training, too
    merge(model)
    assert all(torch.allclose(t, merged[name], rtol=1e-12, atol=1e-12) for name, t in model.state_dict().items())


def refused_foreign(tmp_path, base, tensors, *more) -> str:
    torch.save(tensors, tmp_path / "foreign.pth")
    with pytest.raises(UserError) as caught:
        run("--base_model", base, "--peft_checkpoint", tmp_path / "foreign.pth", "--output", tmp_path / "m.pth", *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.pth").exists()
    return str(caught.value)


def test_what_a_foreign_adapter_does_not_say_is_asked_for(base, tmp_path):
    key = "blocks.0.att.key"
    lora = {f"{key}.lora_A": torch.zeros(2, 24), f"{key}.lora_B": torch.zeros(24, 2)}
    bone = {f"{key}.bone": torch.zeros(3, 8, 8)}
    init = {f"model.{key}.init_lora_A": torch.zeros(2, 24), f"model.{key}.init_lora_B": torch.zeros(24, 2)}
    torch.save(init, tmp_path / "init.pth")
    torch.save({name.replace("key", "value"): t for name, t in init.items()}, tmp_path / "other.pth")

    def refused(tensors, *more):
        return refused_foreign(tmp_path, base, tensors, *more)

    assert "does not say its alpha; give --lora_alpha" in refused(lora)
    assert "--lora_alpha must be above 0, not 0.0" in refused(lora, "--lora_alpha", "0")
    assert "holds lora, not --type bone" in refused(lora, "--type", "bone", "--lora_alpha", "4")
    assert "holds bone, not --type lora" in refused(bone, "--type", "lora")
    assert "bone has no alpha; leave --lora_alpha 16 out" in refused(bone, "--lora_alpha", "16")
    assert "is no PiSSA, which --lora_init is for" in refused(bone, "--lora_init", tmp_path / "init.pth")
    assert "--lora_init is another run's: 4 names differ" in refused(lora, "--lora_init", tmp_path / "other.pth")
    assert "init.none: no such file" in refused(lora, "--lora_init", tmp_path / "init.none")
    assert "holds tensors of bone and lora" in refused(bone | lora, "--lora_alpha", "4")
    half = {f"{key}.lora_A": torch.zeros(2, 24)}
    assert "lacks 1 of its tensors (blocks.0.att.key.lora_B)" in refused(half, "--lora_alpha", "4")
    assert "blocks.0.att.key.bone is torch.float32 (4, 8, 8)" in refused({f"{key}.bone": torch.zeros(4, 8, 8)})
    assert "blocks.0.att.key.bone is torch.float32 (3, 8, 4)" in refused({f"{key}.bone": torch.zeros(3, 8, 4)})
    assert "1 tensors that this model has no place for (blocks.0.att.key.x)" in refused({f"{key}.x": torch.zeros(3)})
    assert "no place for (blocks.2.att.key.bone)" in refused({"blocks.2.att.key.bone": torch.zeros(3, 8, 8)})


def test_flags_must_not_contradict_an_adapter_of_ours(base, tmp_path):
    save_trained(tmp_path / "a.pth", base, "lora")  # alpha = r
    argv = ["--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth"]
    with pytest.raises(UserError, match="lora has alpha 5; leave --lora_alpha 16 out"):
        run(*argv, "--lora_alpha", "16")
    with pytest.raises(UserError, match="holds itself how it started; leave --lora_init out"):
        run(*argv, "--lora_init", base)
    run(*argv, "--lora_alpha", "5", "--type", "lora", "--quant", "none", "--device", "cpu")


# ---------------------------------------------------------------- as a LoRA


def updates(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = load_model(base, torch.float64)
    weights = {name: layer.detach().clone() for name, layer in model.state_dict().items()}
    load_adapter(model, adapter)
    merge(model)
    return {name: t - weights[name] for name, t in model.state_dict().items() if not t.equal(weights[name])}


LORAS = [("miss", {}), ("miss", {"mini_r": 8}), *((name, {}) for name in ("lora", "rslora", "pissa", "olora"))]


@pytest.mark.parametrize(("method", "options"), LORAS)
def test_methods_that_are_loras_are_written_as_one_exactly(method, options, base, tmp_path):
    save_trained(tmp_path / "a.pth", base, method, **options)
    assert (read_info(tmp_path / "a.pth") or {})["options"].items() >= options.items()
    rank = 2 * R if method in ("pissa", "olora") else R
    run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--as", "lora", "--output", tmp_path / "lora.pth")
    wanted, ours = updates(base, tmp_path / "a.pth"), updates(base, tmp_path / "lora.pth")
    assert wanted.keys() == ours.keys()
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    tensors, info = read_adapter(tmp_path / "lora.pth")
    assert info["options"] == {"r": rank, "alpha": float(rank), "lora_dropout": 0.0}
    A, B = (tensors[f"blocks.0.ffn.key.lora_{x}"].double() for x in "AB")
    torch.testing.assert_close(B @ A, wanted["blocks.0.ffn.key.weight"], rtol=1e-5, atol=1e-6)  # as any program of LoRA has it
    if method == "miss":
        assert set(A.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method", ["bone", "bone_col", "dora", "lora"])
def test_any_method_is_cut_to_the_largest_directions_with_the_error_stated(method, base, tmp_path, capsys):
    save_trained(tmp_path / "a.pth", base, method, parts=())
    argv = ["--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--as", "lora", "--overwrite", "--output"]
    run(*argv, tmp_path / "lora.pth", "--rank", "3")
    stated = float(re.search(r" all +(\S+)%\n", capsys.readouterr().out)[1]) / 100
    wanted, ours = updates(base, tmp_path / "a.pth"), updates(base, tmp_path / "lora.pth")
    missing = sum((wanted[n] - ours[n]).square().sum() for n in wanted)
    best = sum(torch.linalg.svdvals(t)[3:].square().sum() for t in wanted.values())
    total = sum(t.square().sum() for t in wanted.values())
    assert stated == pytest.approx((missing / total).sqrt().item(), abs=2e-5)
    assert best.sqrt() * (1 - 1e-6) <= missing.sqrt() <= best.sqrt() * 1.01
    run(*argv, tmp_path / "again.pth", "--rank", "3")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "lora.pth").read_bytes()
    run(*argv, tmp_path / "full.pth", "--rank", "40")  # more than any projection has
    assert all(torch.allclose(wanted[n], t, rtol=1e-4, atol=1e-5) for n, t in updates(base, tmp_path / "full.pth").items())


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "bone_col"])
def test_folders_of_peft_are_written_and_merged_like_the_adapter(method, base, tmp_path):
    save_trained(tmp_path / "a.pth", base, method, parts=["ln"])
    argv = ["--base_model", base, "--peft_checkpoint"]
    run(*argv, tmp_path / "a.pth", "--as", "peft", "--output", tmp_path / "folder")
    for name in ("a.pth", "folder"):
        run(*argv, tmp_path / name, "--dtype", "fp32", "--output", tmp_path / f"{name}.merged")
    a, b = (open_tensors(tmp_path / f"{name}.merged") for name in ("a.pth", "folder"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-6) for name in a)
    with pytest.raises(UserError, match=r"folder exists; give another name, or --overwrite"):
        run(*argv, tmp_path / "a.pth", "--as", "peft", "--output", tmp_path / "folder")
    with pytest.raises(UserError, match=r"a\.pth is .*a\.pth itself"):
        run(*argv, tmp_path / "a.pth", "--as", "peft", "--output", tmp_path / "a.pth", "--overwrite")


def test_row_bone_goes_to_peft_by_way_of_a_lora_only(base, tmp_path):
    save_trained(tmp_path / "a.pth", base, parts=())
    argv = ["--base_model", base, "--output", tmp_path / "out", "--peft_checkpoint"]
    with pytest.raises(UserError, match="peft has no method bone; merge the adapter instead, or write it as a LoRA first"):
        run(*argv, tmp_path / "a.pth", "--as", "peft")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- dtypes and formats


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_dtype_is_that_of_every_tensor_rounded_once_from_the_exact_one(flag, dtype, paths):
    run(*arguments(paths, "--dtype", flag))
    exact = load_model(paths["base"], torch.float64)
    load_adapter(exact, paths["adapter"])
    merge(exact)
    merged = open_tensors(paths["out"])
    for name, wanted in exact.state_dict().items():
        assert merged[name].dtype == dtype
        error = (merged[name].double() - wanted).abs()
        assert (error <= wanted.abs() * max(torch.finfo(dtype).eps / 2, 1e-6) * 1.01 + 1e-6).all(), name


def test_what_float16_cannot_hold_is_refused(make_model, tmp_path):
    tensors = make_model(dtype=torch.float32).state_dict()
    tensors["head.weight"][3, 4] = -1e5
    save_tensors(tmp_path / "base.pth", tensors)
    with pytest.raises(UserError, match=r"head\.weight reaches 1e\+05, beyond torch\.float16; use --dtype bf16 or fp32"):
        run("--base_model", tmp_path / "base.pth", "--output", tmp_path / "m.pth", "--dtype", "fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["base.pth"]


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "fp32"], ["--as", "lora"]])
def test_an_adapter_that_diverged_is_refused(flags, base, tmp_path):
    tensors = adapter_tensors(save_trained(tmp_path / "a.pth", base, parts=()))
    tensors["blocks.1.att.key.bone"][0, 0, 0] = float("nan")
    save_adapter(tmp_path / "a.pth", tensors, read_adapter(tmp_path / "a.pth")[1])
    with pytest.raises(UserError, match=r"a\.pth: .*blocks\.1\.att\.key.* holds NaN"):
        run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "m.pth", *flags)
    assert not (tmp_path / "m.pth").exists()


def web_rwkv_converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What web-rwkv's convert_safetensors.py makes of a .pth; the converter in Rust asks for bfloat16."""
    converted = {}
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        transposed = any(part in name for part in ("w1", "w2", "a1", "a2", "g1", "g2", "v1", "v2", "time_state"))
        converted[name] = tensor.half().transpose(-2, -1) if transposed else tensor.half()
    return converted


@each_version
def test_safetensors_are_what_web_rwkvs_converter_makes_of_the_merged_pth(version, paths, tmp_path):
    from safetensors.torch import load_file, safe_open

    run(*arguments(paths))
    wanted = web_rwkv_converter(torch.load(paths["out"], weights_only=True))
    run("--base_model", paths["out"], "--output", tmp_path / "m.st")
    run("--base_model", paths["out"], "--output", tmp_path / "same.bin", "--format", "safetensors")
    assert (tmp_path / "m.st").read_bytes() == (tmp_path / "same.bin").read_bytes()
    ours = load_file(tmp_path / "m.st")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].dtype == torch.float16
        assert ours[name].equal(tensor), name
    if version == "x070":  # web-rwkv reads the rank of v in layer 1; layer 0's tensors, which it passes over, are kept
        assert ours["blocks.1.att.v1"].shape == (5, 24) and "blocks.0.att.v1" in ours
    with safe_open(tmp_path / "m.st", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # merging straight into it rounds once, from float32 to float16, and is nearer to the exact weights
    run("--base_model", paths["base"], "--peft_checkpoint", paths["adapter"], "--output", tmp_path / "direct.st", "--verify")
    exact = load_model(paths["base"], torch.float64)
    load_adapter(exact, paths["adapter"])
    merge(exact)
    key = "blocks.0.ffn.key.weight"
    wanted = exact.state_dict()[key]
    error, direct = ((load_file(tmp_path / name)[key].double() - wanted).norm() for name in ("m.st", "direct.st"))
    assert direct < 0.3 * error


@each_version
def test_safetensors_and_back_is_the_same_model_in_the_order_that_rwkv_wants(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(dtype=torch.float16)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    run("--base_model", tmp_path / "m.pth", "--output", tmp_path / "m.safetensors")
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "sorted.st")  # sorted by name: time_first before time_mix
    run("--base_model", tmp_path / "sorted.st", "--output", tmp_path / "back.pth")
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()
    save_trained(tmp_path / "a.pth", tmp_path / "m.pth")  # and a base for merging like any other
    run("--base_model", tmp_path / "sorted.st", "--peft_checkpoint", tmp_path / "a.pth", "--output", tmp_path / "merged.pth")


# ---------------------------------------------------------------- what other programs demand of a merged .pth (formats.md, 1)


@pytest.mark.parametrize(("version", "sizes"), [("x060", {}), ("x070", {}), ("x070", {"v_in_layer_0": False})])
def test_a_merged_file_meets_what_rwkv_web_rwkv_and_rwkv_cpp_demand(version, sizes, make_model, tmp_path):
    base, out = tmp_path / "base.pth", tmp_path / "m.pth"
    save_tensors(base, make_model(dtype=torch.bfloat16, **sizes).state_dict())
    save_trained(tmp_path / "a.pth", base)
    run("--base_model", base, "--peft_checkpoint", tmp_path / "a.pth", "--output", out)
    tensors = torch.load(out, map_location="cpu", weights_only=True)
    names = list(tensors)
    assert names == list(torch.load(base, weights_only=True))
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())  # rwkv: tensors only
    layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))  # rwkv: of any key
    assert layers == sum(f"blocks.{i}.ln1.weight" in names for i in range(layers + 1)) == 2  # rwkv.cpp: counts ln1
    assert not any("time_state" in name for name in names)  # would switch initial states on
    if version == "x060":
        assert {"blocks.0.att.ln_x.weight", "blocks.0.att.gate.weight", "blocks.0.att.time_maa_x"} <= set(names)  # the version
        assert min(i for i, n in enumerate(names) if "time_maa" in n) < min(i for i, n in enumerate(names) if "time_faaaa" in n)
        assert len(names) == 28 * layers + 6  # rwkv.cpp writes every key that it finds
    else:
        assert {"blocks.0.att.k_k", "blocks.0.att.r_k"} <= set(names)
        assert len(names) == 33 * layers + (6 if sizes.get("v_in_layer_0", True) else 3)
    web_rwkv_converter(tensors)  # asserts bfloat16
    for name, tensor in tensors.items():  # both converters take the bytes as they lie
        assert tensor.is_contiguous() and tensor.storage_offset() == 0, name


def rwkv_cpp_converter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What rwkv.cpp's convert_pytorch_to_ggml.py writes in FP32, in order. Of RWKV-7 it joins a layer's x_* as they come."""
    joined: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        joined.setdefault(re.sub(r"att\.x_\w$", "att.x_rwkvag", name), []).append(tensor.float())
    converted = {}
    for name, parts in joined.items():
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if ".time_" in name:
            tensor = tensor.squeeze()
        if ".time_faaaa" in name:
            tensor = tensor.unsqueeze(-1)
        if re.search(r"\.time_maa_w[12]|\.time_decay_w|\.[wavg][12]$", name):
            tensor = tensor.transpose(-1, -2)
        converted[name] = tensor
    return converted


@pytest.mark.parametrize("name", ["tiny-rwkv6-1m", "tiny-rwkv7-834k", "tiny-rwkv7-gsm8k"])
@pytest.mark.parametrize("by", ["st", "pth"])
def test_rwkv_cpps_conversion_of_a_real_file_that_was_written_again_is_the_same(by, name, data, tmp_path):
    """Also by way of safetensors, whose names are sorted: the C++ wants a layer's x_* in the order r, w, k, v, a, g."""
    base = data / f"{name}.pth"
    if by == "pth":
        run("--base_model", base, "--output", tmp_path / "wide.pth", "--dtype", "fp32")
    else:
        run("--base_model", base, "--output", tmp_path / "wide.st", "--format", "safetensors")
    run("--base_model", tmp_path / f"wide.{by}", "--output", tmp_path / "same.pth", "--dtype", "bf16")
    before, after = (rwkv_cpp_converter(torch.load(path, weights_only=True)) for path in (base, tmp_path / "same.pth"))
    assert list(after) == list(before) or (by == "st" and after.keys() == before.keys())
    for key, tensor in before.items():  # safetensors are float16, whose small numbers are coarse
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0 if by == "pth" else 1e-7, msg=key)
    if "rwkv7" in name:
        tensors = open_tensors(base)
        for i, letter in enumerate("rwkvag"):
            assert before["blocks.1.att.x_rwkvag"][i].equal(tensors[f"blocks.1.att.x_{letter}"][0].float())


# ---------------------------------------------------------------- what is refused


def test_the_output_is_never_an_input_by_any_name(paths, tmp_path):
    (tmp_path / "link.pth").symlink_to(paths["base"])
    (tmp_path / "hard.pth").hardlink_to(paths["adapter"])
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nothing.pth")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()}
    for out in (paths["base"], paths["adapter"], "link.pth", "hard.pth", "x/../base.pth", f"../{tmp_path.name}/base.pth"):
        with pytest.raises(UserError, match=r"itself; give another name"):
            run(*arguments({**paths, "out": tmp_path / out}, "--overwrite"))
    with pytest.raises(UserError, match="is not a file"):
        run(*arguments({**paths, "out": tmp_path}, "--overwrite"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()} == before


def test_an_existing_output_is_kept_unless_overwrite_is_given(paths):
    paths["out"].write_bytes(b"precious")
    with pytest.raises(UserError, match=r"merged\.pth exists; give another name, or --overwrite"):
        run(*arguments(paths))
    assert paths["out"].read_bytes() == b"precious"
    run(*arguments(paths, "--overwrite"))
    first = paths["out"].read_bytes()
    run(*arguments(paths, "--overwrite"))
    assert len(first) > 10_000 and paths["out"].read_bytes() == first  # the same bytes each time


def test_an_adapter_of_another_base_is_refused_unless_forced(paths, make_model, tmp_path):
    save_tensors(tmp_path / "other.pth", make_model(seed=9, dtype=torch.bfloat16).state_dict())
    with pytest.raises(UserError, match=r"adapter\.pth: was trained on another base \(base\.pth\)"):
        run(*arguments({**paths, "base": tmp_path / "other.pth"}))
    assert not paths["out"].exists()
    run(*arguments({**paths, "base": tmp_path / "other.pth"}, "--force"))


BAD = [
    ([], "the following arguments are required: --base_model, --output"),
    (["--base_model", "base.pth", "--output", "m.pth"], "nothing to do"),
    (["--base_model", "none.pth", "--output", "m.pth", "--dtype", "fp32"], "none.pth: no such file"),
    (["--base_model", "base.pth", "--peft_checkpoint", "none.pth", "--output", "m.pth"], "none.pth: no such file"),
    (["--base_model", "adapter.pth", "--peft_checkpoint", "adapter.pth", "--output", "m.pth"], "model without emb.weight"),
    (["--base_model", "base.pth", "--peft_checkpoint", "base.pth", "--output", "base.pth"], "itself"),
    (["--base_model", "base.pth", "--peft_checkpoint", "--output", "m.pth"], "--peft_checkpoint"),
    ([..., "--quant", "fp4"], "invalid choice: 'fp4'"),
    ([..., "--dtype", "int8"], "invalid choice: 'int8'"),
    ([..., "--device", "abacus"], "--device abacus: this torch has no such device"),
    ([..., "--rank", "4"], "--rank is for --as lora"),
    ([..., "--as", "lora", "--rank", "-1"], "--rank must be at least 1"),
    ([..., "--as", "lora", "--dtype", "fp32"], "writes an adapter"),
    ([..., "adapter.pth", "--as", "lora"], "unknown word adapter.pth"),
    ([..., "--outptu", "x"], "unknown flag --outptu; did you mean --output?"),
    (["--base_model", "base.pth", "--peft_checkpoint", "a.pth", "b.pth", "--as", "lora", "--output", "m.pth"], "of one adapter"),
    (["--base_model", "base.pth", "--as", "lora", "--output", "m.pth"], "and 0 are given"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_gives_one_line_and_touches_nothing(argv, message, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["--base_model", "base.pth", "--peft_checkpoint", "adapter.pth", "--output", "m.pth"]
    argv = usual + argv[1:] if argv[:1] == [...] else argv
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        merging.main(argv)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_merging_needs_torch_and_no_engine_and_no_compiler(paths):
    imports = (
        "import sys; from rwkv_bone.merging import command; command.main(sys.argv[1:]);"
        "print(sorted({'lightning', 'deepspeed', 'transformers', 'sympy', 'safetensors', 'numba'} & {*sys.modules}))"
    )
    environment = {**os.environ, "PATH": "/nonexistent", "XDG_CACHE_HOME": "/proc/nonexistent"}
    argv = [sys.executable, "-c", imports, *map(str, arguments(paths, "--verify"))]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


# ---------------------------------------------------------------- full disks, kills, memory


def test_a_full_disk_gives_one_line_code_2_and_leaves_nothing(paths, tmp_path):
    argv = [sys.executable, "merge.py", *map(str, arguments(paths))]
    limited = f"import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, 9_999)); os.execv({argv[0]!r}, {argv!r})"
    done = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {paths['out']}: cannot be written (File too large); nothing was changed\n"
    assert not paths["out"].exists()
    assert not list(tmp_path.glob("*.tmp"))


def large_model(path: Path, **sizes: int):
    """Random bf16 weights, of the World vocabulary."""
    sizes = RWKV7.new_sizes(vocab_size=65536, **sizes)
    layout = {name: (torch.bfloat16, shape) for name, shape in RWKV7.shapes(sizes).items()}
    write_pth(path, layout, ((name, torch.empty(shape, dtype=dtype).normal_(0, 0.02)) for name, (dtype, shape) in layout.items()))
    return sizes


def large_adapter(path: Path, base: Path, sizes) -> None:
    tensors = {}
    for name, shape in RWKV7.shapes(sizes).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            tensors[name.removesuffix("weight") + "bone"] = 1e-3 * torch.randn(shape[1] // 64, 64, 64)
    known = {"fingerprint": fingerprint(open_tensors(base))}
    save_adapter(path, tensors, {"method": "bone", "options": {"r": 64}, "base": known})


PEAK = """
import sys, torch
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
from rwkv_bone.merging.command import main
main(sys.argv[1:])
print(peak() - before)
"""


def stopped_half_way(argv, out: Path, by: signal.Signals) -> tuple[int, int, str]:
    """merge.py, sent a signal when it has written 100 MB: its id, exit code and last words."""
    command = [sys.executable, "merge.py", *map(str, argv)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not any(p.stat().st_size > 100e6 for p in out.parent.glob("*.tmp")):
            assert process.poll() is None, "it was done before it could be stopped"
            time.sleep(0.01)
        process.send_signal(by)
        words = process.stderr.read().decode()
    return process.pid, process.returncode, words


def peak_of(argv) -> float:
    """MiB that merge.py's peak memory is above what importing torch takes, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", PEAK, *map(str, argv)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_verify_takes_the_memory_of_two_blocks_and_the_head(tmp_path):
    base, adapter, out = tmp_path / "base.pth", tmp_path / "adapter.pth", tmp_path / "m.pth"
    sizes = large_model(base, n_layer=24, n_embd=256, dim_ffn=896)
    large_adapter(adapter, base, sizes)
    whole = {name: 4 * math.prod(shape) / 2**20 for name, shape in RWKV7.shapes(sizes).items()}  # MiB in float32
    blocks = sum(size for name, size in whole.items() if name.startswith("blocks."))
    logits = 3 * 32 * sizes.vocab_size * 4 / 2**20
    bound = whole["head.weight"] + 2 * blocks / sizes.n_layer + logits
    found = peak_of(["--base_model", base, "--peft_checkpoint", adapter, "--output", out, "--verify"])
    assert found < bound + 60, (found, bound)  # 60: torch's code that is read in, and a piece of the file


@pytest.mark.slow
def test_merging_400_mb_takes_less_than_250_mb_and_can_be_stopped_at_any_time(tmp_path):
    base, adapter, out = tmp_path / "base.pth", tmp_path / "adapter.pth", tmp_path / "out" / "m.pth"
    large_adapter(adapter, base, large_model(base, n_layer=25, n_embd=640, dim_ffn=2240))
    assert 400e6 < base.stat().st_size < 450e6
    argv = ["--base_model", base, "--peft_checkpoint", adapter, "--output", out]
    for by, code, words in ((signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "interrupted\n")):
        assert stopped_half_way(argv, out, by)[1:] == (code, words)
        assert list(out.parent.iterdir()) == []
    pid, _, _ = stopped_half_way(argv, out, signal.SIGKILL)
    assert [p.name for p in out.parent.iterdir()] == [f"m.pth.{pid}.tmp"]
    assert peak_of(argv) < 250
    assert open_model(out).tensors.keys() == open_model(base).tensors.keys()


# ---------------------------------------------------------------- docs/merging.md


@pytest.mark.slow
def test_every_command_of_the_documentation_works(make_model, tmp_path):
    for folder in ("out", "theirs"):
        (tmp_path / folder).mkdir()
    base = tmp_path / "base.pth"
    save_tensors(base, make_model(dtype=torch.bfloat16).state_dict())
    save_trained(tmp_path / "out" / "rwkv-0.pth", base)
    run("--base_model", base, "--peft_checkpoint", tmp_path / "out" / "rwkv-0.pth", "--output", tmp_path / "merged.pth")
    save_trained(tmp_path / "out" / "second.pth", tmp_path / "merged.pth")
    A, B, A0, B0 = (torch.randn(*shape) for shape in ((8, 24), (24, 8), (8, 24), (24, 8)))
    key = "blocks.0.att.key"
    for name in ("lora", "pissa"):
        torch.save({f"{key}.lora_A": A, f"{key}.lora_B": B}, tmp_path / "theirs" / f"{name}.pth")
    torch.save({f"model.{key}.init_lora_A": A0, f"model.{key}.init_lora_B": B0}, tmp_path / "theirs" / "init_pissa.pth")
    text = (ROOT / "docs" / "merging.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) == 7
    for line in commands:
        python, script, *argv = line.split()
        assert (python, script) == ("python", "merge.py")
        done = program([ROOT / script, *argv], tmp_path)
        assert done.returncode == 0, line + done.stderr
    for flag in re.findall(r"`(--\w+)", text):
        assert flag in merging.make_parser().format_help(), flag
