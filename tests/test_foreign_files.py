"""Adapters of other programs are read as what they are, and a file that is none is named for what it is."""

import json
import re

import pytest
import torch
from conftest import small_model
from safetensors.torch import save_file

from rwkv_bone.errors import UserError, run
from rwkv_bone.files.adapters import load_adapter, read_adapter, save_adapter
from rwkv_bone.files.models import identity, load_model
from rwkv_bone.files.pth import open_tensors, save_tensors
from rwkv_bone.interop.rwkv_peft import Foreign
from rwkv_bone.merging.command import main as merge
from rwkv_bone.peft import METHODS, adapter_tensors, inject
from rwkv_bone.training.run import main as train
from tests.runs import arguments, make_world

R = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("foreign"), rows=8)


def pairs(world) -> dict[str, torch.Tensor]:
    """lora_A and lora_B for each projection of the world's base, under RWKV-PEFT's names."""
    torch.manual_seed(1)
    out = {}
    for name, w in open_tensors(world / "base.pth").items():
        if w.dim() == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            out |= {f"{layer}.lora_A": torch.randn(R, w.shape[1]) / 9, f"{layer}.lora_B": torch.randn(w.shape[0], R) / 9}
    return out


def peft_folder(world, folder, kind: str, init) -> None:
    """A MISS or, as peft 0.14 to 0.18 called it, BONE."""
    torch.manual_seed(2)
    tensors = {}
    for name, w in open_tensors(world / "base.pth").items():
        if name.endswith("att.key.weight"):
            shape = (w.shape[0] // R, R, R) if init == "bat" else (R, w.shape[0])
            tensors[f"base_model.model.{name.removesuffix('.weight')}.{kind.lower()}_block"] = torch.randn(shape)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": kind, "r": R, "init_weights": init, "target_modules": ["key"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("init", [True, "bat"])
def test_a_peft_folder_of_type_bone_is_read_like_its_miss(init, world, tmp_path):
    for kind in ("MISS", "BONE"):
        peft_folder(world, tmp_path / kind, kind, init)
    (miss, as_miss), (bone, as_bone) = read_adapter(tmp_path / "MISS"), read_adapter(tmp_path / "BONE")
    assert as_miss == as_bone and as_bone["method"] == ("bone_col" if init == "bat" else "miss")
    assert list(miss) == list(bone) and all(torch.equal(miss[name], bone[name]) for name in miss)


def test_the_file_of_a_peft_folder_stands_for_the_folder(world, tmp_path):
    peft_folder(world, tmp_path / "f", "MISS", True)
    file = tmp_path / "f" / "adapter_model.safetensors"
    tensors, info = read_adapter(tmp_path / "f")
    named, said = read_adapter(file)
    assert info == said and all(torch.equal(named[name], tensors[name]) for name in tensors)
    (tmp_path / "f" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(file)


def test_a_pissa_without_its_initial_values_asks_for_them_and_never_for_an_alpha(world, tmp_path):
    save_tensors(tmp_path / "rwkv-0.pth", pairs(world))
    for told in (Foreign(method="pissa"), Foreign(32.0, method="pissa")):
        with pytest.raises(UserError, match="--pissa_init") as caught:
            read_adapter(tmp_path / "rwkv-0.pth", told)
        assert "alpha" not in str(caught.value)
    with pytest.raises(UserError, match=r"--lora_alpha.* --pissa_init"):  # it may be either
        read_adapter(tmp_path / "rwkv-0.pth")
    save_tensors(tmp_path / "init_pissa.pth", {name.replace(".lora_", ".init_lora_"): t for name, t in pairs(world).items()})
    with pytest.raises(UserError, match=r"--pissa_init \(it lies beside it"):
        read_adapter(tmp_path / "rwkv-0.pth")
    with pytest.raises(SystemExit) as ended:
        run(lambda: merge([f"--base_model={world}/base.pth", f"--peft_checkpoint={tmp_path}/rwkv-0.pth", "--type=pissa",
                           f"--output={tmp_path}/o.pth"]))  # fmt: skip
    assert ended.value.code == 2 and not (tmp_path / "o.pth").exists()


def test_rwkv_pefts_merging_line_is_taken(world, tmp_path):
    save_tensors(tmp_path / "l.pth", pairs(world))
    words = f"--base_model {world}/base.pth --lora_init none --lora_checkpoint {tmp_path}/l.pth --output {tmp_path}/o.pth"
    assert merge([*words.split(), "--quant", "none", "--type", "lora", "--lora_alpha", "16", "--device", "cpu"]) == 0


@pytest.mark.parametrize("column", [False, True], ids=["(out,)", "(out, 1)"])
def test_lora_m_is_the_magnitude_of_dora(column, world, tmp_path):
    tensors = pairs(world)
    for name in [name for name in tensors if name.endswith("lora_B")]:
        m = torch.rand(len(tensors[name])) + 0.5
        tensors[name.replace("lora_B", "lora_M")] = m[:, None] if column else m
    save_tensors(tmp_path / "d.pth", tensors)
    model = load_model(world / "base.pth")
    assert load_adapter(model, tmp_path / "d.pth", foreign=Foreign(lora_alpha=16.0))["method"] == "dora"
    name, base = "blocks.0.att.key", open_tensors(world / "base.pth")
    w = base[f"{name}.weight"].double() + 16 / R * tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()
    expected = tensors[f"{name}.lora_M"].double().view(-1, 1) * w / w.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.get_submodule(name).merged_weight().double(), expected, rtol=0, atol=1e-5)


def test_a_dora_by_columns_is_refused(world, tmp_path):
    tensors = pairs(world)
    some = next(name for name in tensors if name.endswith("lora_A"))
    save_tensors(tmp_path / "d.pth", tensors | {some.replace("lora_A", "lora_M"): torch.ones(1, tensors[some].shape[1])})
    with pytest.raises(UserError, match="scales the columns"):
        read_adapter(tmp_path / "d.pth", Foreign(lora_alpha=16.0))


WIDTHS = {"x060": 28, "x070": 32}  # of the channel mixing: 3.5 and 4 times n_embd, as releases have them


@pytest.mark.parametrize(("version", "other"), [("x060", "x070"), ("x070", "x060")])
def test_an_adapter_or_a_state_of_the_other_version_is_refused_in_a_line(version, other, tmp_path):
    for name in (version, other):
        sizes = {"n_embd": 8, "dim_att": 8, "dim_ffn": WIDTHS[name], "head_size": 4 if name == version else 8}
        save_tensors(tmp_path / f"{name}.pth", small_model(version=name, **sizes).state_dict())
    base, theirs = load_model(tmp_path / f"{version}.pth"), load_model(tmp_path / f"{other}.pth")
    states = {name: theirs.get_parameter(name).detach() for name in theirs.add_initial_state()}
    parts = {name: t for name, t in theirs.state_dict().items() if theirs.in_part(name, "time") and name not in states}
    inject(theirs, METHODS["miss"], METHODS["miss"].Config(4))
    named = {"method": "miss", "options": {"r": 4}, "base": identity("theirs.pth", theirs)}
    save_adapter(tmp_path / "ours.pth", adapter_tensors(theirs), named)
    save_adapter(tmp_path / "our states.pth", states, {**named, "method": "none", "options": {}})
    torch.save({name.replace(".bone", ".disha"): t for name, t in adapter_tensors(theirs).items()}, tmp_path / "disha.pth")
    torch.save(states, tmp_path / "states.pth")  # of heads of another size: nothing else tells a state's version
    torch.save(parts, tmp_path / "time.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "ours.pth").read_bytes()[:999])
    for file, message in {
        "ours": f"is an adapter for an? {other} model, and the base is {re.escape(base.title)}",
        "our states": f"is an adapter for an? {other} model, and the base is {re.escape(base.title)}",
        "disha": r"disha\.pth: (\d+ tensors that this model has no place for|blocks\.0\.ffn\.key\.bone is .* must be \(4, 28\))",
        "states": r"blocks\.0\.att\.time_state is .* must be \(2, 4, 4\)",
        "time": r"\d+ tensors that this model has no place for",
        "cut": "damaged or cut short",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_adapter(base, tmp_path / f"{file}.pth")
        assert "\n" not in str(caught.value) and str(tmp_path / f"{file}.pth") in str(caught.value)
        assert not any(p.requires_grad and "time_state" in name for name, p in base.named_parameters())


ADAM = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
NO_ADAPTERS = {
    "a whole model": lambda: small_model().state_dict(),
    "a PiSSA's file of initial values": lambda: {"blocks.0.att.key.init_lora_A": torch.ones(2, 4)},
    "an optimiser's checkpoint": lambda: ADAM,
    "a training checkpoint whose tensors lie under 'state_dict'": lambda: {"epoch": 1, "state_dict": {"a": torch.ones(1)}},
    "a list: a state of an inference program?": lambda: [torch.ones(2), torch.ones(3)],
    "no adapter of an RWKV model: it holds encoder.weight": lambda: {"encoder.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("what", NO_ADAPTERS)
def test_a_file_that_is_no_adapter_is_named_for_what_it_is(what, world, tmp_path):
    torch.save(NO_ADAPTERS[what](), tmp_path / "f.pth")
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "f.pth")
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_training_goes_on_from_theirs_with_their_own_scripts_json(world, tmp_path):
    save_tensors(tmp_path / "lora.pth", pairs(world))
    save_tensors(tmp_path / "pissa.pth", pairs(world))
    save_tensors(tmp_path / "i.pth", {name.replace(".lora_", ".init_lora_"): t * 0.9 for name, t in pairs(world).items()})
    lora = {"lora_load": f"{tmp_path}/lora.pth", "lora_r": R, "lora_alpha": 16, "lora_dropout": 0.01}
    pissa = {"pissa_load": f"{tmp_path}/pissa.pth", "pissa_init": f"{tmp_path}/i.pth", "pissa_r": R, "svd_niter": 4}
    for peft, config in (("lora", lora), ("pissa", pissa)):
        words = ["--proj_dir", tmp_path / peft, "--peft", peft, f"--{peft}_config", json.dumps(config), "--epoch_steps", 1]
        assert train(arguments(world, *words)) == 0
        _, info = read_adapter(tmp_path / peft / "rwkv-0.pth")
        assert (info["method"], info["options"]["r"]) == (peft, R)
        assert info["options"].get("lora_dropout") == (0.01 if peft == "lora" else None)
    with pytest.raises(UserError, match="has r 8, not 4"):  # what contradicts the file is refused as ever
        train(arguments(world, "--proj_dir", tmp_path / "x", "--peft", "lora", "--r", 4, "--lora_config", json.dumps(lora)))
