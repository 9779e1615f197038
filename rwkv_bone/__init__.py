"""rwkv-bone: fine-tune RWKV-6 with Bone (Block Affine, arXiv 2409.15371)."""

__version__ = "0.1.0"
