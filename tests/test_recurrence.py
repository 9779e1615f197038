"""What the ops of all recurrences do alike: exact gradients, states, resets, errors, torch.compile; a new one gets it all."""

import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.ops import wkv6, wkv7
from rwkv_bone.ops.recurrence import STATE, Input, Recurrence
from rwkv_bone.terminal import counted

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def make_inputs(op: Recurrence, B=2, T=20, H=2, N=8, dtype=FP32, repeated=False) -> dict[str, torch.Tensor]:
    """Random inputs by name, as a model has them. `repeated`: the same token again and again, never forgotten."""
    torch.manual_seed(T * 1000 + N)
    inputs = {"r": torch.randn(B, T, H, N, dtype=dtype)}
    for i in op.inputs:
        shape = {"BTHN": (B, T, H, N), "HN": (H, N), "BHNN": (B, H, N, N)}.get(i.form)
        if shape is not None:
            inputs[i.name] = torch.randn(shape, dtype=dtype)
    inputs["log_w"] = -0.6 * torch.sigmoid(inputs["log_w"])
    if "a" in inputs:  # kk and kk times a gate
        kk = F.normalize(inputs["a"][:, :1].expand(B, T, H, N) if repeated else inputs["a"], dim=-1).contiguous()
        inputs |= {"a": -kk, "b": kk if repeated else kk * torch.sigmoid(inputs["b"])}
    if repeated:
        inputs["log_w"] = torch.zeros(B, T, H, N, dtype=dtype)
    return inputs


def gradients(function, inputs, **others):
    """y, the final state, and the gradients of `inputs` for fixed ones of both, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, final = function(**leaves, **others)
    wanted = [torch.sin(torch.arange(x.numel(), dtype=FP64)).view(x.shape).to(x) for x in (y, final)]
    found = torch.autograd.grad((y, final), list(leaves.values()), wanted)
    return {"y": y.detach(), "final state": final.detach(), **dict(zip(leaves, found))}


def assert_close(got, want, tolerance):
    with torch.no_grad():
        errors = {name: float((got[name].double() - x).norm() / x.norm().clamp(min=1e-9)) for name, x in want.items()}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}  # NaN is not <=


@pytest.fixture(params=[wkv6, wkv7], ids=["wkv6", "wkv7"])
def module(request):
    return request.param


@pytest.fixture
def op(module):
    return module.recurrence


@pytest.fixture
def f(module, op):
    """The public function."""
    return getattr(module, op.name)


@pytest.mark.parametrize("T", [1, 16, 17, 63, 130])
@pytest.mark.parametrize("form", ["chunked", "cpu"])
@pytest.mark.parametrize("repeated", [False, True], ids=["random", "one token"])
def test_every_form_equals_the_definition_in_float64(op, f, form, T, repeated):
    inputs = make_inputs(op, T=T, dtype=FP64, repeated=repeated)
    got = gradients(op.chunked if form == "chunked" else f, inputs)
    assert_close(got, gradients(op.reference, inputs), 1e-13)


@pytest.mark.parametrize("form", ["torch", "cpu"])
def test_512_equal_tokens_stay_exact_in_float32(op, f, form):
    inputs = make_inputs(op, T=512, N=64, H=1, B=1, repeated=True)
    want = gradients(op.reference, {name: x.double() for name, x in inputs.items()})
    assert_close(gradients(f, inputs, op=form), want, 2e-5)


@pytest.mark.parametrize("form", ["torch", "cpu"])
def test_parts_with_carried_state_equal_the_whole(op, f, form):
    """In output and every gradient, the state's gradient flowing back from part to part: what long contexts rest on."""

    def in_parts(state, **inputs):
        ys = []
        for part in (slice(0, 1), slice(1, 40), slice(40, 56), slice(56, 150)):
            of_part = {name: x[:, part].contiguous() if x.dim() == 4 else x for name, x in inputs.items()}
            y, state = f(state=state, op=form, **of_part)
            ys.append(y)
        return torch.cat(ys, 1), state

    inputs = make_inputs(op, T=150, dtype=FP64)
    assert_close(gradients(in_parts, inputs), gradients(op.reference, inputs), 1e-13)


