"""Small random models of Hugging Face transformers as folders, for tests: LLaMA, Mistral, Qwen2, Qwen3, Gemma."""

import json
from pathlib import Path

import torch

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "llama": {"tie_word_embeddings": False, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},  # biases in q, k and v
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {"num_key_value_heads": 1},  # tied always, scaled embeddings
}
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of bytes with four special tokens, one of which begins every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocabulary["th"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "bos_token": "<s>", "pad_token": "<pad>",
              "eos_token": "<|im_end|>"}  # fmt: skip
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


def make_folder(path: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes) -> Path:
    """A random model of that kind, saved by transformers, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # every part counts: norms and biases too
            p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    for name, text in make_tokenizer().items():
        (path / name).write_text(text)
    return path


def open_hf(path: Path, dtype: torch.dtype = torch.float32):
    """The same, opened by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
