"""What the CPU kernels of cpp/ share in Python: building for several instruction sets, threads, and calls through ctypes."""

import ctypes
import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..terminal import counted
from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Type in cpp/cpu.h
VARIANTS = {"portable": 0, "avx2": 1, "avx512": 2}  # Variant in cpp/cpu.h, in order of speed
VARIANT_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
INT, SIZE, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
PLAIN = (int, bool, type(None))  # types of arguments that are no tensors; isinstance(x, Tensor) takes longer


class Kernels:
    """The C functions NAME_cpu_FUNCTION of cpp/NAME_cpu.cpp, built on first use. Every one begins with the arguments variant,
    threads and parallel; `functions` gives the types of the others."""

    def __init__(self, name: str, functions: dict[str, list[Any]]):
        self.name, self.functions = name, functions

    def build_library(self, cache: Path | None = None) -> Path:
        source = build.source(f"cpp/{self.name}_cpu.cpp")
        variants = VARIANTS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
        macro = f"-D{self.name.upper()}_VARIANT"
        objects = [build.Object(source.with_name("cpu.cpp")), build.Object(source)]
        objects += [build.Object(source, (f"{macro}={name}", *VARIANT_FLAGS[name])) for name in variants]
        return build.build(
            f"{self.name}_cpu", objects, build.cxx_compiler(),
            flags=("-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=fast"),
            link_flags=("-shared", "-pthread"), cache=cache,
        )  # fmt: skip

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        return build.load(self.build_library())

    @functools.cached_property
    def available(self) -> bool:
        """Whether the library is there or can be built, for what has torch operations in its place."""
        try:
            return bool(self.library)
        except UserError:
            return False

    @functools.cached_property
    def entries(self) -> dict[str, Any]:
        """The functions with their C types, by name."""
        entries = {name: getattr(self.library, f"{self.name}_cpu_{name}") for name in self.functions}
        for name, argtypes in self.functions.items():
            entries[name].restype, entries[name].argtypes = None, [INT, INT, POINTER, *argtypes]
        return entries

    @functools.cached_property
    def variants(self) -> list[str]:
        """The instruction sets that this machine can run, the fastest last."""
        return [name for name, number in VARIANTS.items() if self.library.cpu_has(number)]

    def call(self, function: str, *arguments, variant: str | None = None, threads: int | None = None) -> None:
        """NAME_cpu_`function`(*arguments), tensors as the addresses of their data. `variant`, `threads`: for tests; else the
        fastest that this machine can run, and as many as torch takes."""
        if variant is not None and variant not in self.variants:
            raise ValueError(f"this machine has no {variant}: choose among {', '.join(self.variants)}")
        addresses = [x if type(x) in PLAIN else x.data_ptr() for x in arguments]
        number = VARIANTS[variant or self.variants[-1]]
        self.entries[function](number, threads or torch.get_num_threads(), torch_threads(), *addresses)


class RecurrenceKernels(Kernels):
    """The kernels of a recurrence (ops/recurrence.py): the functions forward and backward of cpp/NAME_cpu.cpp, which take
    contiguous tensors that `Recurrence` has checked. Those before the state have gradients.

    names       of the inputs, in the op's order
    checkpoint  tokens between the states that forward keeps for backward; kCheckpoint in cpp/NAME_cpu.h
    widest      channels of a head that they take at the most; 0: any number
    float64     the instruction set that computes in float64, where that is one alone
    """

    def __init__(self, name: str, names: Sequence[str], checkpoint: int, widest: int = 0, float64: str = ""):
        head: list[Any] = [INT, INT, *[SIZE] * 4]  # dtypes of r and of log_w, B, T, H, N
        n, self.state, self.log_w = len(names), names.index("state"), names.index("log_w")
        super().__init__(name, {"forward": head + [POINTER] * (n + 3), "backward": head + [POINTER] * (n + self.state + 3)})
        self.checkpoint, self.widest, self.float64 = checkpoint, widest, float64

    def check_head(self, N: int) -> None:
        if N > self.widest > 0:
            wanted = f"heads of up to {self.widest} channels"
            raise ValueError(f"{self.name}: the CPU kernel takes {wanted}, not {N}; use op='torch'")

    def describe(self, dtype: torch.dtype, N: int) -> str:
        self.check_head(N)
        variant = (dtype == torch.float64 and self.float64) or self.variants[-1]
        return f"C++ kernel, {variant}, {counted(torch.get_num_threads(), 'thread')}"

    def saved_shape(self, r: Tensor) -> tuple[int, ...]:
        """The shape of the states that forward keeps for backward, the initial one first."""
        B, T, H, N = r.shape
        return (B, H, (T + self.checkpoint - 1) // self.checkpoint, N, N)

    def forward(
        self, *inputs: Tensor | None, save: bool, variant: str | None = None, threads: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state, and the states that backward needs (empty unless `save`)."""
        r, log_w = inputs[0], inputs[self.log_w]
        assert r is not None and log_w is not None
        B, T, H, N = r.shape
        self.check_head(N)
        states = torch.float64 if r.dtype == torch.float64 else torch.float32
        y, final_state = torch.empty_like(r), torch.empty(B, H, N, N, dtype=states)
        saved = torch.empty(self.saved_shape(r) if save else 0, dtype=states)
        results = (y, final_state, saved if save else None)
        dtypes = DTYPES[r.dtype], DTYPES[log_w.dtype]
        self.call("forward", *dtypes, B, T, H, N, *inputs, *results, variant=variant, threads=threads)
        return y, final_state, saved

    def backward(self, *tensors: Tensor | None, variant: str | None = None, threads: int | None = None) -> tuple[Tensor, ...]:
        """The gradients of the inputs up to the state. tensors: the inputs but the state, `saved`, and the gradients of y and
        of the final state (None: zeros)."""
        r, log_w, saved = tensors[0], tensors[self.log_w], tensors[-3]
        assert r is not None and log_w is not None and saved is not None
        B, T, H, N = r.shape
        gradients = [torch.empty_like(x) for x in tensors[: self.state] if x is not None]
        gradients.append(torch.empty(B, H, N, N, dtype=saved.dtype))
        dtypes = DTYPES[r.dtype], DTYPES[log_w.dtype]
        self.call("backward", *dtypes, B, T, H, N, *tensors, *gradients, variant=variant, threads=threads)
        return tuple(gradients)


@functools.cache
def torch_threads() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch runs on: one pool of threads, not two that fight for cores.

    None where torch has another kind of threads; then the kernel starts its own.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
