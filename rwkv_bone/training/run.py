"""train.py's body: command line -> configuration -> model, data, adapter -> a finished run."""

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch

from ..config import TrainConfig
from ..errors import UserError
from ..files.adapters import load_adapter
from ..files.models import load_model
from ..interop.rwkv_peft import Foreign
from ..models import MODELS, Execution, LanguageModel
from ..peft import METHODS, inject, start_from_gradients
from ..peft.adapter import AdapterLinear, adapters
from ..peft.lora_ga import LoraGaConfig
from ..peft.quant import quantise_model
from .loader import TrainingData
from .loop import fit
from .objectives import OBJECTIVES, Objective, mean_loss
from .optimiser import OPTIMISERS
from .show import show_batch
from .strategies import Engine, device_type, make_engine
from .summary import base_dtype

SIZE_FLAGS = ("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn")


def main(argv: list[str] | None = None, deepspeed: type | None = None) -> int:
    """Run a command line; returns the exit code. `deepspeed` replaces Fabric's DeepSpeedStrategy."""
    config = TrainConfig.from_argv(argv)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.random_seed >= 0:
        torch.manual_seed(config.random_seed)
    for name, known in (("objective", OBJECTIVES), ("optim", OPTIMISERS)):
        if getattr(config, name) not in known:
            raise UserError(f"--{name} {getattr(config, name)}: unknown; there are {', '.join(known)}")
    engine = make_engine(config, deepspeed)
    model = make_model(config)
    objective = OBJECTIVES[config.objective](config)
    data = objective.open_data(model)
    if config.show_batch:
        if data.tokenizer is None:
            raise UserError("--show_batch: the data's tokenizer is not known; give --tokenizer")
        print(show_batch(data.epochs().batch(0, 0), data.tokenizer))
        return 0
    if not config.dry_run:
        engine.launch()
    config = adapt(model, data, objective, config, engine)
    return fit(model, data, objective, config, engine)


def make_model(config: TrainConfig) -> LanguageModel:
    """The model of --load_model, checked against the sizes that were given; or a new one."""
    execution = Execution(config.op, config.grad_cp)
    if config.load_model:
        model = load_model(config.load_model, base_dtype(config), execution=execution)
        if config.my_testing not in ("", model.version):
            raise UserError(f"--my_testing {config.my_testing}: {config.load_model} is {model.title}; leave the flag out")
        sizes = asdict(model.sizes)
        for name in SIZE_FLAGS:
            asked, found = getattr(config, name), sizes.get(name)
            if asked not in (0, found):
                has = "has none" if found is None else f"has {found}"
                raise UserError(f"--{name} {asked} contradicts {config.load_model}, which {has}; leave the flag out")
        if config.quant != "none":
            quantise_model(model, config.quant)
    else:
        if config.peft != "none":
            cure = "--peft none can begin a new one"
            raise UserError(f"--load_model is missing: --peft {config.peft} needs a base model ({cure})")
        kind = MODELS[config.my_testing or next(iter(MODELS))]
        given = {name: getattr(config, name) for name in SIZE_FLAGS}
        model = kind(kind.new_sizes(**given, head_size=config.head_size_a), execution).initialise().to(base_dtype(config))
    check_features(model, config)
    return model


def check_features(model: LanguageModel, config: TrainConfig) -> None:
    """Refuse what this model, objective or device does not have."""
    if config.train_type == "infctx" and not OBJECTIVES[config.objective].in_chunks:
        raise UserError(f"--train_type infctx: batches of --objective {config.objective} cannot be cut into chunks; leave it out")
    wanted = {"--train_type infctx": ("infctx", config.train_type == "infctx"), "--op": ("op", config.op != "auto"),
              "--train_type state": ("state", config.train_type == "state")}  # fmt: skip
    for flag, (feature, asked) in wanted.items():
        if asked and (why := model.cannot(feature)):
            raise UserError(f"{flag}: {why}; leave it out")
    device = device_type(config)
    if config.op not in ("auto", "torch", device) and (config.op, device) != ("fla", "cuda"):
        raise UserError(f"--op {config.op} is no kernel for this run, which is on {device}; leave the flag out")


