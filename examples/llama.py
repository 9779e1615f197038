"""Fine-tune a LLaMA-like model (LLaMA, Mistral, Qwen, Gemma, SmolLM, ...) with Bone.

    python examples/llama.py MODEL_FOLDER mine.jsonl OUT_FOLDER

MODEL_FOLDER is what Hugging Face calls a model: config.json, safetensors and the tokenizer's files; reading it takes
`pip install 'rwkv-bone[hf]'`. A line of mine.jsonl is {"question": ..., "answer": ...} or {"messages": [...]}; the model's
own chat template makes the text. OUT_FOLDER is a folder of the same kind with the merged weights, for transformers, vLLM,
llama.cpp's converter, ...
"""

import json
import sys
from pathlib import Path

import rwkv_bone as rb


def main(folder: str, data: str, out: str, r: int = 64, **flags) -> None:
    """r: Bone's block size, which must divide the sizes of the layers; flags: those of train.py."""
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    held_out, training = rows[: len(rows) // 10], rows[len(rows) // 10 :]

    model = rb.load_model(folder)
    tokenizer = rb.tokenizer(model)
    print(f"loss on {len(held_out)} held-out rows before: {rb.loss(model, held_out, tokenizer):.4f}")
    rb.inject(model, "bone", r=r)  # another method: "lora", r=16; some layers: parts=["q_proj", "v_proj"]
    rb.train(model, training, tokenizer, proj_dir=f"{out}-run", **flags)
    print(f"after: {rb.loss(model, held_out, tokenizer):.4f}")
    print(rb.generate(model, tokenizer, held_out[0]["question"], instruct=True, max_tokens=60)[0])
    rb.merge(model)
    rb.save(model, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
