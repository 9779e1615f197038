"""Fine-tune an RWKV-6 model: `python train.py --load_model BASE.pth --data_file DATA --peft bone`. See `--help`."""

import sys

try:
    from rwkv_bone.errors import run
    from rwkv_bone.training.run import main
except ModuleNotFoundError as error:
    print(f"error: no package {error.name} in {sys.executable}; activate the environment, or see README", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    run(main)
