"""The layers: the paper's formula, sizes at every stride, generators, and errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import involution
from involution import Involution1d, Involution2d, Involution3d
from involution.nn import BottleneckGenerator, LinearGenerator
from involution.ops.backends import selection
from involution.ops.layouts import is_channels_last

LAYERS = {1: Involution1d, 2: Involution2d, 3: Involution3d}
ONES = {1: (9,), 2: (9, 10), 3: (5, 6, 7)}


def naive(layer: Involution2d, x: torch.Tensor) -> torch.Tensor:
    """The official layer's naive formula (unfold), for odd kernels and sizes divisible by the stride."""
    n, c, h, w = x.shape
    (k, _), (s, _), g = layer.kernel_size, layer.stride, layer.groups
    pooled = nn.functional.avg_pool2d(x, s, s) if s > 1 else x
    generator = layer.generator
    reduced = generator.reduce(pooled)
    if isinstance(generator.norm, nn.BatchNorm2d):
        reduced = generator.norm(reduced)
    else:  # the default: L2 norm over channels
        reduced = reduced / (reduced.square().sum(1, keepdim=True) + 1e-6 * reduced.shape[1]).sqrt()
    hidden = torch.relu(reduced)
    weights = generator.span(hidden)
    weights = weights.view(n, g, 1, k * k, h // s, w // s)
    windows = nn.functional.unfold(x, k, padding=(k - 1) // 2, stride=s).view(n, g, c // g, k * k, h // s, w // s)
    return (weights * windows).sum(3).reshape(n, c, h // s, w // s)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, None])
def test_equals_the_official_formula(stride: int, kernel_size: int, channels_last: bool, norm_layer) -> None:
    torch.manual_seed(0)
    layer = Involution2d(32, kernel_size, stride, norm_layer=norm_layer, kernel_init="paper").double()
    x = torch.randn(2, 32, 8, 12, dtype=torch.float64)
    if channels_last:
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    y = layer(x)
    torch.testing.assert_close(y, naive(layer, x))
    assert is_channels_last(y) == channels_last


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_size_is_ceil_of_size_over_stride(dims: int, stride: int, kernel_size: int, dilation: int) -> None:
    layer = LAYERS[dims](8, kernel_size, stride, dilation=dilation, group_channels=4)
    y = layer(torch.randn(2, 8, *ONES[dims]))
    assert y.shape == (2, 8, *(-(-size // stride) for size in ONES[dims]))
    assert layer.padding == (dilation * (kernel_size - 1) // 2,) * dims


@pytest.mark.parametrize(("size", "stride"), [(1, 2), (1, 3), (2, 3), (5, 2), (7, 3), (8, 3)])
def test_pooling_clips_windows_at_the_border(size: int, stride: int) -> None:
    generator = BottleneckGenerator(4, (3,), 2, (stride,))
    x = torch.randn(1, 4, size)
    pooled = generator.pool(x)
    for i in range(-(-size // stride)):
        torch.testing.assert_close(pooled[..., i], x[..., i * stride : (i + 1) * stride].mean(-1))


def test_the_default_generators_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in Involution2d(64).named_parameters()}
    assert shapes == {
        "generator.reduce.weight": (16, 64, 1, 1),
        "generator.span.weight": (4 * 49, 16, 1, 1),
        "generator.span.bias": (4 * 49,),
    }


def test_the_papers_generators_parameters() -> None:
    layer = Involution2d(64, norm_layer=nn.BatchNorm2d)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "generator.reduce.weight": (16, 64, 1, 1),
        "generator.norm.weight": (16,),
        "generator.norm.bias": (16,),
        "generator.span.weight": (4 * 49, 16, 1, 1),
        "generator.span.bias": (4 * 49,),
    }
    assert Involution2d(2, group_channels=1, reduction_ratio=4).generator.reduce.out_channels == 1


def test_norm_and_activation_can_be_chosen() -> None:
    layer = Involution2d(32, norm_layer=lambda width: nn.GroupNorm(2, width), act_layer=nn.GELU)
    assert isinstance(layer.generator.norm, nn.GroupNorm)
    assert isinstance(layer.generator.act, nn.GELU)
    assert layer(torch.randn(1, 32, 5, 5)).shape == (1, 32, 5, 5)


class Everywhere(nn.Module):
    """One learned kernel for all positions."""

    def __init__(self, channels, kernel_size, groups, stride, dilation) -> None:
        super().__init__()
        self.arguments = (channels, kernel_size, groups, stride, dilation)
        self.kernel = nn.Parameter(torch.randn(groups, *kernel_size))
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [-(-size // s) for size, s in zip(x.shape[2:], self.stride, strict=True)]
        return self.kernel[..., None, None].expand(len(x), *self.kernel.shape, *sizes)


def test_a_generator_can_be_a_class_a_callable_or_a_module() -> None:
    layer = Involution2d(8, 3, 2, dilation=2, group_channels=4, kernel_generator=Everywhere)
    assert layer.generator.arguments == (8, (3, 3), 2, (2, 2), (2, 2))
    x = torch.randn(2, 8, 9, 7)
    weight = layer.generator.kernel.repeat_interleave(4, 0).unsqueeze(1)
    expected = nn.functional.conv2d(x, weight, stride=2, padding=2, dilation=2, groups=8)
    torch.testing.assert_close(layer(x), expected)
    again = Involution2d(8, 3, 2, dilation=2, group_channels=4, kernel_generator=layer.generator)
    assert again.generator is layer.generator
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize(("dims", "stride"), [(1, 1), (2, 2), (3, 2)])
def test_the_linear_generator_is_one_product(dims: int, stride: int) -> None:
    layer = [Involution1d, Involution2d, Involution3d][dims - 1]
    made = layer(8, 3, stride, group_channels=4, kernel_generator=LinearGenerator).double()
    x = torch.randn(2, 8, *[5, 6, 7][:dims], dtype=torch.float64)
    pooled = made.generator.pool(x)
    span = made.generator.span
    product = torch.einsum("oc,nc...->no...", span.weight.flatten(1), pooled)
    product = product + span.bias.view(-1, *[1] * dims)
    kernel_map = product.view(2, 2, *[3] * dims, *[-(-size // stride) for size in x.shape[2:]])
    torch.testing.assert_close(made.generator(x), kernel_map)
    assert made(x).shape[2:] == pooled.shape[2:]


def test_a_generator_with_another_size_is_an_error_that_names_both() -> None:
    layer = Involution2d(8, 3, group_channels=4, kernel_generator=Everywhere)
    layer.generator.stride = (2, 2)
    with pytest.raises(ValueError, match=r"\[6, 6\], got \[3, 3\]"):
        layer(torch.randn(1, 8, 6, 6))


class Fixed(nn.Module):
    """Returns the same tensor for every input."""

    def __init__(self, kernel_map: torch.Tensor) -> None:
        super().__init__()
        self.kernel_map = kernel_map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel_map


@pytest.mark.parametrize("shape", [(1, 1, 3, 3, 6, 6), (1, 2, 5, 5, 6, 6), (1, 18, 6, 6), (3, 2, 3, 3, 6, 6)])
def test_a_generator_with_other_groups_or_kernels_is_an_error(shape: tuple[int, ...]) -> None:
    layer = Involution2d(8, 3, group_channels=4, kernel_generator=Fixed(torch.randn(shape)))
    with pytest.raises(ValueError, match=r"\[N, G, \*K\] = \[1, 2, 3, 3\] and 2 output sizes, got"):
        layer(torch.randn(1, 8, 6, 6))


def test_a_generator_that_is_not_a_module_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"kernel_generator must be an nn.Module or make one, got 'linear'"):
        Involution2d(8, group_channels=4, kernel_generator="linear")
    with pytest.raises(TypeError, match=r"kernel_generator must make an nn.Module, got int"):
        Involution2d(8, group_channels=4, kernel_generator=lambda *arguments: 3)


def test_unbatched_input() -> None:
    layer = Involution2d(32, kernel_init="paper").eval()
    x = torch.randn(32, 6, 7)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_device_and_dtype() -> None:
    layer = Involution2d(32, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_copies_pickles_and_prints() -> None:
    layer = Involution2d(32, dilation=2, kernel_init="paper").eval()
    x = torch.randn(1, 32, 6, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
    assert "32, kernel_size=(7, 7), stride=(1, 1), dilation=(2, 2), group_channels=16" in repr(layer)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compile_export_autocast_and_training_agree_with_eager(dims: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[dims](32, 3, 2, kernel_init="paper").eval()
    x = torch.randn(2, 32, *ONES[dims])
    expected = layer(x).detach()
    with torch.no_grad():  # with gradients Inductor would compile a backward that nothing here runs
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize(("stride", "sizes"), [(1, (8, 12, 17, 20, 31)), (2, (8, 12, 18, 20, 32))])
def test_five_image_sizes_make_at_most_two_graphs(stride: int, sizes: tuple[int, ...]) -> None:
    """Two exceptions are torch's: with gradients, convolutions specialise to every size on CPU, and average pooling
    specialises to even sizes (odd ones need a third graph)."""
    layer = Involution2d(32, 3, stride, kernel_init="paper").eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(2, 32, size, size + 2)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 24}, "group_channels must divide channels, got group_channels=16, channels=24"),
        ({"channels": 0}, "channels must be a positive int, got 0"),
        ({"channels": 32, "group_channels": -1}, "group_channels must be a positive int"),
        ({"channels": 32, "reduction_ratio": 0}, "reduction_ratio must be a positive int"),
        ({"channels": 32, "kernel_size": 0}, "kernel_size must be"),
        ({"channels": 32, "kernel_size": (3, 3, 3)}, "kernel_size must be an int or 2 ints"),
        ({"channels": 32, "stride": 0}, "stride must be"),
        ({"channels": 32, "dilation": 0.5}, "dilation must be"),
        ({"channels": 32, "padding": 2}, r"padding must be None or \(3, 3\)"),
        ({"channels": 32, "padding": -3}, "padding must be"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Involution2d(**arguments)


def test_the_right_padding_is_accepted() -> None:
    assert Involution2d(32, 7, padding=3).padding == Involution2d(32, 7, padding=(3, 3)).padding == (3, 3)


def test_bad_input() -> None:
    layer = Involution2d(32)
    with pytest.raises(ValueError, match=r"input must be \[N, 32, H, W\] or \[32, H, W\], got \[1, 16, 8, 8\]"):
        layer(torch.randn(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"got \[32, 8\]"):
        layer(torch.randn(32, 8))
    assert involution.Involution2d is Involution2d


def both(dims: int = 2, stride: int = 1, **options) -> tuple[nn.Module, nn.Module]:
    """The plain layer, and the memory-efficient one with the same weights; in float64."""
    torch.manual_seed(0)
    options = {"kernel_init": "paper", **options}
    plain = LAYERS[dims](32, 3, stride, **options).double()
    efficient = LAYERS[dims](32, 3, stride, memory_efficient=True, **options).double()
    efficient.load_state_dict(plain.state_dict())
    return plain, efficient


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_memory_efficient_layers_agree_with_plain_ones(dims: int, stride: int, training: bool) -> None:
    layers = both(dims, stride)
    x, results = torch.randn(2, 32, *ONES[dims], dtype=torch.float64), []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer.train(training)(leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *layer.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    for got, want in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        torch.testing.assert_close(got, want)


def largest_saved(layer: nn.Module, x: torch.Tensor) -> int:
    """The elements of the largest tensor that is saved for backward."""
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum().backward()
    return max(sizes)


@pytest.mark.parametrize("stride", [1, 2])
def test_memory_efficient_layers_save_no_kernel_map(stride: int) -> None:
    plain, efficient = both(stride=stride)
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    kernel_map = 2 * 2 * 9 * (8 // stride) ** 2
    if stride == 1:  # where the map is larger than the input
        plain, efficient = (
            LAYERS[2](32, 7, memory_efficient=choice, kernel_init="paper").double() for choice in (False, True)
        )
        kernel_map = 2 * 2 * 49 * 64
    assert largest_saved(plain, x) >= kernel_map
    assert largest_saved(efficient, x) == x.numel()


def test_memory_efficient_wants_the_default_generator() -> None:
    with pytest.raises(ValueError, match="memory_efficient=True wants the default kernel generator"):
        Involution2d(8, 3, group_channels=4, kernel_generator=Everywhere, memory_efficient=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_efficient_under_autocast_and_compile(channels_last: bool) -> None:
    torch.manual_seed(0)
    plain, efficient = (layer.float() for layer in both(stride=2))
    x = torch.randn(2, 32, 9, 10)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    results = []
    torch._dynamo.reset()
    for layer in (plain, efficient, torch.compile(efficient, fullgraph=True, backend="aot_eager")):
        y = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        assert is_channels_last(y) == channels_last
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        y = efficient(x)
    assert y.dtype == torch.bfloat16
    half = torch.autograd.grad(y.float().square().sum(), list(efficient.parameters()))
    for got, want in zip([y.detach().float(), *half], results[0], strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.05 * want.norm()


@pytest.fixture
def no_kernel_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layer generates one."""

    def refuse(*arguments):
        raise AssertionError("a kernel map was made")

    monkeypatch.setattr("involution.nn.involution.involve", refuse)


@pytest.mark.usefixtures("no_kernel_map")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_stores_no_kernel_map(dims: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS[dims](32, 3, 2).to(dtype), torch.randn(2, 32, *ONES[dims], dtype=dtype)
    with torch.no_grad():
        assert layer(x).shape == (2, 32, *(-(-size // 2) for size in ONES[dims]))
        assert layer(x[0]).shape == layer(x)[0].shape
    with torch.inference_mode():
        layer(x)
    with pytest.raises(AssertionError, match="a kernel map was made"):
        layer(x)
    monkeypatch.setattr(selection, "forced", "reference")  # which has no fused kernel
    with torch.no_grad(), pytest.raises(AssertionError, match="a kernel map was made"):
        layer(x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_inference_agrees_with_training(stride: int, channels_last: bool) -> None:
    layer = both(stride=stride)[0].eval()
    x = torch.randn(2, 32, 9, 10, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    want = layer(x)
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    assert got.stride() == want.stride()


HOOKS = {
    "generator's forward": lambda layer, hook: layer.generator.register_forward_hook(hook),
    "generator's forward pre": lambda layer, hook: layer.generator.register_forward_pre_hook(hook),
    "span's forward": lambda layer, hook: layer.generator.span.register_forward_hook(hook),
    "span's forward pre": lambda layer, hook: layer.generator.span.register_forward_pre_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("efficient", [False, True])
def test_hooks_of_the_generator_are_called(no_kernel_map, register, efficient: bool) -> None:
    layer, x = both()[efficient], torch.randn(1, 32, 5, 6, dtype=torch.float64)
    fired = []
    with torch.no_grad():
        layer(x)
        handle = register(layer, lambda *arguments: fired.append(arguments[0]))
        with pytest.raises(AssertionError, match="a kernel map was made"):
            layer(x)
        assert len(fired) == 1
        handle.remove()
        layer(x)


@pytest.mark.parametrize("part", ["generator", "generator.span"])
def test_backward_hooks_of_the_generator_are_called(part: str) -> None:
    layer = both()[1]
    fired = []
    layer.get_submodule(part).register_full_backward_hook(lambda *arguments: fired.append(arguments[0]))
    layer(torch.randn(1, 32, 5, 6, dtype=torch.float64)).sum().backward()
    assert len(fired) == 1


class Doubled(BottleneckGenerator):
    """The default generator with another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_generator_with_another_forward_is_not_fused() -> None:
    layer, _ = both()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    doubled = Doubled(32, (3, 3), 2, (1, 1)).double().eval()
    doubled.load_state_dict(layer.generator.state_dict())
    with torch.no_grad():
        want = 2 * layer.eval()(x)
        layer.generator = doubled
        torch.testing.assert_close(layer(x), want)


SPANS = {
    "another matrix": lambda: nn.Conv2d(8, 18, 1, bias=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 18, 1)),
    "3x3": lambda: nn.Conv2d(8, 18, 3, padding=1),
    "groups": lambda: nn.Conv2d(8, 18, 1, groups=2),
}


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("training", [False, True])
def test_another_span_is_not_fused(span, training: bool) -> None:
    layer = both()[1].eval()
    layer.generator.span = span().double()
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        want = involution.involution2d(x, layer.generator(x), padding=1)
        torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("gradient", [False, True])
def test_an_image_smaller_than_the_stride(dims: int, gradient: bool) -> None:
    layer, x = LAYERS[dims](16, 3, 2, kernel_init="paper").eval(), torch.randn(2, 16, *[1] * dims)
    with torch.set_grad_enabled(gradient):
        assert layer(x).shape == x.shape
