"""Fine-tune an RWKV-6 model: `python train.py --load_model BASE.pth --data_file DATA --peft bone`. See `--help`."""

from rwkv_bone.errors import run
from rwkv_bone.training.run import main

if __name__ == "__main__":
    run(main)
