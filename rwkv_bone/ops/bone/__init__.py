"""Bone's kernels: cpu.py and cuda.py. What they compute is defined in peft/bone.py, which alone imports them."""