@pytest.mark.parametrize("form", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("starts", [[0], [1], [5, 6, 16, 17, 40], [31], [69]], ids=str)
def test_resets_make_separate_documents(form, starts):
    op, T = wkv7.recurrence, 70
    f = op.reference if form == "reference" else functools.partial(wkv7.wkv7, op=form)
    inputs = make_inputs(op, T=T, dtype=FP64)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, starts] = True

    def documents(state, **inputs):
        ys = []
        for begin, end in zip([0, *starts], [*starts, T]):
            if begin in starts:
                state = torch.zeros_like(state)
            if end > begin:
                y, state = op.reference(state=state, **{name: x[:, begin:end] for name, x in inputs.items()})
                ys.append(y)
        return torch.cat(ys, 1), state

    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    results = []
    for y, final in (f(**leaves, reset=reset), documents(**leaves)):
        found = torch.autograd.grad(y.sin().sum() + final.sin().sum(), list(leaves.values()), allow_unused=True)
        results.append({"y": y, "final": final, **{n: torch.zeros(()) if g is None else g for n, g in zip(leaves, found)}})
    got, want = results
    assert_close(got, want, 1e-13)


def test_wkv7_equals_the_recurrence_of_flash_linear_attention():
    """An independent program, in float32: its `dplr_recurrence` has (B, H, T, N), a state [key, value] and scales q."""
    fla = importlib.util.find_spec("fla")
    if fla is None:
        pytest.skip("needs fla-core")
    # the file alone: its package imports triton
    file = Path(fla.submodule_search_locations[0]) / "ops" / "generalized_delta_rule" / "dplr" / "naive.py"
    spec = importlib.util.spec_from_file_location("dplr_naive", file)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    inputs = make_inputs(wkv7.recurrence, T=33, N=16)
    r, log_w, k, v, a, b = (inputs[name].transpose(1, 2) for name in ("r", "log_w", "k", "v", "a", "b"))
    y, state = naive.dplr_recurrence(r * 16**0.5, k, v, a, b, log_w, inputs["state"].mT.contiguous(), True)
    want = {"y": y.transpose(1, 2).double(), "state": state.mT.double()}
    for form in ("torch", "cpu"):
        got = wkv7.wkv7(**inputs, op=form)
        assert_close({"y": got[0], "state": got[1]}, want, 1e-6)


def test_gradients_equal_finite_differences(op):
    inputs = make_inputs(op, B=1, T=18, N=3, dtype=FP64)
    names = list(inputs)
    for function in (op.reference, op.chunked):
        leaves = [x.requires_grad_() for x in inputs.values()]
        assert torch.autograd.gradcheck(lambda *x: function(**dict(zip(names, x))), leaves)  # noqa: B023


@pytest.mark.parametrize("form", ["torch", "cpu"])
def test_no_state_is_a_state_of_zeros(op, f, form):
    for T in (1, 30):
        inputs = make_inputs(op, T=T)
        inputs["state"].zero_()
        want = gradients(f, inputs, op=form)
        del inputs["state"]
        got = gradients(f, inputs, op=form)
        assert all(torch.equal(x, want[name]) for name, x in got.items())


