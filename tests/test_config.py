"""train.py's command line: the recipe as users know it, plain flags, and one line for whatever is wrong."""

import pytest

from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError
from rwkv_bone.peft import METHODS
from rwkv_bone.training.loader import TrainingData
from tests.conftest import small_model
from tests.runs import arguments, make_world

RECIPE = """--load_model base.pth --proj_dir out --data_file data/metamath --data_type binidx --vocab_size 65536 --ctx_len 512
 --epoch_steps 1000 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 16 --n_layer 32 --n_embd 2560 --pre_ffn 0
 --head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --weight_decay 0
 --accelerator cpu --devices 1 --num_nodes 1 --precision bf16 --strategy auto --grad_cp 1 --accumulate_grad_batches 1
 --my_testing x060 --dataload pad --loss_mask pad --data_shuffle 1 --peft bone --train_parts [] --random_seed 1 --dropout 0
 --layerwise_lr 1 --grad_clip 1.0 --lr_schedule cos""".split()


def parse(*more: str) -> TrainConfig:
    return TrainConfig.from_argv(["--data_file", "d", *more])


def test_the_authors_recipe_is_understood_as_it_is():
    config = TrainConfig.from_argv([*RECIPE, "--bone_config", '{"bone_load":"","bone_r":64}'])
    assert (config.peft, config.peft_options, config.train_parts) == ("bone", {"r": 64}, ())
    assert (config.lr_init, config.lr_final, config.grad_cp, config.precision) == (2e-5, 2e-5, True, "bf16")
    assert (config.micro_bsz, config.ctx_len, config.n_layer, config.epoch_steps) == (16, 512, 32, 1000)


def test_plain_flags_say_the_same():
    config = parse("--r", "32", "--parts", "att", "ffn.key", "--train_parts", "time", "ln", "--grad_cp")
    assert config.peft_options == {"r": 32}
    assert config.parts == ("att", "ffn.key") and config.train_parts == ("time", "ln") and config.grad_cp


@pytest.mark.parametrize("written", [["[]"], ["time,ln"], ['["time",', '"ln"]'], ["[time,ln]"]])
def test_train_parts_are_taken_in_every_way_that_scripts_write_them(written):
    assert parse("--train_parts", *written).train_parts == (() if written == ["[]"] else ("time", "ln"))


def test_lr_final_is_lr_init_where_it_is_not_given():
    assert parse("--lr_init", "3e-4").lr_final == 3e-4
    assert parse("--lr_init", "3e-4", "--lr_final", "0").lr_final == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_lacks_is_refused(method):
    with pytest.raises(UserError, match="unknown flag --rank"):
        parse("--peft", method, "--rank", "3")
    options = {"bone": "alpha", "miss": "alpha"}
    if method in options and "lora" in METHODS:
        with pytest.raises(UserError, match=f"--peft {method}: {method} has no option {options[method]}"):
            parse("--peft", method, f"--{options[method]}", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--micro_bsize", "3"], "unknown flag --micro_bsize; did you mean --micro_bsz"),
        (["--peft", "bonne"], "bonne"),
        (["--r", "0"], "r must be at least 1, not 0"),
        (["--r", "x"], "--r: invalid int value: 'x'"),
        (["--micro_bsz", "0"], "--micro_bsz must be at least 1"),
        (["--lr_init", "nan"], "--lr_init must be at least 0, not nan"),
        (["--beta2", "1"], "--beta2 must be in"),
        (["--devices", "two"], "--devices takes a number"),
        (["--grad_cp", "2"], "takes 0 or 1"),
        (["--dataload", "all"], "invalid choice: 'all'"),
        (["--my_testing", "x090"], "unknown version; there are x060"),
        (["--bone_config", "{bone_r:64}"], "not JSON"),
        (["--data_rows", "1000"], "--data_rows takes FIRST:LAST"),
        (["--data_rows=-5:"], "--data_rows takes FIRST:LAST"),
        (["--resume", "last"], "--resume takes auto"),
        (["--peft", "none", "--r", "8"], "trains the whole model"),
        (["--data_file", ""], "--data_file is missing"),
    ],
)
def test_bad_flags_get_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        TrainConfig.from_argv(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name in ("--load_model", "--peft", "--r", "--resume", "model:", "output:"):
        assert name in text


@pytest.mark.parametrize(
    "rows, kept", [(":3", [0, 1, 2]), ("2:4", [2, 3]), ("6:", [6, 7]), ("", list(range(8))), (":", list(range(8)))]
)
def test_only_the_rows_that_are_asked_for_are_trained(rows, kept, tmp_path):
    make_world(tmp_path, rows=8)
    whole, chosen = (
        TrainingData.open(TrainConfig.from_argv(arguments(tmp_path, *more)), small_model(vocab_size=257)).documents
        for more in ([], ["--data_rows", rows])
    )
    assert [chosen[n][0].tolist() for n in range(len(chosen))] == [whole[n][0].tolist() for n in kept]


def test_rows_that_leave_nothing_are_refused(tmp_path):
    make_world(tmp_path, rows=8)
    with pytest.raises(UserError, match="--data_rows 8: of 8 documents leaves none"):
        TrainingData.open(TrainConfig.from_argv(arguments(tmp_path, "--data_rows", "8:")), small_model(vocab_size=257))