def adapt(
    model: LanguageModel, data: TrainingData, objective: Objective, config: TrainConfig, engine: Engine
) -> TrainConfig:
    """Put the chosen adapter on the model, or an earlier one's values with it; the rest of the base is frozen.

    Returns the configuration with the options and parts that the adapter has. What an adapter starts from is computed on the
    run's device by the first process, which hands it to the others; a dry run, which shows sizes alone, leaves it out.
    """
    if config.train_type == "state":
        model.requires_grad_(False)
        for name in model.add_initial_state():
            model.get_parameter(name).requires_grad_(True)
        return config
    if config.peft == "none":
        model.requires_grad_(True)
        return config
    if config.peft_checkpoint:
        config = from_checkpoint(model, config)
    else:
        method = METHODS[config.peft]
        options = method.config_from(config.peft_options, config.peft)
        parts = config.parts or None
        if engine.device.type != "cpu" and not config.dry_run:  # what a start is made of: decompositions, gradients
            model.to(engine.device)
        try:
            starts = engine.first and not config.dry_run
            inject(model, method, options, parts, start=starts)
            if starts and method.starts_from_gradient:
                assert isinstance(options, LoraGaConfig)
                first = data.epochs()
                micro_batches = [first.batch(0, n) for n in range(min(options.init_batches, len(first)))]
                micro_batches = [{name: t.to(engine.device) for name, t in m.items()} for m in micro_batches]
                start_from_gradients(model, lambda micro: mean_loss(model, objective, micro), micro_batches)
        except UserError as error:
            raise UserError(f"--peft {config.peft}, --parts {' '.join(config.parts) or 'as usual'}: {error}") from None
        if isinstance(model.head, AdapterLinear):
            raise UserError(f"--parts {' '.join(config.parts)}: the head takes no adapter; --train_parts trains it in full")
        if engine.world > 1 and not config.dry_run:
            share_start(model, engine)
    try:
        model.train_parts(config.train_parts)
    except UserError as error:
        raise UserError(f"--train_parts: {error}") from None
    return replace(config, parts=config.parts or model.targets)


def share_start(model: LanguageModel, engine: Engine) -> None:
    """The first device's initial adapters, on all devices; the random numbers too go on from where it stands."""
    for layer in adapters(model).values():
        state = {key: t for key, t in layer.state_dict().items() if key.partition(".")[0] not in ("weight", "bias")}
        shared: Mapping[str, torch.Tensor] = engine.broadcast({key: t.cpu() for key, t in state.items()})
        layer.load_state_dict(shared, strict=False)
    torch.set_rng_state(engine.broadcast(torch.get_rng_state()))


def from_checkpoint(model: LanguageModel, config: TrainConfig) -> TrainConfig:
    """Put the adapter of --peft_checkpoint on the model; what the flags say beside it must be what it holds."""
    path, told = config.peft_checkpoint, config.peft_options
    foreign = Foreign(told.get("alpha"), config.peft_init, config.peft, told.get("lora_dropout", 0.0))
    info = load_adapter(model, path, foreign=foreign)
    if info["method"] != config.peft:
        raise UserError(f"{path} holds {info['method']}; --peft {config.peft} cannot start from it")
    for name, value in told.items():
        found = info["options"].get(name)
        if found != value and ("foreign" not in info or name in info["options"]):  # others' files do not say all
            raise UserError(f"{path} has {name} {found}, not {value}; leave --{name} out")
    parts = info.get("parts") or sorted({model.part_of(f"{name}.weight") for name in adapters(model)})
    if config.parts and set(config.parts) != set(parts):
        raise UserError(f"{path} holds adapters on {' '.join(parts)}, not on {' '.join(config.parts)}; leave --parts out")
    return replace(config, peft_options=dict(info["options"]), parts=tuple(parts))
