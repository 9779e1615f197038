"""Base models that `rwkv-bone download` knows: where they lie, how large they are, under which licence, what they are for.

Names and sizes as public sources had them in November 2026. The files of RWKV-7 G1 are replaced by newer ones of the same size
from time to time: `newest` finds these by name.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Known(NamedTuple):
    """One base model on the hub."""

    name: str  # for the command line
    repository: str
    file: str
    gb: float  # 10^9 bytes
    licence: str
    use: str
    sha256: str = ""  # of `file`, where a public source other than the hub says it

    def newest(self, files: Iterable[str]) -> str:
        """Of a repository's files the newest release of this size; `file` where none is newer, or the releases are final."""
        pattern = re.sub(r"^rwkv7-g1[a-z]?-", "rwkv7-g1[a-z]?[0-9]?-", re.escape(self.file).replace("\\-", "-"))
        pattern = re.sub(r"-\d{8}-ctx\d+", r"-(\\d{8})-ctx\\d+", pattern)
        dated = [(match[1], file) for file in files if (match := re.fullmatch(pattern, file))]
        return max(dated)[1] if dated and self.repository == G1 else self.file


G1, WORLD = "BlinkDL/rwkv7-g1", "BlinkDL/rwkv-6-world"
KNOWN = {
    model.name: model
    for model in (
        Known("g1-0.1b", G1, "rwkv7-g1d-0.1b-20260129-ctx8192.pth", 0.4, "Apache-2.0", "first trials, also on a CPU"),
        Known("g1-0.4b", G1, "rwkv7-g1d-0.4b-20260210-ctx8192.pth", 0.9, "Apache-2.0", "narrow tasks, 4 GB cards"),
        Known("g1-1.5b", G1, "rwkv7-g1i-1.5b-20260805-ctx16384.pth", 3.1, "Apache-2.0", "chat and tasks, 8 GB cards"),
        Known("g1-2.9b", G1, "rwkv7-g1j-2.9b-20260831-ctx16384.pth", 5.9, "Apache-2.0", "chat and tasks, 12 GB cards",
              "966f3420f833532aae3fb1fd6326533b08d43d23b7b03eaa2f0694a30b64a239"),
        Known("g1-7.2b", G1, "rwkv7-g1j-7.2b-20260831-ctx16384.pth", 14.4, "Apache-2.0", "16 GB cards with --quant, or 24 GB"),
        Known("g1-13.3b", G1, "rwkv7-g1j-13.3b-20260831-ctx16384.pth", 26.5, "Apache-2.0", "24 GB cards with --quant, or 48 GB",
              "559371f5b9aef13189ae54b345ac096af4ad2b689996c05d89de687612b3ae65"),
        Known("world6-1.6b", WORLD, "RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", 3.2, "Apache-2.0", "RWKV-6; 8 GB cards",
              "cda1f0ebe802e2859bfa129546372fd1eac60319111f215f65ced67dd334db36"),
        Known("world6-3b", WORLD, "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth", 6.2, "Apache-2.0", "RWKV-6; 12 GB cards",
              "c7c4e68ea6d561661de0562c8f229e62668f9c2d804346a87ae28d6209cc4738"),
        Known("world6-7b", WORLD, "RWKV-x060-World-7B-v3-20241112-ctx4096.pth", 15.3, "Apache-2.0", "RWKV-6; 24 GB cards"),
        Known("world6-14b", WORLD, "RWKV-x060-World-14B-v2.1-20240719-ctx4096.pth", 28.1, "Apache-2.0", "RWKV-6; 48 GB cards",
              "b65ad980b70833dbfab88c6894784cb0772ae15bd8850f23e7bc10334e785c06"),
    )
}  # fmt: skip
