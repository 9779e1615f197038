"""Operations on tensors of the meta device, of which nothing but shapes and dtypes count.

torch has such rules for all operations, in Python, and imports its compiler for them: a second and more before a training has
begun. Here are those that models are made of; the rest goes to torch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
OF_INTEGERS = ("add", "sub", "mul", "remainder", "__rshift__", "bitwise_xor", "bitwise_and")  # whose result is an integer, too


@functools.cache
def rule(op: Any) -> Callable[..., Any]:
    """What stands for an operation of torch's dispatcher: takes its arguments and gives its results, without values."""
    name = op._schema.name.removeprefix("aten::")
    if op in RULES:
        return RULES[op]
    if op._overloadname == "out":
        return lambda *args, out, **_: out
    if name.endswith("_") and op._schema.is_mutable and torch.Tag.inplace_view not in op.tags:
        return lambda x, *_, **__: x
    if torch.Tag.pointwise in op.tags and len(op._schema.returns) == 1:
        return functools.partial(elementwise, op, name)
    return op


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def like(x: Tensor, *_: Any, dtype: torch.dtype | None = None, memory_format: Any = None, **__: Any) -> Tensor:
    """A new tensor like x, which keeps the order of x's dimensions in memory where nothing overlaps."""
    dtype = dtype or x.dtype
    order = sorted(range(x.dim()), key=lambda i: (x.stride(i), x.shape[i]), reverse=True)
    dense = itertools.accumulate((x.shape[i] for i in reversed(order)), int.__mul__, initial=1)
    strides = dict(zip(reversed(order), dense))
    if memory_format is torch.contiguous_format or x.is_contiguous() or any(x.stride(i) != n for i, n in strides.items()):
        return empty(x.shape, dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")


def elementwise(op: Any, name: str, *args: Any, **kwargs: Any) -> Tensor:
    tensors = [x for x in args if isinstance(x, Tensor)]
    values = [x for x in tensors if x.dtype != torch.bool]
    dtypes = {x.dtype for x in values if x.dim()} or {x.dtype for x in values}
    floats = all(dtype.is_floating_point for dtype in dtypes)
    if not dtypes or not (floats or name in OF_INTEGERS or name in COMPARISONS):
        return op(*args, **kwargs)
    dtype = torch.bool if name in COMPARISONS else functools.reduce(torch.promote_types, dtypes)
    sizes = itertools.zip_longest(*(reversed(x.shape) for x in tensors), fillvalue=1)
    shape = tuple(next((n for n in dimension if n != 1), 1) for dimension in sizes)[::-1]
    first = next((x for x in tensors if x.shape == shape), None)
    return empty(shape, dtype) if first is None else like(first, dtype=dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    return empty((*a.shape[:-1], b.shape[-1]), a.dtype)


def added_product(plus: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return product(a, b)


def reduced(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    gone = {d % x.dim() for d in dims or range(x.dim())} if x.dim() else set()
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return empty(shape, dtype or (x.dtype if x.is_floating_point() else torch.int64))


def norm(x: Tensor, order: float = 2, *args: Any, **kwargs: Any) -> Tensor:
    return reduced(x, *args, **kwargs)


def largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values = reduced(x, [dim], keepdim, dtype=x.dtype)
    return values, empty(values.shape, torch.int64)


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return empty(shape, functools.reduce(torch.promote_types, (x.dtype for x in tensors)))


def stacked(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return empty(shape, tensors[0].dtype)


def padded(x: Tensor, pad: list[int], *_: Any) -> Tensor:
    sides = [*zip(pad[::2], pad[1::2]), *[(0, 0)] * (x.dim() - len(pad) // 2)]
    return empty([n + a + b for n, (a, b) in zip(x.shape, reversed(sides))], x.dtype)


def layer_norm(x: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[: -len(shape)], *(1 for _ in shape))
    return empty(x.shape, x.dtype), empty(rows, torch.float32), empty(rows, torch.float32)


def group_norm(x: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, groups: int, eps: float) -> tuple[Tensor, ...]:
    return empty(x.shape, x.dtype), empty((N, groups), torch.float32), empty((N, groups), torch.float32)


def norm_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Of both kinds: the last argument says which of x, weight and bias get a gradient."""
    weight = next((t for t in rest if isinstance(t, Tensor) and t.dim() == 1), None)
    wanted = rest[-1]
    return tuple(like(t) if t is not None and wants else None for t, wants in zip((x, weight, weight), wanted))


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: product,
    aten.bmm.default: product,
    aten.addmm.default: added_product,
    aten.baddbmm.default: added_product,
    aten.sum.default: reduced,
    aten.sum.dim_IntList: reduced,
    aten.linalg_vector_norm.default: norm,
    aten.max.dim: largest,
    aten.cat.default: joined,
    aten.stack.default: stacked,
    aten.constant_pad_nd.default: padded,
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
    aten.native_layer_norm_backward.default: norm_backward,
    aten.native_group_norm_backward.default: norm_backward,
    aten.log_sigmoid_forward.default: lambda x: (like(x), like(x)),
    aten.log_sigmoid_backward.default: lambda g, x, _: like(x),
    aten.gather.default: lambda x, dim, index, **_: empty(index.shape, x.dtype),
    aten.embedding.default: lambda weight, idx, *_: empty((*idx.shape, weight.shape[1]), weight.dtype),
    aten.embedding_dense_backward.default: lambda g, idx, rows, *_: empty((rows, g.shape[-1]), g.dtype),
    aten.slice_backward.default: lambda g, sizes, *_: empty(sizes, g.dtype),
    aten.select_backward.default: lambda g, sizes, *_: empty(sizes, g.dtype),
    aten._unsafe_view.default: aten.view.default,
    **{op.default: lambda x, size, dtype=None, **_: empty(size, dtype or x.dtype) for op in (aten.new_empty, aten.new_zeros)},
    aten.new_empty_strided.default: lambda x, size, _, dtype=None, **__: empty(size, dtype or x.dtype),
    aten.zeros.default: lambda size, dtype=torch.float32, **_: empty(size, dtype),
    aten.arange.start: lambda start, end, dtype=torch.int64, **_: empty((end - start,), dtype),
    **{op.default: like for op in (aten.clone, aten._to_copy, aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like)},
}
