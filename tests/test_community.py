"""Command lines of RWKV-PEFT, RWKV-LM and RWKV-Runner mean here what they mean there, and nothing in them is dropped unsaid."""

import importlib.util
import random
import re
import shlex

import pytest

from rwkv_bone.config import TrainConfig, make_parser
from rwkv_bone.errors import UserError
from rwkv_bone.interop.rwkv_peft_flags import HARMLESS, SIGNS
from rwkv_bone.interop.rwkv_peft_flags import REFUSED as REFUSED_FLAGS
from rwkv_bone.interop.rwkv_peft_methods import CONFIGS, method_from_community
from rwkv_bone.interop.rwkv_peft_methods import LORA as JSON_LORA
from rwkv_bone.interop.rwkv_peft_methods import PISSA as JSON_PISSA

# ---------------------------------------------------------------- the JSON of a method

MEANINGS = [
    ("bone", {}, ("bone", {}, "", "", ())),
    ("miss", {}, ("miss", {}, "", "", ())),
    ("none", {}, ("none", {}, "", "", ())),
    ("bone", {"bone_config": '{"bone_load":"","bone_r":64}'}, ("bone", {"r": 64}, "", "", ())),
    ("bone", {"bone_config": '{"bone_mode":"bat","bone_load":"a.pth","bone_r":64}'}, ("bone", {"r": 64}, "a.pth", "", ())),
    ("bone", {"bone_config": '{"bone_mode":"bone","bone_load":"","bone_r":64}'}, ("miss", {"r": 64}, "", "", ())),
    ("disha", {"disha_config": '{"mode":"bone","load":"","r":64}'}, ("miss", {"r": 64}, "", "", ())),
    ("disha", {"disha_config": '{"mode":"bat","load":"b.pth","r":32}'}, ("bone", {"r": 32}, "b.pth", "", ())),
    ("miss", {"miss_config": '{"mode":"mode","load":"","r":64}'}, ("miss", {"r": 64}, "", "", ())),
    (
        "lora",
        {"lora_config": '{"lora_load":"","lora_r":8,"lora_alpha":32,"lora_dropout":0.01}'},
        ("lora", {"r": 8, "alpha": 32.0, "lora_dropout": 0.01}, "", "", ()),
    ),
    (
        "lora",
        {"lora_config": '{"lora_r":8,"lora_alpha":8,"lora_parts":"att,ffn"}'},
        ("lora", {"r": 8, "alpha": 8.0}, "", "", ("att", "ffn")),
    ),
    (
        "pissa",
        {"pissa_config": '{"pissa_load":"l.pth","pissa_init":"i.pth","pissa_r":8,"svd_niter":4}'},
        ("pissa", {"r": 8, "svd_niter": 4}, "l.pth", "i.pth", ()),
    ),
    ("miss", {"peft_config": '{"r":8}'}, ("miss", {"r": 8}, "", "", ())),
    ("miss", {"peft_config": '{"r":8,"mini_r":2}'}, ("miss", {"r": 8}, "", "", ())),  # without "mini" peft does not read it
    ("miss", {"peft_config": '{"init_weights":"mini","mini_r":2}'}, ("miss", {"mini_r": 2}, "", "", ())),
    ("miss", {"peft_config": '{"init_weights":"bat","target_modules":["key"]}'}, ("bone_col", {}, "", "", ("key",))),
    (
        "lora",
        {"peft_config": '{"r":16,"lora_dropout":0}'},  # peft's own default of alpha
        ("lora", {"r": 16, "alpha": 8.0, "lora_dropout": 0.0}, "", "", ()),
    ),
    ("lora", {"peft_config": '{"use_dora":true}'}, ("dora", {"r": 8, "alpha": 8.0}, "", "", ())),
    ("lora", {"peft_config": '{"use_rslora":true}'}, ("rslora", {"r": 8, "alpha": 8.0}, "", "", ())),
    ("lora", {"peft_config": '{"r":4,"init_lora_weights":"pissa_niter_16"}'}, ("pissa", {"r": 4, "svd_niter": 16}, "", "", ())),
]


