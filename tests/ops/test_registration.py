"""The registered operators: derivatives of any order, torch.func transforms, fakes, compile, export, FLOP counts."""

import subprocess
import sys

import pytest
import torch
from harness import BACKENDS, INTERPRETED, backend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import involution
from involution import involution1d, involution2d, involution3d
from involution.ops.layouts import is_channels_last

GEOMETRY = {  # operator, input, kernel map, window
    "1d": (involution1d, (2, 4, 7), (2, 2, 3, 4), (2, 1, 1)),
    "2d": (involution2d, (2, 4, 4, 5), (2, 2, 3, 2, 4, 2), (1, (1, 0), (1, 3))),
    "2d, stride": (involution2d, (1, 4, 5, 5), (1, 2, 3, 3, 3, 3), (2, 1)),
    "3d": (involution3d, (1, 2, 2, 3, 3), (1, 1, 2, 3, 2, 2, 3, 4), (1, (1, 1, 1), (2, 1, 1))),
}


def tensors(case: str, channels_last: bool = False, dtype: torch.dtype = torch.float64):
    operator, x_shape, k_shape, window = GEOMETRY[case]
    torch.manual_seed(0)
    x, k = torch.randn(x_shape, dtype=dtype), torch.randn(k_shape, dtype=dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        dims = x.dim() - 2
        k = k.flatten(1, 1 + dims).movedim(1, -1).contiguous().movedim(-1, 1).unflatten(1, k_shape[1 : 2 + dims])
    return (lambda x, k: operator(x, k, *window)), x, k


every_case = pytest.mark.parametrize("case", GEOMETRY)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
every_backend = pytest.mark.parametrize("name", BACKENDS)


@every_case
@both_layouts
@every_backend
def test_gradcheck_and_gradgradcheck(case: str, channels_last: bool, name: str) -> None:
    f, x, k = tensors(case, channels_last)
    x.requires_grad_()
    k.requires_grad_()
    with backend(name):
        assert torch.autograd.gradcheck(
            f, (x, k), check_forward_ad=True, check_batched_grad=True, fast_mode=INTERPRETED
        )
        assert torch.autograd.gradgradcheck(f, (x, k), check_fwd_over_rev=True, fast_mode=INTERPRETED)


@every_case
@both_layouts
@every_backend
def test_opcheck(case: str, channels_last: bool, name: str) -> None:
    """All three operators, on contiguous tensors and on dense ones with axes permuted in memory."""
    window = GEOMETRY[case][3]
    f, x, k = tensors(case, channels_last)
    dims = x.dim() - 2
    per_axis = [list(v) if isinstance(v, tuple) else [v] * dims for v in (*window, 1)][:3]
    y = f(x, k)
    g = torch.empty_like(y).normal_()
    ops = torch.ops.involution
    calls = [
        (ops.apply, x, k, y.shape),
        (ops.adjoint, g, k, x.shape),
        (ops.correlate, g, x, k.shape),
    ]
    with backend(name):
        for op, a, b, size in calls:
            for first in (a, permuted(a)):
                for second in (b, permuted(b)):
                    leaves = (first.detach().requires_grad_(), second.detach().requires_grad_())
                    torch.library.opcheck(op, (*leaves, list(size), *per_axis))


def permuted(t: torch.Tensor) -> torch.Tensor:
    """The same values, dense, with the axes in another order in memory."""
    order = [*range(1, t.dim()), 0]
    inverse = [order.index(axis) for axis in range(t.dim())]
    return t.permute(order).contiguous().permute(inverse)


@every_case
@every_backend
def test_functorch_transforms(case: str, name: str) -> None:
    f, x, k = tensors(case)
    dx, dk = torch.randn_like(x), torch.randn_like(k)

    def loss(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return f(x, k).sin().sum()

    x2, k2 = x.clone().requires_grad_(), k.clone().requires_grad_()
    gx, gk = torch.autograd.grad(loss(x2, k2), (x2, k2), create_graph=True)
    with backend(name):
        for got, want in zip(grad(loss, (0, 1))(x, k), (gx, gk), strict=True):
            torch.testing.assert_close(got, want.detach())
        y, tangent = jvp(f, (x, k), (dx, dk))
        torch.testing.assert_close(tangent, f(dx, k) + f(x, dk))
        torch.testing.assert_close(jvp(lambda x: f(x, k), (x,), (dx,))[1], f(dx, k))
        torch.testing.assert_close(vjp(f, x, k)[1](y.cos())[0], grad(lambda x: f(x, k).sin().sum())(x))
        # Hessian-vector products in four ways.
        (want,) = torch.autograd.grad((gx * dx).sum(), x2, retain_graph=True)
        torch.testing.assert_close(jvp(lambda x: grad(loss)(x, k), (x,), (dx,))[1], want)
        torch.testing.assert_close(grad(lambda x: (grad(loss)(x, k) * dx).sum())(x), want)
        torch.testing.assert_close(grad(lambda x: jvp(lambda x: loss(x, k), (x,), (dx,))[1])(x), want)
        full = hessian(loss)(x, k).reshape(x.numel(), x.numel())
        torch.testing.assert_close((full @ dx.flatten()).view_as(x), want)
        torch.testing.assert_close(jacrev(f, 1)(x, k), jacfwd(f, 1)(x, k))


@every_case
@every_backend
def test_vmap(case: str, name: str) -> None:
    f, x, k = tensors(case)
    xs, ks = torch.stack([x, 2 * x, x - 1]), torch.stack([k, k + 1, 3 * k], dim=2)
    with backend(name):
        torch.testing.assert_close(vmap(f, (0, 2))(xs, ks), torch.stack([f(xs[i], ks[:, :, i]) for i in range(3)]))
        torch.testing.assert_close(vmap(f, (0, None))(xs, k), torch.stack([f(xs[i], k) for i in range(3)]))
        torch.testing.assert_close(vmap(f, (None, 2), 1)(x, ks), torch.stack([f(x, ks[:, :, i]) for i in range(3)], 1))

        def loss(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return f(x, k).sin().sum()

        each = [grad(loss, (0, 1))(xs[i], ks[:, :, i]) for i in range(3)]
        for got, want in zip(vmap(grad(loss, (0, 1)), (0, 2))(xs, ks), zip(*each, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))
        summed = grad(lambda xs: vmap(loss, (0, 2))(xs, ks).sum())(xs)
        torch.testing.assert_close(summed, torch.stack([e[0] for e in each]))


def test_vmap_of_the_registered_operator() -> None:
    f, x, k = tensors("2d, stride")
    xs = torch.stack([x, 2 * x])
    got = vmap(lambda x: torch.ops.involution.apply(x, k, [1, 4, 3, 3], [2, 2], [1, 1], [1, 1]))(xs)
    torch.testing.assert_close(got, torch.stack([f(x, k), f(2 * x, k)]))


@every_backend
def test_forward_mode_without_functorch(name: str) -> None:
    f, x, k = tensors("2d")
    dx = torch.randn_like(x)
    with backend(name), forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, dx), k)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, f(dx, k))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_fullgraph_forward_and_backward(channels_last: bool) -> None:
    f, x, k = tensors("2d, stride", channels_last, torch.float32)
    x.requires_grad_()
    k.requires_grad_()
    expected = f(x, k)
    want = torch.autograd.grad(expected.square().sum(), (x, k))
    y = torch.compile(f, fullgraph=True)(x, k)
    assert is_channels_last(y) == channels_last
    torch.testing.assert_close(y, expected)
    for got, w in zip(torch.autograd.grad(y.square().sum(), (x, k)), want, strict=True):
        torch.testing.assert_close(got, w)