def test_gradients_flow_from_either_result_alone(op, f):
    leaves = {name: x.requires_grad_() for name, x in make_inputs(op, dtype=FP64).items()}
    y, final = f(**leaves)
    both, *alone = (
        torch.autograd.grad(x.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        for x in (torch.cat([y.flatten(), final.flatten()]), y, final)
    )
    for a, b, c in zip(both, *alone):
        torch.testing.assert_close(a, b + c)


def test_only_wanted_gradients_are_given_and_without_any_nothing_is_saved(op, f):
    inputs = make_inputs(op)
    r = inputs.pop("r")
    wanted = r.clone().requires_grad_()
    y, final = f(r=wanted, **inputs)
    y.sum().backward()
    assert wanted.grad is not None and all(x.grad is None for x in inputs.values())
    plain = f(r=r, **inputs)
    assert plain[0].grad_fn is None and torch.equal(plain[0], y) and torch.equal(plain[1], final)
    arguments = [r, *(inputs.get(i.name) for i in op.inputs)]
    assert op.kernels["cpu"].forward(*arguments, save=False)[2].numel() == 0


def assert_registered(op: Recurrence, T: int) -> None:
    """Schema, fake kernels and autograd hold what torch demands, with and without optional inputs."""
    for optional in (True, False):
        inputs = make_inputs(op, B=1, T=T, N=4)
        if optional and op.inputs[-1].name == "reset":
            inputs["reset"] = torch.rand(1, T) < 0.2
        if not optional:
            del inputs["state"]
        arguments = [inputs["r"], *(inputs.get(i.name) for i in op.inputs)]
        y, final, saved = op.op(*arguments, True)
        del arguments[op.state]
        for gfinal in (final, None):
            torch.library.opcheck(op.backward_op, (*arguments, saved, y, gfinal))
        for save in (True, False):
            leaves = [x.requires_grad_(save) if x.is_floating_point() else x for x in inputs.values()]
            given = dict(zip(inputs, leaves))
            torch.library.opcheck(op.op, (given["r"], *(given.get(i.name) for i in op.inputs), save))


@pytest.mark.parametrize("T", [5, 20])
def test_ops_are_registered_as_torch_demands(op, T):
    assert_registered(op, T)


@pytest.mark.parametrize("form", ["auto", "torch"])
def test_compiles_to_one_graph_with_its_neighbours(op, f, form):
    def block(r, **others):
        y, state = f(2 * r, **others, op=form)
        return torch.tanh(y), state

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")  # raises at a break
    inputs = make_inputs(op, T=20)
    got, want = gradients(compiled, inputs), gradients(block, inputs)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, msg=name)


def test_says_what_it_chose(op):
    variant, threads = op.kernels["cpu"].variants[-1], counted(torch.get_num_threads(), "thread")
    assert op.describe("cpu", FP32, 64) == f"C++ kernel, {variant}, {threads}"
    assert op.describe("cpu", FP32, 64, op="torch") == "chunked, in plain torch"


def test_refuses_an_instruction_set_that_the_machine_lacks(op, monkeypatch):
    cpu, inputs = op.kernels["cpu"], make_inputs(op)
    monkeypatch.setattr(cpu, "variants", ["portable"])
    with pytest.raises(ValueError, match="has no avx512: choose among portable"):
        cpu.forward(inputs["r"], *(inputs.get(i.name) for i in op.inputs), save=False, variant="avx512")


def test_wkv7_refuses_heads_that_its_kernel_cannot_hold():
    with pytest.raises(ValueError, match=r"wkv7: .* up to 128 channels, not 129; use op='torch'"):
        wkv7.wkv7(**make_inputs(wkv7.recurrence, 1, 1, 1, 129))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": torch.ones(2, 3, 4)}, r"r must have shape \(B, T, H, N\), none of them 0, not \(2, 3, 4\)"),
        ({"r": torch.ones(1, 0, 2, 4)}, r"r must have shape .* not \(1, 0, 2, 4\)"),
        ({"k": torch.ones(1, 6, 2, 4)}, r"k must have shape \(1, 5, 2, 4\) as r has, not \(1, 6, 2, 4\)"),
        ({"u": torch.ones(8)}, r"u must have shape \(2, 4\) as r has, not \(8,\)"),
        ({"state": torch.ones(2, 2, 4, 4)}, r"state must have shape \(1, 2, 4, 4\) as r has, not \(2, 2, 4, 4\)"),
        ({"reset": torch.ones(1, 4).bool()}, r"reset must have shape \(1, 5\) as r has, not \(1, 4\)"),
        ({"reset": torch.ones(1, 5)}, r"reset must be torch.bool, not torch.float32"),
        ({"r": torch.ones(1, 5, 2, 4).half()}, r"r must be float32, bfloat16 or float64, not torch.float16"),
        ({"v": torch.ones(1, 5, 2, 4).double()}, r"v must be torch.float32 as r is, not torch.float64"),
        ({"log_w": torch.zeros(1, 5, 2, 4).bfloat16()}, r"log_w must be torch.float32 as r is.*not torch.bfloat16"),
        ({"u": torch.ones(2, 4).long()}, r"u must be floating-point, not torch.int64"),
        ({"r": torch.ones(1, 5, 4, 2).mT}, r"r must be contiguous, and has strides .*; call .contiguous\(\)"),
        ({"k": torch.ones(1, 5, 4, 2).mT}, r"k must be contiguous, and has strides .*; call .contiguous\(\)"),
        ({"state": torch.ones(1, 2, 4, 4).mT}, r"state must be contiguous, and has strides"),
        ({"v": torch.ones(1, 5, 2, 4, device="meta")}, r"v must be on cpu as r is, not on meta"),
        ({"op": "cuda"}, r"op='cuda' takes tensors on cuda, and r is on cpu"),
        ({"op": "fast"}, r"op must be one of auto, torch, cpu, cuda, fla, not 'fast'"),
    ],
)
def test_bad_input_is_refused_by_name(op, f, changes, message):
    if not changes.keys() <= {"r", "op", *(i.name for i in op.inputs)}:
        return  # an input of the other
    with pytest.raises(ValueError, match=f"{op.name}: {message}"):
        f(**{**make_inputs(op, 1, 5, 2, 4), **changes})


