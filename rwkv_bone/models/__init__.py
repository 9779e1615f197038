"""Model architectures by the version name that RWKV trainers use (`--my_testing x060`)."""

from . import x060

VERSIONS = {"x060": x060}
