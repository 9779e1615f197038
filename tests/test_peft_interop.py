"""Folders of Hugging Face peft: what we write, peft itself loads and computes the same; what peft writes, we do."""

import json
import warnings

import pytest
import torch
from torch import nn

from rwkv_bone.errors import UserError
from rwkv_bone.interop.hf_peft import is_folder, read_folder, write_folder
from rwkv_bone.peft import METHODS, adapter_tensors, attach, inject

peft = pytest.importorskip("peft", reason="needs the peft package")

IN_PEFT = [
    *(
        (name, {"alpha": 6.0} if "alpha" in method.Config.__dataclass_fields__ else {})
        for name, method in METHODS.items()
        if name != "bone"
    ),
    ("miss", {"mini_r": 2}),
]


class Net(nn.Module):
    """Modules with RWKV's names. `value` is as wide as `key` is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)

        def block():
            att = nn.ModuleDict({"key": nn.Linear(16, 24, bias=False), "value": nn.Linear(24, 16, bias=False)})
            return nn.ModuleDict({"att": att, "ln1": nn.LayerNorm(16)})

        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(16, 10, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["att"]["value"](torch.tanh(block["att"]["key"](block["ln1"](x))))
        return self.head(x)


def move(model):
    """Take all that is trained away from its start."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return model


def ours(name, **options):
    model = Net()
    method = METHODS[name]
    names = inject(model, method, method.Config(r=4, **options), ["att"])
    if method.starts_from_gradient:
        for layer in names:
            layer = model.get_submodule(layer)
            layer.start(torch.randn(layer.weight.shape))
    return move(model)


def loaded_here(folder):
    """A fresh base with a folder's adapter."""
    tensors, info = read_folder(folder)
    model = Net()
    method = METHODS[info["method"]]
    own = {name for name, _ in model.named_parameters()}
    names = {name.rpartition(".")[0] for name in tensors if name not in own}
    attach(model, method, method.config_from(info["options"], info["method"]), names)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if name not in own]
    return model.eval()


def loaded_there(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(Net(), str(folder)).eval()


def trained_there(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move(peft.get_peft_model(Net(), config)).eval()


x = torch.linspace(-2, 2, 5 * 16).view(5, 16).sin()


@pytest.mark.parametrize(("name", "options"), IN_PEFT)
def test_peft_loads_what_we_write_and_computes_the_same(name, options, tmp_path):
    model = ours(name, **options)
    options = vars(model.blocks[0]["att"]["key"].config)
    write_folder(tmp_path / "out", adapter_tensors(model), {"method": name, "options": options})
    assert is_folder(tmp_path / "out")
    there = loaded_there(tmp_path / "out")
    assert not torch.allclose(Net()(x), model(x), atol=0.1)
    torch.testing.assert_close(there(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded_here(tmp_path / "out")(x), model(x), rtol=1e-5, atol=1e-5)  # and back


def test_modules_trained_in_full_travel_too(tmp_path):
    model = ours("miss")
    for p in (model.head.weight, model.blocks[1]["ln1"].weight, model.blocks[1]["ln1"].bias):
        p.requires_grad_(True)
    move(model)
    write_folder(tmp_path, adapter_tensors(model), {"method": "miss", "options": {"r": 4}})
    torch.testing.assert_close(loaded_there(tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded_here(tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


TARGETS = {"target_modules": ["att.key", "value"]}
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, **TARGETS),
    "lora, gaussian": lambda: peft.LoraConfig(r=3, init_lora_weights="gaussian", **TARGETS),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, **TARGETS),
    "lora and head": lambda: peft.LoraConfig(r=3, modules_to_save=["head"], **TARGETS),
    "miss": lambda: peft.MissConfig(r=5, **TARGETS),
    "miss, mini": lambda: peft.MissConfig(r=5, init_weights="mini", mini_r=8, **TARGETS),
    "bone_col": lambda: peft.MissConfig(r=4, init_weights="bat", **TARGETS),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_what_peft_writes_and_compute_the_same(name, tmp_path):
    there = trained_there(THEIRS[name]())
    there.save_pretrained(tmp_path)
    assert read_folder(tmp_path)[1]["method"] == name.partition(",")[0].partition(" ")[0]
    torch.testing.assert_close(loaded_here(tmp_path)(x), there(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_own_conversion_of_a_changed_base_is_read(init, tmp_path):
    there = peft.get_peft_model(Net(), peft.LoraConfig(r=3, init_lora_weights=init, **TARGETS))
    there.save_pretrained(tmp_path / "start")
    move(there)
    there.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=f"init_lora_weights '{init}' changed the base"):
        read_folder(tmp_path / "trained")
    there.peft_config["default"].init_lora_weights = True  # peft's recipe: the start must load without being started again
    there.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(start_of(tmp_path / "start")))
    torch.testing.assert_close(loaded_here(tmp_path / "converted")(x), there(x), rtol=1e-4, atol=1e-5)


def start_of(folder):
    """As peft's documents have it, the folder of the start says that it is a plain LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    return folder


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
    ({"bias": "all"}, "bias='all' is not supported"),
    ({"rank_pattern": {"key": 8}}, "rank_pattern={'key': 8} is not supported"),
    ({"lora_bias": True}, "lora_bias=True is not supported"),
    ({"init_lora_weights": "loftq"}, "'loftq' changed the base"),
    ({"lora_alpha": 0}, "lora_alpha=0 is not supported"),
    ({"use_dora": True, "use_rslora": True}, "DoRA with use_rslora"),
    ({"r": "4"}, "r is an int, not '4'"),
    ({"peft_type": "MISS", "init_weights": "maxi"}, "MiSS of peft is read with"),
    ({"peft_type": "MISS", "init_weights": True}, "lora_A.weight: a tensor of no known meaning in a MISS folder"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_folder_that_would_be_another_model_here_is_refused(change, message, tmp_path):
    trained_there(peft.LoraConfig(r=4, **TARGETS)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        read_folder(tmp_path)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="peft has no method bone"):
        write_folder(tmp_path, {}, {"method": "bone", "options": {}})
    tensors = {"blocks.0.att.key.bone": torch.zeros(4, 24), "blocks.0.att.time_decay": torch.zeros(3)}
    with pytest.raises(UserError, match="peft cannot hold blocks"):
        write_folder(tmp_path, tensors, {"method": "miss", "options": {"r": 4}})
    assert not is_folder(tmp_path)
