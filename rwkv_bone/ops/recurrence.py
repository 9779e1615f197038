"""What all recurrences over (B, T, H, N) share: argument checks, dispatch by device, registration with torch.library, autograd.

A recurrence is described by its inputs, its definition in plain torch and kernels for each device (`RecurrenceKernels` in cpu.py
and cuda.py), which give

    forward(*inputs, save=...) -> y, final state, saved       saved: what backward needs; empty unless `save`
    backward(*inputs but state, saved, gy, gfinal)            gradients of all inputs but bool ones, in order, the state's too
    saved_shape(r) -> the shape of `saved`                    gfinal may be None: zeros
    describe(dtype, N) -> words for people

and may rely on what `Recurrence` has checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import selfcheck
from .cuda import CHUNK

OPS = ("auto", "torch", "cpu", "cuda", "fla")
COMPUTE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}  # by r's dtype
FORMS = ("BTHN", "HN", "BHNN", "BT")


@dataclass(frozen=True)
class Input:
    """An input after r. `form`: its shape, in the sizes of r (B, T, H, N). `dtype`: "r", r's; "r or compute", r's or the one
    computed in; "compute", any floating-point one, which is converted to the one computed in; "bool"."""

    name: str
    form: str = "BTHN"
    dtype: str = "r"
    optional: bool = False


STATE = Input("state", "BHNN", "compute", optional=True)


def names_of(inputs: tuple[Input, ...]) -> list[str]:
    return ["r", *(i.name for i in inputs)]


def mark_as_opaque(op) -> None:
    """What torch's compiler would mark at the op's first call, for which torch imports it: two seconds that nobody needs."""
    for function in getattr(op, "_backend_fns", {}).values():
        if wrapped := getattr(function, "__wrapped__", None):
            wrapped.__dynamo_disable = wrapped  # where torch/_compile.py looks first


class Recurrence:
    """The op `name`. `inputs`: those after r, STATE among them. `reference`, `chunked`: the definition for few tokens and the
    form in matrix products for more than 16, which take the inputs in order; `fla`: the same by flash-linear-attention's
    kernels. `kernels`: by device type."""

    def __init__(
        self, name: str, inputs: tuple[Input, ...], reference: Callable, chunked: Callable, fla: Callable, kernels: dict[str, Any]
    ):
        self.name, self.inputs, self.fla = name, inputs, fla
        self.ways: dict[tuple, str] = {}  # what runs on a GPU, by op, dtype, N, tokens, device
        self.reference, self.chunked, self.kernels = reference, chunked, kernels
        self.state = 1 + inputs.index(STATE)
        self.has_gradient = [True, *(i.dtype != "bool" for i in inputs)]
        forms = [FORMS.index(i.form) for i in inputs]
        # by r's dtype, for each input: its form, its dtypes (None: any floating-point one)
        self.plans = {}
        for dtype, compute in COMPUTE.items():
            dtypes = {"r": (dtype,), "r or compute": (dtype, compute), "compute": None, "bool": (torch.bool,)}
            self.plans[dtype] = [(form, dtypes[i.dtype]) for form, i in zip(forms, inputs)]
        self.converted = [1 + n for n, i in enumerate(inputs) if i.dtype == "compute"]
        self._register()

    def __call__(self, tensors: tuple[Tensor | None, ...], op: str) -> tuple[Tensor, Tensor]:
        """y and the final state. `tensors`: r and the other inputs. Raises ValueError as `_check` does."""
        compute = self._check(tensors, op)
        for n in self.converted:
            x = tensors[n]
            if x is not None and x.dtype != compute:
                tensors = (*tensors[:n], x.to(compute), *tensors[n + 1 :])
        r = tensors[0]
        assert r is not None
        way = self._way(r, op)
        if way == "torch":  # a chunk costs as much as 16 steps: sampling takes one at a time
            return (self.chunked if r.shape[1] > 16 else self.reference)(*tensors)
        if way == "fla":
            return self.fla(*tensors)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        if save or torch.compiler.is_compiling() or type(r) is not Tensor or r.is_meta:
            return self.op(*tensors, save)[:2]
        return self.kernels[r.device.type].forward(*tensors, save=False)[:2]  # the op's own cost is above a step's

    def unchecked(self, tensors: tuple[Tensor | None, ...], op: str) -> tuple[Tensor, Tensor]:
        """The same without gradients, for tensors that are known to be right: the checks take a third of a short call's time."""
        r = tensors[0]
        if op in ("auto", "cpu") and r is not None and r.device.type == "cpu":
            return self.kernels["cpu"].forward(*tensors, save=False)[:2]
        return self(tensors, op)

    def _way(self, r: Tensor, op: str) -> str:
        """What runs: "torch", "fla", or a kernel of ours."""
        if op == "torch" or r.device.type in ("cpu", "meta"):
            return op
        if torch.compiler.is_compiling() or type(r) is not Tensor:  # nothing can be tried out now
            return op
        key = (op, r.dtype, r.shape[-1], min(r.shape[1], CHUNK), r.device)
        if key not in self.ways:
            self.ways[key] = selfcheck.choose(self, *key[1:4], r.device, op).way
        return self.ways[key]

    def describe(self, device: str, dtype: torch.dtype, N: int, op: str = "auto") -> str:
        """What runs for inputs of `dtype` on `device` ("cpu", "cuda": the current GPU) with heads of N channels, in words."""
        if op == "torch":
            return selfcheck.WORDS[op]
        if device == "cuda":
            return selfcheck.choose(self, dtype, N, CHUNK, torch.device("cuda", torch.cuda.current_device()), op).text
        return self.kernels[device].describe(dtype, N)

    def _check(self, tensors: tuple[Tensor | None, ...], op: str) -> torch.dtype:
        """The dtype to compute in for these arguments; else a ValueError that says of which tensor what was
        expected and what came."""
        r = tensors[0]
        assert r is not None
        shape, dtype, device = r.shape, r.dtype, r.device
        if op not in OPS:
            raise ValueError(f"{self.name}: op must be one of {', '.join(OPS)}, not {op!r}")
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{self.name}: r must have shape (B, T, H, N), none of them 0, not {tuple(shape)}")
        plan = self.plans.get(dtype)
        if plan is None:
            raise ValueError(f"{self.name}: r must be float32, bfloat16 or float64, not {dtype}")
        if not r.is_contiguous():
            self._refuse(0, tensors, shape)
        B, T, H, N = shape
        shapes = (shape, (H, N), (B, H, N, N), (B, T))
        for n, (form, dtypes) in enumerate(plan, 1):
            x = tensors[n]
            if x is None:
                if not self.inputs[n - 1].optional:
                    raise ValueError(f"{self.name}: {self.inputs[n - 1].name} must be a tensor, not None")
            elif not (
                x.shape == shapes[form]
                and x.device == device
                and (x.dtype in dtypes if dtypes is not None else x.is_floating_point())
                and x.is_contiguous()
            ):
                self._refuse(n, tensors, shapes[form])
        place = device.type
        takes = place != "cpu" if op == "fla" else place in self.kernels and op in ("auto", place)
        takes = takes or (place == "meta" and op == "cpu")  # shapes alone, those of the CPU's kernel
        if op != "torch" and not takes:
            if op == "fla":
                raise ValueError(f"{self.name}: op='fla' takes tensors on a GPU, and r is on {device}")
            if op == "auto":
                raise ValueError(f"{self.name}: there is no kernel for {place}; use op='torch'")
            raise ValueError(f"{self.name}: op={op!r} takes tensors on {op}, and r is on {device}")
        return COMPUTE[dtype]

    def _refuse(self, n: int, tensors: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> None:
        """Raise the ValueError that says why input n is not what the op takes."""
        name, rule = (self.inputs[n - 1].name, self.inputs[n - 1].dtype) if n else ("r", "r")
        x, r = tensors[n], tensors[0]
        assert x is not None and r is not None
        compute = COMPUTE[r.dtype]
        if x.shape != shape:
            wrong = f"must have shape {tuple(shape)} as r has, not {tuple(x.shape)}"
        elif x.device != r.device:
            wrong = f"must be on {r.device} as r is, not on {x.device}"
        elif rule == "r" and x.dtype != r.dtype:
            wrong = f"must be {r.dtype} as r is, not {x.dtype}"
        elif rule == "r or compute" and x.dtype not in (r.dtype, compute):
            wrong = f"must be {r.dtype} as r is, or {compute}, not {x.dtype}"
        elif rule == "compute" and not x.is_floating_point():
            wrong = f"must be floating-point, not {x.dtype}"
        elif rule == "bool" and x.dtype != torch.bool:
            wrong = f"must be torch.bool, not {x.dtype}"
        else:
            wrong = f"must be contiguous, and has strides {x.stride()}; call .contiguous()"
        raise ValueError(f"{self.name}: {name} {wrong}")

    def _register(self) -> None:
        """The ops rwkv_bone::NAME and rwkv_bone::NAME_backward: torch.compile, opcheck and autograd know them."""
        state = self.state
        arguments = ["Tensor r", *(f"Tensor{'?' * i.optional} {i.name}" for i in self.inputs)]
        gradients = ", ".join(["Tensor"] * sum(self.has_gradient))
        forward_schema = f"({', '.join(arguments)}, bool save) -> (Tensor, Tensor, Tensor)"
        del arguments[state]
        backward_schema = f"({', '.join(arguments)}, Tensor saved, Tensor gy, Tensor? gfinal) -> ({gradients})"

        def new_state(r: Tensor, *shape: int) -> Tensor:
            return r.new_empty(shape, dtype=COMPUTE[r.dtype])

        @torch.library.custom_op(f"rwkv_bone::{self.name}", mutates_args=(), schema=forward_schema)
        def forward(r, *rest):
            *inputs, save = rest
            return self.kernels[r.device.type].forward(r, *inputs, save=save)

        @forward.register_fake
        def _(r, *rest):
            B, _, H, N = r.shape
            saved = self.kernels["cpu" if r.is_meta else r.device.type].saved_shape(r) if rest[-1] else (0,)
            return r.new_empty(r.shape), new_state(r, B, H, N, N), new_state(r, *saved)

        @torch.library.custom_op(f"rwkv_bone::{self.name}_backward", mutates_args=(), schema=backward_schema)
        def backward(r, *rest):
            return self.kernels[r.device.type].backward(r, *rest)

        @backward.register_fake
        def _(r, *rest):
            B, _, H, N = r.shape
            inputs = [r, *rest[:-3]]
            inputs.insert(state, new_state(r, B, H, N, N))
            return tuple(x.new_empty(x.shape) for x, wanted in zip(inputs, self.has_gradient) if wanted)

        def setup_context(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            ctx.has_state = inputs[state] is not None
            ctx.save_for_backward(*inputs[:state], *inputs[state + 1 : -1], output[2])

        def autograd(ctx, gy: Tensor | None, gfinal: Tensor | None, _gsaved):
            gy = torch.zeros_like(ctx.saved_tensors[0]) if gy is None else gy.contiguous()
            gradients = iter(backward(*ctx.saved_tensors, gy, None if gfinal is None else gfinal.contiguous()))
            found = [next(gradients) if wanted else None for wanted in self.has_gradient]
            if not ctx.has_state:
                found[state] = None
            return *found, None

        forward.register_autograd(autograd, setup_context=setup_context)
        for op in (forward, backward):
            mark_as_opaque(op)
        self.op, self.backward_op = forward, backward