def test_compile_under_autocast() -> None:
    f, x, k = tensors("2d", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(f, fullgraph=True)(x, k)
        torch.testing.assert_close(y, f(x, k))
    assert y.dtype == torch.bfloat16


def test_compiled_jvp_is_correct_or_an_error() -> None:
    f, x, k = tensors("2d")
    dx = torch.randn_like(x)
    try:
        tangent = torch.compile(lambda x, dx: jvp(lambda x: f(x, k), (x,), (dx,))[1])(x, dx)
    except RuntimeError:
        return
    torch.testing.assert_close(tangent, f(dx, k))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_five_image_sizes_make_at_most_two_graphs(gradient: bool, channels_last: bool) -> None:
    graphs = 0

    def count(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, k: involution2d(x, k, 2, 1), fullgraph=True, backend=count)
    for size in (8, 12, 17, 20, 31):
        x, out = torch.randn(2, 4, size, size + 1), ((size + 1) // 2, (size + 2) // 2)
        k = torch.randn(2, 2, 3, 3, *out)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_(gradient)
        torch.testing.assert_close(compiled(x, k), involution2d(x, k, 2, 1))
    assert graphs <= 2


def test_export_with_dynamic_shapes() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return involution2d(x, k, padding="same")

    x, k = torch.randn(2, 4, 8, 9), torch.randn(2, 2, 3, 3, 8, 9)
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    shapes = {"x": {0: batch, 2: height, 3: width}, "k": {0: batch, 4: height, 5: width}}
    program = torch.export.export(Model(), (x, k), dynamic_shapes=shapes)
    other = torch.randn(3, 4, 11, 6), torch.randn(3, 2, 3, 3, 11, 6)
    torch.testing.assert_close(program.module()(*other), involution2d(*other, padding="same"))


@every_case
def test_flop_formula(case: str) -> None:
    f, x, k = tensors(case)
    x.requires_grad_()
    k.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = f(x, k)
    taps = k[0, 0].numel() // y[0, 0].numel()
    assert counter.get_total_flops() == 2 * taps * y.numel()
    with FlopCounterMode(display=False) as counter:
        f(x, k).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * taps * y.numel()


def test_an_exported_program_loads_where_the_operators_are_registered(tmp_path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return involution2d(x, k, padding=1)

    x, k = torch.randn(1, 4, 5, 5), torch.randn(1, 2, 3, 3, 5, 5)
    torch.export.save(torch.export.export(Model(), (x, k)), tmp_path / "model.pt2")
    torch.save((x, k, involution2d(x, k, padding=1)), tmp_path / "tensors.pt")
    code = (
        "import torch, involution.ops; x, k, y = torch.load('tensors.pt'); "
        "torch.testing.assert_close(torch.export.load('model.pt2').module()(x, k), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_meta_tensors_have_shapes_and_no_values() -> None:
    f, x, k = tensors("2d, stride")
    assert f(x.to("meta"), k.to("meta")).shape == f(x, k).shape


@both_layouts
def test_results_repeat_bitwise_and_do_not_depend_on_the_thread_count(channels_last: bool) -> None:
    torch.manual_seed(0)
    x, k = torch.randn(4, 32, 28, 28), torch.randn(4, 2, 7, 7, 28, 28)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    k.requires_grad_()

    def results() -> list[torch.Tensor]:
        y = involution2d(x, k, padding=3)
        return [y, *torch.autograd.grad(y, (x, k), y.detach())]

    before, first = torch.get_num_threads(), results()
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_import_loads_no_heavy_packages() -> None:
    """Besides torch: no package of an extra, and no compiler stack."""
    code = (
        "import sys, torch; before = set(sys.modules); import involution; involution.involution2d; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new & {'timm', 'lightning', 'torchvision', 'matplotlib', 'sklearn', 'rich', 'sympy', 'scipy'}; "
        "assert not heavy, heavy; assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import sys, involution; assert 'torch' not in sys.modules"], check=True)


def test_functional_call_over_a_layer() -> None:
    layer = involution.Involution2d(16, 3, group_channels=8).double().eval()
    parameters = dict(layer.named_parameters())
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    gradients = grad(loss)(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
