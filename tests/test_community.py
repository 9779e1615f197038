"""RWKV-PEFT's `--peft` and its JSON choose the same method here, and nothing in them is guessed at or dropped."""

import re

import pytest

from rwkv_bone.errors import UserError
from rwkv_bone.interop.rwkv_peft_flags import method_from_community

MEANINGS = [
    ("bone", {}, ("bone", {}, "", "")),
    ("miss", {}, ("miss", {}, "", "")),
    ("none", {}, ("none", {}, "", "")),
    ("bone", {"bone_config": '{"bone_load":"","bone_r":64}'}, ("bone", {"r": 64}, "", "")),
    ("bone", {"bone_config": '{"bone_mode":"bat","bone_load":"a.pth","bone_r":64}'}, ("bone", {"r": 64}, "a.pth", "")),
    ("bone", {"bone_config": '{"bone_mode":"bone","bone_load":"","bone_r":64}'}, ("miss", {"r": 64}, "", "")),
    ("disha", {"disha_config": '{"mode":"bone","load":"","r":64}'}, ("miss", {"r": 64}, "", "")),
    ("disha", {"disha_config": '{"mode":"bat","load":"b.pth","r":32}'}, ("bone", {"r": 32}, "b.pth", "")),
    (
        "lora",
        {"lora_config": '{"lora_load":"","lora_r":8,"lora_alpha":32,"lora_dropout":0.01}'},
        ("lora", {"r": 8, "alpha": 32.0, "lora_dropout": 0.01}, "", ""),
    ),
    ("lora", {"lora_config": '{"lora_r":8,"lora_alpha":8,"lora_parts":"att,ffn"}'}, ("lora", {"r": 8, "alpha": 8.0}, "", "")),
    (
        "pissa",
        {"pissa_config": '{"pissa_load":"l.pth","pissa_init":"i.pth","pissa_r":8,"svd_niter":4}'},
        ("pissa", {"r": 8, "svd_niter": 4}, "l.pth", "i.pth"),
    ),
    ("miss", {"peft_config": '{"r":8}'}, ("miss", {"r": 8}, "", "")),
    (
        "lora",
        {"peft_config": '{"r":8,"lora_alpha":32,"lora_dropout":0}'},
        ("lora", {"r": 8, "alpha": 32.0, "lora_dropout": 0.0}, "", ""),
    ),
]


@pytest.mark.parametrize(("peft", "configs", "meaning"), MEANINGS)
def test_a_community_command_line_chooses_the_method_it_means(peft, configs, meaning):
    assert tuple(method_from_community(peft, configs)) == meaning


REFUSED = [
    ("bone", {"bone_config": '{"bone_r":64'}, "--bone_config: not JSON"),
    ("bone", {"bone_config": "64"}, "wanted a JSON object"),
    ("bone", {"bone_config": '[["bone_r", 64]]'}, "wanted a JSON object"),
    ("bone", {"bone_config": '{"r":64}'}, "unknown key r; it has bone_r, bone_load, bone_mode"),
    ("bone", {"bone_config": '{"bone_r":"64"}'}, 'bone_r is an int, not "64"'),
    ("bone", {"bone_config": '{"bone_r":true}'}, "bone_r is an int, not true"),
    ("bone", {"bone_config": '{"bone_r":64,"bone_r":32}'}, "given twice"),
    ("bone", {"bone_config": '{"bone_mode":"row"}'}, "mode 'row' of --bone_config"),
    ("disha", {}, "needs --disha_config with \"mode\""),
    ("disha", {"disha_config": '{"mode":"mode","load":"","r":64}'}, "mode 'mode' of --disha_config"),
    ("lora", {"lora_config": '{"lora_dropout":"0.1"}'}, 'lora_dropout is a float, not "0.1"'),
    ("lora", {"lora_config": '{"lora_parts":"att"}'}, "say --parts instead"),
    ("bone", {"lora_config": '{"lora_r":8}'}, "--lora_config is for --peft lora"),
    ("none", {"peft_config": '{"r":8}'}, "not for --peft none"),
    ("lora", {"lora_config": '{"lora_r":8}', "peft_config": '{"r":16}'}, "r is given twice, as 8 and 16"),
    ("lora", {"lisa_config": "{}"}, "--lisa_config: unknown"),
]


@pytest.mark.parametrize(("peft", "configs", "message"), REFUSED)
def test_what_it_cannot_mean_is_refused_in_one_line(peft, configs, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        method_from_community(peft, configs)
    assert "\n" not in str(caught.value)
