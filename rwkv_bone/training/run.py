"""train.py's body: command line -> configuration -> model, data, adapter -> a finished run."""

from dataclasses import replace

import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import UserError
from ..files.adapters import add_time_state, load_adapter
from ..files.models import load_model
from ..interop.rwkv_peft import Foreign
from ..models.x060 import RWKV, ModelConfig
from ..peft import METHODS, inject, start_from_gradients, train_parts
from ..peft.lora_ga import LoraGaConfig
from ..peft.quant import quantise_model
from .fit import base_dtype, fit
from .loader import TrainingData
from .loss import cross_entropy_sum
from .show import show_batch


def main(argv: list[str] | None = None, deepspeed: type | None = None) -> int:
    """Run a command line; returns the exit code. `deepspeed` replaces Lightning's DeepSpeedStrategy."""
    config = TrainConfig.from_argv(argv)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.random_seed >= 0:
        torch.manual_seed(config.random_seed)
    model = make_model(config)
    data = TrainingData.open(config, model.config.vocab_size)
    if config.show_batch:
        print(show_batch(data.batches().batch(0, 0), data.tokenizer()))
        return 0
    config = adapt(model, data, config)
    return fit(model, data, config, deepspeed)


def make_model(config: TrainConfig) -> RWKV:
    """The model of --load_model, checked against the sizes that were given; or a new one."""
    if config.load_model:
        model = load_model(config.load_model, base_dtype(config))
        for name in ("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn"):
            asked, found = getattr(config, name), getattr(model.config, name)
            if asked not in (0, found):
                raise UserError(f"--{name} {asked} contradicts {config.load_model}, which has {found}; leave the flag out")
        if config.quant != "none":
            quantise_model(model, config.quant)
        return model
    if config.peft != "none":
        raise UserError(f"--load_model is missing: --peft {config.peft} needs a base model (--peft none can begin a new one)")
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn")}
    model = RWKV(ModelConfig.new(**sizes, head_size=config.head_size_a)).initialise()
    return model.to(base_dtype(config))


def adapt(model: RWKV, data: TrainingData, config: TrainConfig) -> TrainConfig:
    """Put the chosen adapter on the model, or an earlier one's values with it; the rest of the base is frozen.

    Returns the configuration with the options that the earlier adapter has.
    """
    if config.train_type == "state":
        model.requires_grad_(False)
        if not model.config.time_state:
            add_time_state(model)
        for layer in range(model.config.n_layer):
            model.get_parameter(f"blocks.{layer}.att.time_state").requires_grad_(True)
        return config
    if config.peft == "none":
        model.requires_grad_(True)
        return config
    if config.peft_checkpoint:
        told = config.peft_options
        foreign = Foreign(told.get("alpha"), config.peft_init, config.peft, told.get("lora_dropout", 0.0))
        info = load_adapter(model, config.peft_checkpoint, foreign=foreign)
        if info["method"] != config.peft:
            raise UserError(f"{config.peft_checkpoint} holds {info['method']}; --peft {config.peft} cannot start from it")
        for name, value in config.peft_options.items():
            found = info["options"].get(name)
            if found != value and ("foreign" not in info or name in info["options"]):  # others' files do not say all
                raise UserError(f"{config.peft_checkpoint} has {name} {found}, not {value}; leave --{name} out")
        config = replace(config, peft_options=dict(info["options"]))
    else:
        method = METHODS[config.peft]
        options = method.config_from(config.peft_options, config.peft)
        inject(model, method, options, config.parts)
        if method.starts_from_gradient:
            assert isinstance(options, LoraGaConfig)
            first = data.batches()
            micro_batches = [first.batch(0, n) for n in range(min(options.init_batches, len(first)))]
            start_from_gradients(model, lambda micro: mean_loss(model, micro), micro_batches)
    train_parts(model, config.train_parts)
    return config


def mean_loss(model: RWKV, micro: dict[str, Tensor]) -> Tensor:
    hidden, _ = model.hidden(micro["idx"], reset=micro.get("reset"))
    return cross_entropy_sum(hidden, model.head.weight, micro["targets"]) / (micro["targets"] >= 0).sum().clamp(min=1)