@pytest.mark.parametrize(("peft", "configs", "meaning"), MEANINGS)
def test_a_methods_json_chooses_the_method_it_means(peft, configs, meaning):
    assert tuple(method_from_community(peft, configs)) == meaning


REFUSED_JSON = [
    ("bone", {"bone_config": '{"bone_r":64'}, "--bone_config: not JSON"),
    ("bone", {"bone_config": "64"}, "wanted a JSON object"),
    ("bone", {"bone_config": '[["bone_r", 64]]'}, "wanted a JSON object"),
    ("bone", {"bone_config": '{"r":64}'}, "unknown key r; it has bone_r, bone_load, bone_mode"),
    ("bone", {"bone_config": '{"bone_r":"64"}'}, 'bone_r is an int, not "64"'),
    ("bone", {"bone_config": '{"bone_r":[64]}'}, "bone_r is an int, not [64]"),
    ("bone", {"bone_config": '{"bone_r":true}'}, "bone_r is an int, not true"),
    ("bone", {"bone_config": '{"bone_r":64,"bone_r":32}'}, "given twice"),
    ("bone", {"bone_config": '{"bone_mode":"row"}'}, "mode 'row' of --bone_config"),
    ("bone", {"bone_config": "[" * 100_000}, "not JSON"),
    ("disha", {}, 'needs --disha_config with "mode"'),
    ("disha", {"disha_config": '{"mode":"mode","load":"","r":64}'}, "mode 'mode' of --disha_config"),
    ("lora", {"lora_config": '{"lora_dropout":"0.1"}'}, 'lora_dropout is a float, not "0.1"'),
    ("bone", {"lora_config": '{"lora_r":8}'}, "--lora_config is for --peft lora"),
    ("none", {"peft_config": '{"r":8}'}, "not for --peft none"),
    ("lora", {"lora_config": '{"lora_r":8}', "peft_config": '{"r":16}'}, "r is given twice, as 8 and 16"),
    ("lora", {"peft_config": '{"use_dora":true,"use_rslora":true}'}, "use_dora and use_rslora"),
    ("lora", {"peft_config": '{"init_lora_weights":"loftq"}'}, "initial weights 'loftq'"),
    ("miss", {"peft_config": '{"init_weights":"maxi"}'}, "initial weights 'maxi'"),
    ("lora", {"lisa_config": "{}"}, "--lisa_config: unknown"),
]