def test_a_device_without_a_kernel_is_told_of_op_torch(op, f):
    with pytest.raises(ValueError, match="no kernel for meta; use op='torch'"):
        f(**{name: x.to("meta") for name, x in make_inputs(op).items()})


# ---- a new recurrence: S_t = S_{t-1} diag(w_t) + r_t r_t^T;  y_t = S_t r_t, with a kernel in Python


def toy_reference(r, log_w, state=None):
    B, T, H, N = r.shape
    state, ys = r.new_zeros(B, H, N, N) if state is None else state, []
    for t in range(T):
        state = state * log_w[:, t].exp().unsqueeze(-2) + r[:, t].unsqueeze(-1) * r[:, t].unsqueeze(-2)
        ys.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, 1), state


def toy_forward(r, log_w, state, save):
    y, final = toy_reference(r, log_w, state)
    return y, final, torch.zeros_like(final) if save and state is None else state.clone() if save else r.new_empty(0)


def toy_backward(r, log_w, saved, gy, gfinal):
    states = [saved] + [toy_reference(r[:, : t + 1], log_w[:, : t + 1], saved)[1] for t in range(r.shape[1])]
    G, gr, glog_w = torch.zeros_like(saved) if gfinal is None else gfinal.clone(), torch.empty_like(r), torch.empty_like(r)
    for t in reversed(range(r.shape[1])):
        G += gy[:, t].unsqueeze(-1) * r[:, t].unsqueeze(-2)
        gr[:, t] = (states[t + 1].mT @ gy[:, t].unsqueeze(-1) + (G + G.mT) @ r[:, t].unsqueeze(-1)).squeeze(-1)
        G *= log_w[:, t].exp().unsqueeze(-2)
        glog_w[:, t] = (G * states[t]).sum(-2)
    return gr, glog_w, G


def test_a_new_recurrence_gets_checks_fake_kernels_and_autograd():
    def state_shape(r):
        B, _, H, N = r.shape
        return B, H, N, N

    kernel = SimpleNamespace(forward=toy_forward, backward=toy_backward, saved_shape=state_shape)
    toy = Recurrence("toy", (Input("log_w"), STATE), toy_reference, toy_reference, toy_reference, {"cpu": kernel})

    def f(r, log_w, state=None, op="auto"):
        return toy((r, log_w, state), op)

    inputs = make_inputs(toy, dtype=FP64)
    assert_close(gradients(f, inputs), gradients(toy_reference, inputs), 1e-14)
    assert_registered(toy, 5)
    with pytest.raises(ValueError, match=r"toy: log_w must have shape \(2, 20, 2, 8\) as r has, not \(3,\)"):
        f(inputs["r"], torch.ones(3))
    with pytest.raises(ValueError, match="toy: log_w must be a tensor, not None"):
        f(inputs["r"], None)
    compiled = torch.compile(lambda r, log_w: f(2 * r, log_w)[0].sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs["r"], inputs["log_w"]), f(2 * inputs["r"], inputs["log_w"])[0].sin())