@pytest.mark.parametrize(("peft", "configs", "message"), REFUSED_JSON, ids=range(len(REFUSED_JSON)))
def test_what_json_cannot_mean_is_refused_in_one_line(peft, configs, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        method_from_community(peft, configs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- every command line of RWKV-PEFT's history

# Flags that its train.py lines of November 2023 to January 2026 have in common. Those with a number pass through as they are.
COMMON = """--vocab_size 65536 --ctx_len 1024 --epoch_steps 200 --epoch_count 2 --epoch_begin 0 --epoch_save 1 --micro_bsz 8
 --n_layer 24 --n_embd 2048 --pre_ffn 0 --head_qk 0 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu
 --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --wandb peft""".split()
SAME, FALLING = "--lr_init 2e-5 --lr_final 2e-5", "--lr_init 1 --lr_final 1e-2"
X6 = "--my_testing x060"
BINIDX, PAD = "--data_type binidx", "--data_type binidx --dataload pad"
MASKED = f"{PAD} --loss_mask pad"

LORA = "--lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 --lora_parts=att,ffn,time,ln"
STARTS = f"--lora_load rwkv-0 {LORA}"  # from a file that is not there: anew
AS_LORA = {"peft": "lora", "peft_options": {"r": 64, "alpha": 128.0, "lora_dropout": 0.01}, "train_parts": ("time", "ln")}
AS_PISSA = {"peft": "pissa", "peft_options": {"r": 64, "svd_niter": 4}, "train_parts": ("time", "ln")}
LORA_JSON = '--peft lora --lora_config \'{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}\''
LORA_PARTS = LORA_JSON.replace("}", ',"lora_parts":"att,ffn"}')
AS_LORA_JSON = {"peft": "lora", "peft_options": {"r": 32, "alpha": 32.0, "lora_dropout": 0.0}, "train_parts": ("time", "ln")}
PISSA_JSON = '--peft pissa --pissa_config \'{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}\''
PISSA_PARTS = PISSA_JSON.replace("}", ',"pissa_parts":"att,ffn"}')
AS_PISSA_JSON = {"peft": "pissa", "peft_options": {"r": 32, "svd_niter": 4}, "train_parts": ("time", "ln")}
BONE_JSON = '--peft bone --bone_config \'{"bone_load":"","bone_r":64}\''
MODE_JSON = '--peft bone --bone_config \'{"bone_mode":"bone","bone_load":"","bone_r":64}\''
DISHA_JSON = '--peft disha --disha_config \'{"mode":"bone","load":"","r":64}\''
AS_BONE = {"peft": "bone", "peft_options": {"r": 64}, "train_parts": ("time", "ln")}
AS_MISS = {"peft": "miss", "peft_options": {"r": 64}, "train_parts": ("time", "ln")}
STATE, AS_STATE = "--train_type state", {"train_type": "state", "peft": "none", "train_parts": ()}
FULL = {"peft": "none", "train_type": "none", "train_parts": ()}
ALONE = {"train_parts": ()}
SFT = "--data_type sft --sft_field query response --sft_split"
AS_SFT = {"data_type": "auto", "fields": "question=query,answer=response", "loss_mask": "answer", "dataload": "pad"}
TODAY = {"parts": ("receptance", "key", "value", "output"), "train_parts": ()}
EXP, COS, CONSTANT = {"lr_schedule": "exp"}, {"lr_schedule": "cos"}, {"lr_schedule": "constant"}
GET = {"dataload": "get"}

HISTORY = [  # flags beside COMMON -> what they are read as
    # November 2023 to September 2024
    (f"{X6} {BINIDX} {SAME} {STARTS}", AS_LORA | CONSTANT | GET),
    (f"{BINIDX} {SAME} {STARTS}", AS_LORA | CONSTANT | GET),
    (f"{X6} {BINIDX} {SAME} {LORA}", AS_LORA | GET),
    (f"{X6} {BINIDX} {SAME} {STARTS} --quant nf4", AS_LORA | GET | {"quant": "nf4"}),
    (f"{X6} {PAD} {SAME} {STARTS}", AS_LORA | {"dataload": "pad"}),
    (f"{X6} {PAD} {SAME} {STARTS} --train_type infctx --chunk_ctx 512 --fla", AS_LORA | {"train_type": "infctx", "op": "auto"}),
    (f"{X6} {PAD} {SAME} {STARTS} --train_type infctx --fla --PISSA --svd_niter 4", AS_PISSA | {"train_type": "infctx"}),
    (f"{X6} {MASKED} {SAME} {LORA}", AS_LORA | {"loss_mask": "pad"}),
    (f"{X6} {MASKED} {SAME} {LORA} --quant nf4", AS_LORA | {"quant": "nf4"}),
    (f"{X6} {BINIDX} {SAME} {STARTS} --PISSA --svd_niter 4", AS_PISSA | GET),
    (f"{BINIDX} {SAME} {STARTS} --PISSA --svd_niter 4", AS_PISSA | GET),
    (f"{X6} {BINIDX} {SAME} {STARTS} --PISSA --svd_niter 4 --quant nf4", AS_PISSA | {"quant": "nf4"}),
    (f"{X6} {PAD} {SAME} {STARTS} --PISSA --svd_niter 4", AS_PISSA),
    (f"{X6} {PAD} {SAME} {STARTS} --PISSA --svd_niter 4 --quant nf4", AS_PISSA),
    (f"{X6} {PAD} {SAME} {LORA} --PISSA --svd_niter 4 --quant nf4", AS_PISSA),
    (f"{X6} {MASKED} {SAME} {LORA} --PISSA --svd_niter 4", AS_PISSA | {"loss_mask": "pad"}),
    (f"{X6} {BINIDX} {FALLING} --state_tune", AS_STATE | EXP | GET),
    (f"{X6} {BINIDX} {SAME} --state_tune", AS_STATE | CONSTANT | GET),
    (f"{X6} {BINIDX} {FALLING} {STATE}", AS_STATE | COS | {"dataload": "pad"}),
    (f"{X6} {PAD} {FALLING} {STATE}", AS_STATE | COS),
    (f"{X6} {PAD} {FALLING} {STATE} --fla", AS_STATE | COS | {"op": "auto"}),
    (f"{X6} {PAD} {FALLING} {STATE} --quant int8", AS_STATE | {"quant": "int8"}),
    (f"{X6} {PAD} {FALLING} {STATE} --quant int8 --fla", AS_STATE | {"quant": "int8"}),
    (f"{X6} {PAD} {FALLING} {STATE} --quant nf4", AS_STATE | {"quant": "nf4"}),
    (f"{X6} {BINIDX} {FALLING} --train_type infctx --fla", FULL | COS | {"train_type": "infctx"}),
    (f"{BINIDX} {SAME} --accumulate_grad_batches 4", {}),  # nothing says whose line it is
    # RWKV-LM's training from scratch
    (
        f"{BINIDX} --load_model 0 --lr_init 6e-4 --lr_final 6e-5 --my_pile_stage 3 --my_exit_tokens 1498226207 "
        "--magic_prime 2926181 --my_pile_edecay 0 --num_nodes 1 --head_size_a 64 --weight_decay 0.001 "
        "--enable_progress_bar True --ds_bucket_mb 200",
        {"peft": "none", "load_model": "", "dataload": "get", "epoch_steps": 40320 // 8, "epoch_count": 2926181 // 40320} | COS,
    ),
    # October 2024 to October 2025
    (f"{X6} {MASKED} {SAME} {BONE_JSON}", AS_BONE | CONSTANT | {"loss_mask": "pad", "dataload": "pad"}),
    (f"{X6} {MASKED} {SAME} {BONE_JSON} --train_parts []", AS_BONE | ALONE),
    (f"--rwkv_version x060 {MASKED} {SAME} {BONE_JSON}", AS_BONE | {"my_testing": "x060"}),
    (
        f'{X6} {PAD} {SAME} {BONE_JSON} --loss_mask se --mask_id \'{{"mask0":"130","mask1":"133"}}\'',
        AS_BONE | {"loss_mask": "marked", "loss_marks": ("133", "130")},
    ),
    (
        f'{X6} {PAD} {SAME} {BONE_JSON} --loss_mask se --mask_id \'{{"mask0":"<l>","mask01":"<r>"}}\'',
        AS_BONE | {"loss_mask": "marked", "loss_marks": ("<r>", "<l>")},
    ),
    (f"{X6} {MASKED} {SAME} {MODE_JSON}", AS_MISS),
    (f"{X6} {MASKED} {SAME} {MODE_JSON} --data_shuffle 0", AS_MISS | {"data_shuffle": False}),
    (f"{X6} {MASKED} {SAME} {DISHA_JSON}", AS_MISS),
    (f"{X6} {MASKED} {SAME} {LORA_JSON}", AS_LORA_JSON),
    (f"--my_testing x070 {MASKED} {SAME} {LORA_JSON}", AS_LORA_JSON),
    (f"--rwkv_version x060 {MASKED} {SAME} {LORA_JSON}", AS_LORA_JSON),
    (f"{X6} {MASKED} {SAME} {LORA_PARTS}", AS_LORA_JSON),
    (f"{X6} {MASKED} {SAME} {LORA_PARTS} --train_parts []", AS_LORA_JSON | ALONE),
    (f"{X6} {MASKED} {SAME} {PISSA_JSON}", AS_PISSA_JSON),
    (f"--my_testing x070 {MASKED} {SAME} {PISSA_JSON}", AS_PISSA_JSON),
    (f"--rwkv_version x060 {MASKED} {SAME} {PISSA_JSON}", AS_PISSA_JSON),
    (f"{X6} {MASKED} {SAME} {PISSA_PARTS}", AS_PISSA_JSON),
    (f"{X6} {MASKED} {SAME} {PISSA_PARTS} --train_parts []", AS_PISSA_JSON | ALONE),
    (f"{X6} {MASKED} {FALLING} {STATE} --fla", AS_STATE | COS | {"loss_mask": "pad"}),
    (f"{X6} {PAD} {FALLING} {STATE} --fla --strategy single-device", AS_STATE | {"strategy": "auto"}),
    (f"--rwkv_version x060 {PAD} {FALLING} {STATE} --fla --strategy single-device", AS_STATE | EXP | {"strategy": "auto"}),
    (
        f"--rwkv_version x060 {PAD} --lr_init 6e-4 --lr_final 6e-5 --train_type finetune --fla --precision bf16-true "
        "--strategy single",
        FULL | EXP | {"precision": "bf16", "strategy": "auto"},
    ),
    (f"{X6} {SFT} train --lr_init 1e-4 --lr_final 1e-4 {MODE_JSON}", AS_MISS | AS_SFT | {"data_rows": ""}),
    (f"--my_testing x070 {SFT} train {SAME} {MODE_JSON}", AS_MISS | AS_SFT),
    (f"{X6} {SFT} train {SAME} {MODE_JSON} --data_shuffle 0 --train_parts []", AS_MISS | AS_SFT | ALONE),
    (f"{X6} {SFT} 'train[:1000]' {SAME} {MODE_JSON} --data_shuffle 0", AS_MISS | AS_SFT | {"data_rows": ":1000"}),
    (
        f"{X6} --data_type sft --sft_field query answer --sft_split train {SAME} {MODE_JSON} --data_shuffle 0 --train_parts []",
        AS_MISS | AS_SFT | ALONE | {"fields": "question=query,answer=answer"},
    ),
    (f"{X6} {SFT} 'train[:1000]' --lr_init 3e-4 --lr_final 1e-4", FULL | AS_SFT | COS | {"data_rows": ":1000"}),
    (f"--my_testing x070 {SFT} 'train[:1000]' --lr_init 3e-4 --lr_final 1e-4", FULL | AS_SFT | COS),
    # since October 2025
    (
        f'--my_testing x070 {BINIDX} {SAME} --peft lora --peft_config \'{{"r":8,"lora_alpha":32,"lora_dropout":0.05}}\'',
        TODAY | {"peft": "lora", "peft_options": {"r": 8, "alpha": 32.0, "lora_dropout": 0.05}, "dataload": "pad"},
    ),
    (
        f"--my_testing x070 {BINIDX} {SAME} --peft miss --peft_config '{{\"r\":8}}'",
        TODAY | {"peft": "miss", "peft_options": {"r": 8}},
    ),
]
REFUSED = [
    (f"{X6} {BINIDX} {SAME} --LISA --lisa_r 2 --lisa_k 100", "--LISA"),
    (f"{BINIDX} {SAME} --LISA --lisa_r 2 --lisa_k 100", "--LISA"),
    (f"{X6} {BINIDX} {SAME} {LORA_PARTS} --quant fp8", "--quant fp8"),
    (f"{X6} {BINIDX} {SAME} {PISSA_PARTS} --quant fp8 --train_parts []", "--quant fp8"),
    (f"{X6} {BINIDX} {SAME} {LORA_PARTS} --quant fp8 --train_parts []", "--quant fp8"),
    (f"{X6} {BINIDX} {SAME} {PISSA_PARTS} --quant fp8", "--quant fp8"),
    (f"{X6} {BINIDX} {SAME} {STARTS} --quant fp4", "--quant fp4"),
    (f"--rwkv_version x060 {PAD} {FALLING} --train_type finetune --fla --accelerator xpu", "--accelerator xpu"),
    (f"{X6} {PAD} {FALLING} {STATE} --fla --accelerator xpu --strategy single_device", "--accelerator xpu"),
    (f"{X6} {PAD} {FALLING} --train_type finetune --fla --accelerator xpu --strategy single", "--accelerator xpu"),
    (f"{BINIDX} {SAME} --my_pile_stage 1 --my_exit_tokens 1498226207 --magic_prime 2926181", "--my_pile_stage 1"),
    (f"{X6} {SFT} train {SAME} --data_file meta-math/MetaMathQA {MODE_JSON}", "huggingface-cli download"),
    (f"--my_testing x052 {BINIDX} {SAME} {STARTS}", "RWKV-5"),
    (f"{X6} {BINIDX} {SAME} --peft adalora --peft_config '{{}}'", "--peft adalora"),
    (f"{X6} {BINIDX} {SAME} --peft prefix", "--peft prefix"),
    (f"{X6} {BINIDX} {SAME} --precision fp16", "--precision fp16"),
    (f"{X6} {BINIDX} {SAME} --train_type fullstate", "--train_type fullstate"),
    (f"{X6} {BINIDX} {SAME} --optim adam_mini", "--optim adam_mini"),
    (f"{X6} {SFT} 'train[:10%]' {SAME}", "--sft_split train[:10%]"),
    (f"{X6} --data_type sft --sft_field text {SAME}", "--sft_field names two fields"),
    (f"{X6} {PAD} {SAME} --loss_mask se", "needs --mask_id"),
]


def line(flags: str, *more: str) -> TrainConfig:
    """The configuration of COMMON and `flags`."""
    files = ["--load_model", "base.pth", "--data_file", __file__]
    return TrainConfig.from_argv([*files, *COMMON, *more, *shlex.split(flags)])


@pytest.mark.parametrize(("flags", "meaning"), HISTORY, ids=range(len(HISTORY)))
def test_each_command_line_of_its_history_is_read_as_what_it_was(flags, meaning):
    config = line(flags)
    assert {name: getattr(config, name) for name in meaning} == meaning
    assert (config.epoch_begin, config.epoch_save, config.micro_bsz, config.wandb) == (0, 1, 8, "peft")
    assert (config.repeat_data, bool(config.notes)) == (bool(meaning), bool(meaning))


@pytest.mark.parametrize(("flags", "name"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_by_name(flags, name):
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        line(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [f"{STATE} --op fla", "--peft state --op fla", f"{BONE_JSON} --op triton"])
def test_the_wish_for_flas_kernels_is_kept_or_refused(flags, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert line(f"--my_testing x070 {MASKED} {FALLING} {flags}").op == "fla"
    with pytest.raises(UserError, match=r"--op fla.* on GPUs"):
        line(f"{X6} {flags} --accelerator cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--op fla.* not installed"):
        line(f"{X6} {flags}")


# ---------------------------------------------------------------- what differs there

SAID = [  # flags, the field and its value, what the block says of it
    ("", "peft", "none", "no --peft: the whole model trains"),
    (BONE_JSON, "train_parts", ("time", "ln"), "no --train_parts"),
    (FALLING, "lr_schedule", "cos", "no --lr_schedule"),
    (f"{FALLING} --lr_schedule wsd", "lr_schedule", "warmup_cos", "100 steps of linear warm-up from 0, then a cosine to 0"),
    (f"{FALLING} --lr_schedule wsd", "lr_final", 0.0, "wsd"),
    (f"{FALLING} --lr_schedule wsd --warmup_steps 30", "warmup_steps", 30, "30 steps of linear warm-up"),
    ("--epoch_steps 7", "epoch_steps", 7, "an epoch is 7 steps"),
    ("--merge 1", "merge", None, "--merge: rwkv-N.pth is the adapter"),
    (STARTS, "peft_checkpoint", "", "rwkv-0, the adapter to start from: no such file"),
    ("--fla", "op", "auto", "--fla: "),
    (f"{PAD} --loss_mask qa", "loss_marks", ("Assistant:", "User:"), "--loss_mask qa: trained is what follows Assistant:"),
    (f"{BONE_JSON} --loss_mask qa", "loss_mask", "answer", "--loss_mask qa: answers alone are trained"),
]


@pytest.mark.parametrize(("flags", "field", "value", "said"), SAID)
def test_what_differs_there_is_done_and_said(flags, field, value, said):
    config = line(f"{X6} {flags}")
    assert getattr(config, field, None) == value
    assert config.notes[0].startswith("read as an RWKV-PEFT command line")
    assert sum(said in note for note in config.notes) == 1, config.notes


def test_what_a_line_of_theirs_leaves_out_has_their_default():
    config = TrainConfig.from_argv(["--load_model", "b.pth", "--data_file", "d", "--my_testing", "x060", "--warmup_steps", "-1"])
    assert (config.ctx_len, config.micro_bsz, config.epoch_steps, config.epoch_save) == (1024, 12, 1000, 5)
    assert (config.lr_init, config.lr_final, config.lr_schedule, config.warmup_steps) == (6e-4, 1e-5, "cos", 0)
    assert (config.dataload, config.peft) == ("pad", "none")
    for flag in (
        "--ctx_len 1024",
        "--micro_bsz 12",
        "--lr_init 6e-4",
        "1,000 steps",
        "--precision",
        "--epoch_count",
        "--dataload pad",
    ):
        assert flag in " ".join(config.notes), flag


OURS = [
    "",
    "--peft lora --r 8 --alpha 16",
    "--peft none --my_testing x060 --n_layer 2 --n_embd 64 --vocab_size 257",
    BONE_JSON,
    "--fla --ds_bucket_mb 200",
    "--train_type state",
    "--pre_ffn 0 --head_qk 0 --lr_schedule wsd --warmup_steps 10",
]


@pytest.mark.parametrize("flags", OURS)
def test_our_own_command_lines_keep_their_defaults(flags):
    base = [] if "--n_layer" in flags else ["--load_model", "b.pth"]
    config, plain = TrainConfig.from_argv(["--data_file", "d", *base, *shlex.split(flags)]), TrainConfig(data_file="d")
    assert config.notes == () and not config.repeat_data
    for name in ("ctx_len", "micro_bsz", "epoch_steps", "epoch_count", "lr_init", "dataload", "train_parts", "precision"):
        assert getattr(config, name) == getattr(plain, name), name
    assert config.lr_schedule == ("wsd" if "wsd" in flags else "exp")


@pytest.mark.parametrize("name", HARMLESS)
def test_a_flag_without_meaning_is_taken_at_its_usual_value_and_refused_at_another(name):
    line(f"--{name} {' '.join(HARMLESS[name][:1])}")
    if HARMLESS[name]:
        with pytest.raises(UserError, match=f"--{name} 77: has no meaning"):
            line(f"--{name} 77")


# ---------------------------------------------------------------- words


def test_json_that_the_shell_cut_at_its_blanks_is_put_together():
    words = ["--peft", "bone", "--bone_config", '{"bone_load":', '"",', '"bone_r":', "32}", "--train_parts", "time"]
    config = TrainConfig.from_argv(["--data_file", "d", *words])
    assert (config.peft_options, config.train_parts) == ({"r": 32}, ("time",))
    with pytest.raises(UserError, match="single quotes"):  # where it took the quotes too
        TrainConfig.from_argv(["--data_file", "d", "--peft", "bone", "--bone_config", "{bone_load:,", "bone_r:", "32}"])


def test_a_first_adapter_goes_on_from_where_its_json_says(tmp_path):
    (tmp_path / "i.pth").touch()
    load, init = f"{tmp_path}/a.pth", f"{tmp_path}/i.pth"
    for flags in (
        f'--peft pissa --pissa_config \'{{"pissa_load":"{load}","pissa_init":"{init}","pissa_r":8,"svd_niter":4}}\'',
        f"--lora --PISSA --lora_r 8 --svd_niter 4 --pissa_load {load} --pissa_init {init}",
    ):
        config = line(f"{X6} {flags}")
        assert (config.peft, config.peft_checkpoint, config.peft_init) == ("pissa", load, init)
        assert config.peft_options == {"r": 8, "svd_niter": 4}
    assert line(f"{X6} --lora --lora_load none").peft_checkpoint == ""


def test_flags_of_this_program_win_over_theirs():
    config = line(f"{X6} {LORA_JSON} --r 4 --parts ffn --ctx_len 99 --dataload pack")
    assert (config.peft_options["r"], config.parts, config.ctx_len, config.dataload) == (4, ("ffn",), 99, "pack")


def test_rwkv_lms_line_of_today_trains_a_new_model(tmp_path):
    flags = (
        "--load_model 0 --my_testing x060 --train_stage 3 --epoch_count 999999 --my_exit_tokens 1498226207 --magic_prime 2926181 "
        "--head_size 64 --lr_init 6e-4 --lr_final 6e-5 --data_type binidx --micro_bsz 16 --devices 2 --ds_bucket_mb 2"
    )
    config = line(f"{flags} --proj_dir {tmp_path}")
    assert (config.peft, config.load_model, config.epoch_steps, config.epoch_count) == ("none", "", 1260, 72)
    (tmp_path / "rwkv-init.pth").touch()  # its first stage's weights
    assert line(f"{flags} --proj_dir {tmp_path}").load_model == f"{tmp_path}/rwkv-init.pth"
    with pytest.raises(UserError, match="must divide 40320"):
        line(f"{flags} --micro_bsz 11")


def test_rwkv_runners_line_is_taken_with_the_quotes_it_passes():
    config = line(
        '--my_testing \'"x060"\' --lora_r 8 --lora_alpha 32 --lora_dropout 0.01 --lora_load "" --data_type binidx --lora '
        "--lora_parts=att,ffn,time,ln --strategy deepspeed_stage_2 --ds_bucket_mb 2"
    )
    assert (config.my_testing, config.peft, config.train_parts) == ("x060", "lora", ("time", "ln"))
    assert config.peft_options == {"r": 8, "alpha": 32.0, "lora_dropout": 0.01}


def test_the_file_of_initial_values_goes_with_the_adapter_to_start_from():
    words = ["--data_file", "d", "--peft", "pissa", "--pissa_init", "i.pth"]
    assert TrainConfig.from_argv([*words, "--peft_checkpoint", "a.pth"]).peft_init == "i.pth"


VALUES = [
    "", "0", "1", "-1", "nan", "inf", "1e400", "[]", "[1,2]", "{", "{}", "x060", "none", "lora", "bone", "pissa", "state",
    "binidx", "sft", "a" * 4000, "\ud800", "\x00", "train[:10]", "--", "-", "x/y", "\r", " ", "9" * 5000, "att,ffn", "infctx",
    "wsd", "se", "qa", "40320", "\u00b2", '{"r":[8]}', '{"lora_r":8,"lora_alpha":1e999}', '{"bone_r":64}',
    '{"init_lora_weights":{"a":1}}', '{"target_modules":[{"a":1}]}', '{"mask0":"a","mask1":"b"}', '{"r":' + "9" * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_any_words_are_a_configuration_or_one_line(seed):
    draw = random.Random(seed)
    ours = [flag for flag in make_parser()[0]._option_string_actions if flag not in ("-h", "--help")]
    names = [*HARMLESS, *REFUSED_FLAGS, *SIGNS, *CONFIGS, *JSON_LORA, *JSON_PISSA, "head_size", "magic_prime"]
    theirs = [f"--{name}" for name in names]
    for _ in range(500):
        words = draw.choice([[], ["--data_file", "d"], ["--data_file", "d", "--my_testing", "x060"]]).copy()
        for _ in range(draw.randint(1, 6)):
            flag, values = draw.choice(ours + theirs), draw.choices(VALUES, k=draw.choice([0, 1, 1, 1, 2, 3]))
            words += [f"{flag}={values[0]}"] if values and draw.random() < 0.15 else [flag, *values]
        try:
            TrainConfig.from_argv(words)
        except UserError as error:
            assert "\n" not in str(error)
