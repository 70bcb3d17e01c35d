"""The fused layer and bottleneck: against a float64 composition of their steps, and under torch's transforms."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import BACKENDS, INSTRUCTION_SETS, INTERPRETED, backend, examples, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from involution import involution2d
from involution.ops.backends.selection import fuses
from involution.ops.fused import fused_layer
from involution.ops.layouts import is_channels_last

every_backend = pytest.mark.parametrize("name", BACKENDS)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
# Tolerance per element in machine epsilons, times the same sums over absolute values.
ROUNDINGS = 8


def channels_at_end(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("nc...,mc->nm...", x, weight)
    return y if bias is None else y + per_channel(bias, y)


def composed(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale, shift, kernel, stride, dilation):
    """The fused layer before its ReLU: span convolution, zero padding, and unfolded windows."""
    dims, groups = len(kernel), len(weight) // math.prod(kernel)
    o, k = "abc"[:dims], "ijk"[:dims]
    kernels = pointwise(hidden, weight, bias).unflatten(1, (groups, *kernel))
    sides: list[int] = []
    for size, taps, step, spread in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        reach, left = spread * (taps - 1), spread * (taps - 1) // 2
        sides = [left, max(0, (-(-size // step) - 1) * step + reach + 1 - left - size), *sides]
    windows = F.pad(x, sides)
    for axis, (size, taps, step, spread) in enumerate(zip(x.shape[2:], kernel, stride, dilation, strict=True)):
        windows = windows.unfold(2 + axis, spread * (taps - 1) + 1, step)[..., ::spread]
        windows = windows.narrow(2 + axis, 0, -(-size // step))
    y = torch.einsum(f"ngw{o}{k},ng{k}{o}->ngw{o}", windows.unflatten(1, (groups, -1)), kernels).flatten(1, 2)
    return y if scale is None else y * per_channel(scale, y) + per_channel(shift, y)


class Layer(NamedTuple):
    """A random fused layer."""

    batch: int
    groups: int
    width: int
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    hidden: int
    bias: bool
    scaled: bool
    relu: bool
    dtype: torch.dtype
    layout: str  # "contiguous", "channels_last", or "mixed": the input channels_last and the hidden features not
    instruction_set: str
    threads: int

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(-(-size // step) for size, step in zip(self.input, self.stride, strict=True))

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.kernel), list(self.stride), list(self.dilation)

    def tensors(self, seed: int) -> tuple[list[Tensor | None], Tensor]:
        """input, hidden, span weight and bias, scale and shift; and the output's gradient."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        maps = self.groups * math.prod(self.kernel)
        x, h = normal(self.batch, self.channels, *self.input), normal(self.batch, self.hidden, *self.output)
        g = normal(self.batch, self.channels, *self.output)
        if self.layout != "contiguous":
            x = channels_at_end(x)
        if self.layout == "channels_last":
            h, g = channels_at_end(h), channels_at_end(g)
        bias = normal(maps) if self.bias else None
        scale, shift = (normal(self.channels), normal(self.channels)) if self.scaled else (None, None)
        return [x, h, normal(maps, self.hidden), bias, scale, shift], g


@st.composite
def layers(draw: st.DrawFn, dims: int) -> Layer:
    """Any geometry whose windows the composition can unfold, including rows that the kernels split."""
    last = draw(st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(21, 130)))
    limit = {1: 1, 2: 20 if last <= 20 else 4, 3: 5 if last <= 20 else 2}[dims]
    slow = 3 if dims == 3 else 7
    kernel = (*(draw(st.integers(1, slow)) for _ in range(dims - 1)), draw(st.integers(1, 7)))
    layer = Layer(
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 4)),
        width=draw(st.one_of(st.just(16), st.integers(1, 20))),
        input=(*(draw(st.integers(1, limit)) for _ in range(dims - 1)), last),
        kernel=kernel,
        stride=tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims)),
        dilation=tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(dims)),
        hidden=draw(st.integers(1, 40)),
        bias=draw(st.booleans()),
        scaled=draw(st.booleans()),
        relu=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "channels_last", "mixed"])),
        instruction_set=draw(st.sampled_from(INSTRUCTION_SETS)),
        threads=draw(st.integers(1, 2)),
    )
    if layer.batch * layer.channels * math.prod(layer.output) * math.prod(kernel) > 300_000:
        layer = layer._replace(batch=1, groups=min(2, layer.groups), input=(*layer.input[:-1], min(last, 70)))
    return layer


def exactly(tensors: list[Tensor | None], absolute: bool = False) -> list[Tensor | None]:
    """The same values in float64, or their absolute values."""
    wide = [None if t is None else t.detach().double() for t in tensors]
    return [None if t is None else t.abs() for t in wide] if absolute else wide


def forward_and_gradients(f: Any, tensors: list[Tensor | None], gradient: Any) -> list[Tensor]:
    """f's output and its gradients with respect to the tensors; `gradient` is called with the output."""
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    rest = iter(leaves)
    y = f(*(None if t is None else next(rest) for t in tensors))
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient(y.detach()))]


def assert_within_rounding(got: list[Tensor], want: list[Tensor], bound: list[Tensor], dtype: torch.dtype) -> None:
    assert len(got) == len(want) == len(bound)
    for index, (a, b, size) in enumerate(zip(got, want, bound, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == dtype
        excess = (a.double() - b).abs() / (size + torch.finfo(dtype).tiny)
        assert excess.max() <= ROUNDINGS * torch.finfo(dtype).eps, (index, float(excess.max()))


def assert_layer_agrees(layer: Layer, seed: int) -> None:
    tensors, g = layer.tensors(seed)
    plain = lambda *t: composed(*t, *layer.window)  # noqa: E731
    before = plain(*exactly(tensors))
    bound = forward_and_gradients(plain, exactly(tensors, absolute=True), lambda _: g.double().abs())
    if layer.relu:  # rounding may decide the sign of y near 0: no gradient there
        g = g * (before.abs() > 1e-4 * bound[0])
    want = forward_and_gradients(
        lambda *t: plain(*t).relu() if layer.relu else plain(*t), exactly(tensors), lambda _: g.double()
    )
    for name in BACKENDS:
        with backend(name, layer.instruction_set if name == "cpu" else None), threads(layer.threads):
            got = forward_and_gradients(
                lambda *t: torch.ops.involution.fused_layer(*t, layer.relu, *layer.window), tensors, lambda _: g
            )
        assert_within_rounding(got, want, bound, layer.dtype)
        assert (got[0].movedim(1, -1) if is_channels_last(tensors[0]) else got[0]).is_contiguous()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_random_layers(dims: int) -> None:
    """300 per dimension, on every backend: the output and the gradient of every tensor."""

    @settings(max_examples=examples(300))
    @given(layer=layers(dims), seed=st.integers(0, 2**16))
    def check(layer: Layer, seed: int) -> None:
        assert_layer_agrees(layer, seed)

    check()


@every_backend
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    layer = Layer(
        2, 2, 16, (9, 10), (3, 3), (2, 1), (1, 1), 8, True, True, True,
        dtype, "channels_last" if channels_last else "contiguous", INSTRUCTION_SETS[0], 1,
    )  # fmt: skip
    tensors, _ = layer.tensors(0)
    with backend(name):
        y = fused_layer(*tensors[:4], *layer.window, *tensors[4:], relu=True)
    want = composed(*exactly(tensors), *layer.window).relu()
    bound = composed(*exactly(tensors, absolute=True), *layer.window)
    assert y.dtype == dtype
    assert ((y.double() - want).abs() <= 3 * torch.finfo(dtype).eps * bound).all()


class Block(NamedTuple):
    """A random fused bottleneck: a layer and its optional parts."""

    layer: Layer
    packed: bool
    reduce_bias: bool
    rms_eps: float
    expand: int  # channels, or 0 for none
    expand_bias: bool
    shortcut: bool
    expand_relu: bool
    next_reduce: int  # channels, or 0 for none
    next_reduce_bias: bool

    def tensors(self, seed: int) -> dict[str, Any]:
        """The arguments of torch.ops.involution.fused_bottleneck by name, without the window; weights not packed."""
        (x, _, span, bias, scale, shift), _ = self.layer.tensors(seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.layer.dtype)

        given = {
            "input": x,
            "reduce_weight": normal(self.layer.hidden, self.layer.channels),
            "reduce_bias": normal(self.layer.hidden) if self.reduce_bias else None,
            "rms_eps": self.rms_eps,
            "span_weight": span,
            "span_bias": bias,
            "scale": scale,
            "shift": shift,
            "relu": self.layer.relu,
            **dict.fromkeys(("expand_weight", "expand_bias", "shortcut")),
            "expand_relu": self.expand_relu,
            **dict.fromkeys(("next_reduce_weight", "next_reduce_bias")),
        }
        if self.expand:
            given["expand_weight"] = normal(self.expand, self.layer.channels)
            given["expand_bias"] = normal(self.expand) if self.expand_bias else None
            shortcut = normal(self.layer.batch, self.expand, *self.layer.output)
            shortcut = channels_at_end(shortcut) if self.layer.layout == "channels_last" else shortcut
            given["shortcut"] = shortcut if self.shortcut else None
        if self.next_reduce:
            given["next_reduce_weight"] = normal(self.next_reduce, self.expand)
            given["next_reduce_bias"] = normal(self.next_reduce) if self.next_reduce_bias else None
        return given

    def run(self, given: dict[str, Any]) -> list[Tensor]:
        weights = {name for name in given if name.endswith("weight") and given[name] is not None and self.packed}
        packed = [panels(value) if name in weights else value for name, value in given.items()]
        return torch.ops.involution.fused_bottleneck(*packed, *self.layer.window)


def panels(weight: Tensor) -> Tensor:
    """[out, in] as panels of 32 outputs, padded with NaN, which must have no effect."""
    rows = -(-len(weight) // 32) * 32
    return F.pad(weight, (0, 0, 0, rows - len(weight)), value=math.nan).view(-1, 32, weight.shape[1]).mT.contiguous()


def averaged(x: Tensor, stride: list[int]) -> Tensor:
    """The means of windows of the stride's size, clipped at the border."""
    sides = [side for size, step in zip(x.shape[:1:-1], stride[::-1], strict=True) for side in (0, -size % step)]
    sums, members = F.pad(x, sides), F.pad(torch.ones_like(x), sides)
    for axis, step in enumerate(stride):
        sums, members = (t.unfold(2 + axis, step, step).sum(-1) for t in (sums, members))
    return sums / members


def reduced_features(block: Block, given: dict[str, Any]) -> Tensor:
    """The reduced features, before their RMS norm."""
    pooled = averaged(given["input"], block.layer.window[1])
    return pointwise(pooled, given["reduce_weight"], given["reduce_bias"])


def composed_block(block: Block, given: dict[str, Any], values: dict[str, Any] | None = None) -> list[Tensor]:
    """The bottleneck step by step; of absolute values, the magnitudes of the rounded sums.

    These are divided by the RMS of the signed features of `values`, which may be much smaller.
    """
    x, window = given["input"], block.layer.window
    hidden = reduced_features(block, given)
    if given["rms_eps"]:
        features = hidden if values is None else reduced_features(block, values)
        hidden = hidden / (features.square().mean(1, keepdim=True) + given["rms_eps"]).sqrt()
    hidden = hidden.relu()
    y = composed(x, hidden, given["span_weight"], given["span_bias"], given["scale"], given["shift"], *window)
    y = y.relu() if given["relu"] else y
    if given["expand_weight"] is None:
        return [y]
    y = pointwise(y, given["expand_weight"], given["expand_bias"])
    y = y if given["shortcut"] is None else y + given["shortcut"]
    y = y.relu() if given["expand_relu"] else y
    if given["next_reduce_weight"] is None:
        return [y]
    return [y, pointwise(y, given["next_reduce_weight"], given["next_reduce_bias"]).relu()]


def named(given: dict[str, Any], absolute: bool = False) -> dict[str, Any]:
    return {
        name: exactly([value], absolute)[0] if isinstance(value, Tensor) else value for name, value in given.items()
    }


@st.composite
def blocks(draw: st.DrawFn, dims: int) -> Block:
    layer = draw(layers(dims))
    packed = draw(st.booleans())
    next_reduce = draw(st.sampled_from([0, 1, 7, 32, 45]))
    return Block(
        layer=layer._replace(bias=packed or layer.bias),
        packed=packed,
        reduce_bias=packed or draw(st.booleans()),
        rms_eps=draw(st.sampled_from([0.0, 1e-6, 0.1])),
        expand=draw(st.sampled_from([5, 16, 33, 64] if next_reduce else [0, 0, 1, 32, 40])),
        expand_bias=packed or draw(st.booleans()),
        shortcut=draw(st.booleans()),
        expand_relu=draw(st.booleans()),
        next_reduce=next_reduce,
        next_reduce_bias=packed or draw(st.booleans()),
    )


def assert_block_agrees(block: Block, seed: int, sets: tuple[str, ...] = ()) -> None:
    given = block.tensors(seed)
    values = named(given)
    want, bound = composed_block(block, values), composed_block(block, named(given, absolute=True), values)
    runs = [
        (name, isa) for name in BACKENDS for isa in (sets or [block.layer.instruction_set] if name == "cpu" else [None])
    ]
    for name, isa in runs:
        with backend(name, isa), threads(block.layer.threads):
            got = block.run(given)
        assert_within_rounding(got, want, bound, block.layer.dtype)
        for y in got:
            assert (y.movedim(1, -1) if is_channels_last(given["input"]) else y).is_contiguous()


@pytest.mark.parametrize(("dims", "count"), [(1, 40), (2, 200), (3, 40)])
def test_random_bottlenecks(dims: int, count: int) -> None:
    @settings(max_examples=examples(count))
    @given(block=blocks(dims), seed=st.integers(0, 2**16))
    def check(block: Block, seed: int) -> None:
        assert_block_agrees(block, seed)

    check()


@every_backend
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_image_smaller_than_the_stride(name: str, dims: int) -> None:
    layer = Layer(
        2, 1, 4, (1,) * dims, (3,) * dims, (2,) * dims, (1,) * dims, 3, True, False, False,
        torch.float64, "contiguous", INSTRUCTION_SETS[0], 1,
    )  # fmt: skip
    block = Block(layer, False, True, 1e-6, 0, False, False, False, 0, False)
    given = block.tensors(0)
    with backend(name):
        torch.testing.assert_close(block.run(given), composed_block(block, given))


@pytest.mark.parametrize("next_reduce", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_larger_than_the_cache(next_reduce: int, dtype: torch.dtype) -> None:
    """4 << 20 elements: from this size on, the kernels use non-temporal stores."""
    layer = Layer(
        4, 1, 16, (64, 64), (3, 3), (1, 1), (1, 1), 4, True, True, True,
        dtype, "channels_last", INSTRUCTION_SETS[0], 2,
    )  # fmt: skip
    block = Block(layer, True, True, 1e-6, 256, True, True, True, next_reduce, True)
    assert layer.batch * block.expand * math.prod(layer.output) >= 4 << 20
    assert_block_agrees(block, 0, tuple(INSTRUCTION_SETS))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("relu", [False, True])
def test_a_layers_output_larger_than_the_cache(relu: bool, instruction_set: str) -> None:
    layer = Layer(
        4, 16, 16, (64, 64), (1, 2), (1, 1), (1, 1), 2, True, relu, relu,
        torch.float32, "channels_last", instruction_set, 2,
    )  # fmt: skip
    tensors, _ = layer.tensors(0)
    with backend("cpu", instruction_set), threads(2):
        y = torch.ops.involution.fused_layer(*tensors, relu, *layer.window)
    with backend("reference"):
        want = torch.ops.involution.fused_layer(*tensors, relu, *layer.window)
    assert y.numel() >= 4 << 20
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


SMALL = {  # input, groups, kernel, stride, dilation
    "1d": ((2, 4, 7), 2, [3], [2], [1]),
    "2d": ((2, 4, 4, 5), 2, [3, 2], [1, 2], [2, 1]),
    "3d": ((1, 2, 2, 3, 3), 1, [1, 2, 3], [1, 1, 2], [1, 1, 1]),
}
every_case = pytest.mark.parametrize("case", SMALL)


def small(case: str, options: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor | None], Any]:
    """The tensors of a small call, and its window."""
    shape, groups, *window = SMALL[case]
    torch.manual_seed(0)
    rows, output = groups * math.prod(window[0]), [-(-s // t) for s, t in zip(shape[2:], window[1], strict=True)]
    tensors = [torch.randn(shape), torch.randn(shape[0], 3, *output), torch.randn(rows, 3), torch.randn(rows)]
    tensors += [torch.randn(shape[1]), torch.randn(shape[1])]
    tensors = [t.to(dtype) for t in tensors]
    return (tensors if options else [*tensors[:3], None, None, None]), window


def moved(tensors: list[Tensor | None], move: Any) -> list[Tensor | None]:
    """The images, which come first, in another memory format."""
    return [move(t) if t is not None and t.dim() > 2 else t for t in tensors]


def permuted(t: Tensor) -> Tensor:
    """The same values, dense, with the batch last in memory."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def through_front_door(window: Any, relu: bool = False) -> Any:
    return lambda x, h, w, b=None, scale=None, shift=None: fused_layer(x, h, w, b, *window, scale, shift, relu)


def unfused(window: Any, relu: bool = False) -> Any:
    def f(x: Tensor, h: Tensor, w: Tensor, b=None, scale=None, shift=None) -> Tensor:
        y = composed(x, h, w, b, scale, shift, *window)
        return y.relu() if relu else y

    return f


LAYOUTS = {"contiguous": lambda t: t, "channels_last": channels_at_end, "permuted": permuted}


@every_case
@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(case: str, name: str, layout: str, options: bool) -> None:
    tensors, window = small(case, options)
    tensors = moved(tensors, LAYOUTS[layout])
    ops = torch.ops.involution
    y = ops.fused_layer(*tensors, options, *window)
    g = LAYOUTS[layout](torch.randn_like(y))
    with backend(name):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        torch.library.opcheck(ops.fused_layer, (*leaves, options, *window))
        torch.library.opcheck(ops.fused_layer_backward, (g, *tensors[:4], *window))
        x, _, span, bias, scale, shift = tensors
        end = [None] * 3
        next_reduce = [None] * 2
        if options:
            end = [torch.randn(6, x.shape[1]).double(), None, torch.randn(len(x), 6, *y.shape[2:]).double()]
            next_reduce = [torch.randn(5, 6).double(), torch.randn(5).double()]
            end[2] = LAYOUTS[layout](end[2])
        reduce = torch.randn(3, x.shape[1]).double()
        arguments = (x, reduce, None, 1e-6, span, bias, scale, shift, options, *end, options, *next_reduce, *window)
        torch.library.opcheck(ops.fused_bottleneck, arguments)


@every_case
@every_backend
@both_layouts
@pytest.mark.parametrize("options", [False, True])
def test_gradcheck_and_gradgradcheck(case: str, name: str, channels_last: bool, options: bool) -> None:
    tensors, window = small(case, options)
    if channels_last:
        tensors = moved(tensors, channels_at_end)
    leaves = tuple(t.detach().requires_grad_() for t in tensors if t is not None)
    with backend(name):
        f = through_front_door(window, relu=options)
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=INTERPRETED)


@every_case
@every_backend
@pytest.mark.parametrize("relu", [False, True])
def test_functorch_transforms(case: str, name: str, relu: bool) -> None:
    tensors, window = small(case)
    ours, theirs = through_front_door(window, relu), unfused(window, relu)
    every = tuple(range(len(tensors)))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    stacked = [torch.stack([t, 2 * t, -t]) for t in tensors]
    close = torch.testing.assert_close
    with backend(name):
        for got, want in zip(
            *(grad(lambda *t, f=f: f(*t).sin().sum(), every)(*tensors) for f in (ours, theirs)), strict=True
        ):
            close(got, want)
        close(jvp(ours, tuple(tensors), tangents), jvp(theirs, tuple(tensors), tangents))
        close(vmap(ours)(*stacked), torch.stack([theirs(*(t[i] for t in stacked)) for i in range(3)]))
        only_input = vmap(lambda x: ours(x, *tensors[1:]))(stacked[0])
        close(only_input, torch.stack([theirs(x, *tensors[1:]) for x in stacked[0]]))
        each = vmap(grad(lambda *t: ours(*t).sin().sum(), every))(*stacked)
        for i in range(3):
            leaves = [t[i].clone().requires_grad_() for t in stacked]
            for got, want in zip(each, torch.autograd.grad(theirs(*leaves).sin().sum(), leaves), strict=True):
                close(got[i], want)


@every_backend
def test_forward_mode_without_functorch(name: str) -> None:
    tensors, window = small("2d")
    tangents = tuple(torch.randn_like(t) for t in tensors)
    want = jvp(unfused(window), tuple(tensors), tangents)[1]
    with backend(name), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(tensors, tangents, strict=True)]
        y = through_front_door(window)(*duals)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, want)


class Head(torch.nn.Module):
    """The smallest module around the public function."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = [stride, stride]
        self.reduce = torch.nn.Conv2d(8, 5, 1, stride=stride)
        self.span = torch.nn.Conv2d(5, 2 * 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.reduce(x)
        return fused_layer(x, hidden, self.span.weight.flatten(1), self.span.bias, [3, 3], self.stride, [1, 1])


@both_layouts
@pytest.mark.parametrize("gradient", [False, True])
def test_compile_fullgraph(channels_last: bool, gradient: bool) -> None:
    torch.manual_seed(0)
    module, x = Head(stride=2), torch.randn(2, 8, 9, 10)
    x = channels_at_end(x) if channels_last else x
    torch._dynamo.reset()
    with torch.set_grad_enabled(gradient):
        want, got = module(x), torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    assert is_channels_last(got) == channels_last
    assert got.requires_grad == gradient
    if gradient:
        parameters = list(module.parameters())
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


@both_layouts
def test_five_image_sizes_make_at_most_two_graphs(channels_last: bool) -> None:
    graphs = 0

    def count(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    torch._dynamo.reset()
    module = Head(stride=2)
    compiled = torch.compile(module, fullgraph=True, backend=count)
    with torch.no_grad():
        for size in (8, 12, 17, 20, 31):
            x = torch.randn(2, 8, size, size + 1)
            x = channels_at_end(x) if channels_last else x
            torch.testing.assert_close(compiled(x), module(x))
    assert 1 <= graphs <= 2


def flops(f: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_are_those_of_the_steps(stride: int) -> None:
    x, output = torch.randn(2, 8, 6, 8), (6 // stride, 8 // stride)
    hidden, span = torch.randn(2, 5, *output, requires_grad=True), torch.randn(18, 5, requires_grad=True)
    window, ops = ([3, 3], [stride, stride], [1, 1]), torch.ops.involution

    def steps() -> Tensor:
        kernel_map = F.conv2d(hidden, span[..., None, None]).unflatten(1, (2, 3, 3))
        return involution2d(x, kernel_map, stride, 1)

    forward = flops(steps)
    assert forward > 0
    assert flops(lambda: fused_layer(x, hidden, span, None, *window)) == forward
    # Backward: the recomputed kernel map, and twice the forward pass.
    recomputed = flops(lambda: F.conv2d(hidden, span[..., None, None]))
    counted = flops(lambda: fused_layer(x.clone().requires_grad_(), hidden, span, None, *window).sum().backward())
    assert counted == forward + recomputed + 2 * forward

    reduce, after, last = torch.randn(5, 8), torch.randn(12, 8), torch.randn(7, 12)
    sizes = {"reduce": 5 * 8, "expand": 12 * 8, "next_reduce": 7 * 12}
    around = 2 * 2 * math.prod(output) * sum(sizes.values())
    given = (
        x,
        reduce,
        torch.zeros(5),
        0.0,
        span,
        None,
        None,
        None,
        True,
        after,
        torch.zeros(12),
        None,
        True,
        last,
        None,
    )
    assert flops(lambda: ops.fused_bottleneck(*given, *window)) == forward + around
    packed = (*given[:1], panels(reduce), *given[2:9], panels(after), *given[10:])
    assert flops(lambda: ops.fused_bottleneck(*packed, *window)) == forward + around


def arguments() -> dict[str, Any]:
    """Valid arguments of fused_layer: 2 groups of 4 channels, 3x3 kernels."""
    window = {"kernel_size": (3, 3), "stride": (2, 2), "dilation": (1, 1)}
    tensors = {"input": (2, 8, 5, 6), "hidden": (2, 5, 3, 3), "span_weight": (18, 5), "span_bias": (18,)}
    tensors |= {"scale": (8,), "shift": (8,)}
    return {name: torch.randn(shape) for name, shape in tensors.items()} | window


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(2, 5, 3, 4)}, ValueError, r"hidden must be \[2, 5, 3, 3\] .* got \[2, 5, 3, 4\]"),
        ({"hidden": torch.randn(1, 5, 3, 3)}, ValueError, "hidden must be"),
        ({"hidden": torch.randn(2, 4, 3, 3)}, ValueError, "hidden must be"),
        ({"hidden": torch.randn(2, 5, 9)}, ValueError, "hidden must be"),
        ({"hidden": torch.randn(2, 5, 3, 3).double()}, TypeError, "hidden must have input's .* got torch.float64"),
        ({"input": torch.randn(2, 8, 5, 6).int()}, TypeError, "input must have .*floating dtype"),
        ({"input": torch.randn(2, 8)}, ValueError, r"input must be .* one to three spatial axes, got \[2, 8\]"),
        ({"input": torch.randn(2, 7, 5, 6)}, ValueError, "span_weight .* dividing input's 7 channels"),
        ({"span_weight": torch.randn(17, 5)}, ValueError, r"span_weight must have G \* 9 rows .* got 17"),
        (
            {"span_weight": torch.randn(27, 5)},
            ValueError,
            "span_weight .* input's 8 channels, got 27",
        ),
        ({"span_weight": torch.randn(18)}, ValueError, "span_weight must be"),
        ({"span_weight": torch.randn(18, 5, 1, 1)}, ValueError, "span_weight must be"),
        ({"span_weight": torch.randn(18, 5).double()}, TypeError, "span_weight must have input's"),
        ({"span_bias": torch.randn(9)}, ValueError, r"span_bias must be \[18\] .* got \[9\]"),
        ({"span_bias": torch.randn(18).half()}, TypeError, "span_bias must have input's"),
        ({"scale": torch.randn(4)}, ValueError, r"scale must be \[8\]"),
        ({"shift": torch.randn(4)}, ValueError, r"shift must be \[8\]"),
        ({"scale": None}, ValueError, "scale and shift must be given together"),
        ({"shift": None}, ValueError, "scale and shift must be given together"),
        ({"stride": (1, 2)}, ValueError, "hidden must be"),
        ({"stride": (0, 2)}, ValueError, "stride"),
        ({"stride": (2, 2, 2)}, ValueError, "stride"),
        ({"dilation": (0, 1)}, ValueError, "dilation"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size"),
        ({"kernel_size": (3, 3, 1)}, ValueError, "kernel_size"),
        ({"kernel_size": True}, ValueError, "kernel_size must be an int or 2 ints, got True"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = arguments()
    fused_layer(**call)
    with pytest.raises(error, match=message):
        fused_layer(**(call | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduce_weight": torch.randn(5, 7)}, ValueError, "reduce_weight must be"),
        ({"reduce_weight": torch.randn(4, 8)}, ValueError, "reduce_weight must be"),
        ({"reduce_bias": torch.randn(6)}, ValueError, "reduce_bias must be"),
        ({"expand_weight": torch.randn(12, 7)}, ValueError, "expand_weight must be"),
        ({"expand_weight": torch.randn(12, 8).double()}, TypeError, "expand_weight must have input's"),
        ({"expand_bias": torch.randn(11)}, ValueError, "expand_bias must be"),
        ({"shortcut": torch.randn(2, 12, 5, 6)}, ValueError, "shortcut must be"),
        ({"shortcut": torch.randn(2, 1, 3, 3)}, ValueError, "shortcut must be"),
        ({"next_reduce_weight": torch.randn(7, 11)}, ValueError, "next_reduce_weight must be"),
        ({"next_reduce_bias": torch.randn(6)}, ValueError, "next_reduce_bias must be"),
        ({"span_weight": panels(torch.randn(18, 5)), "span_bias": None}, ValueError, "with span_bias, packed"),
        ({"expand_weight": panels(torch.randn(40, 8))}, ValueError, "packed as"),
        ({"expand_weight": torch.randn(1, 8, 16)}, ValueError, "packed as"),
        ({"expand_weight": None}, ValueError, "expand_bias must come with expand_weight"),
        ({"expand_weight": None, "expand_bias": None}, ValueError, "shortcut must come with expand_weight"),
        ({"next_reduce_weight": None}, ValueError, "next_reduce_bias must come with next_reduce_weight"),
        (
            {"expand_weight": None, "expand_bias": None, "shortcut": None},
            ValueError,
            "next_reduce_weight must come with expand_weight",
        ),
    ],
)
def test_bad_bottlenecks(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = bottleneck_arguments()
    torch.ops.involution.fused_bottleneck(**call)
    with pytest.raises(error, match=message):
        torch.ops.involution.fused_bottleneck(**(call | change))


def bottleneck_arguments() -> dict[str, Any]:
    call = arguments()
    del call["hidden"]
    shapes = {"reduce_weight": (5, 8), "reduce_bias": (5,), "expand_weight": (12, 8), "expand_bias": (12,)}
    shapes |= {"shortcut": (2, 12, 3, 3), "next_reduce_weight": (7, 12), "next_reduce_bias": (7,)}
    return (
        call
        | {name: torch.randn(shape) for name, shape in shapes.items()}
        | {"relu": True, "expand_relu": True, "rms_eps": 1e-6}
    )


def test_bad_gradients() -> None:
    call = arguments()
    tensors, window = list(call.values())[:4], list(call.values())[6:]
    for shape, dtype in (((2, 8, 3, 4), torch.float32), ((2, 8, 3, 3), torch.float64)):
        with pytest.raises(ValueError, match="grad must be"):
            torch.ops.involution.fused_layer_backward(torch.randn(shape, dtype=dtype), *tensors, *window)


@every_backend
@both_layouts
def test_empty_batch(name: str, channels_last: bool) -> None:
    call = arguments()
    for image in ("input", "hidden"):
        empty = call[image][:0]
        call[image] = (channels_at_end(empty) if channels_last else empty).requires_grad_()
    for vector in ("span_weight", "span_bias", "scale", "shift"):
        call[vector].requires_grad_()
    with backend(name):
        y = fused_layer(**call)
        y.sum().backward()
        for vector in ("span_weight", "span_bias", "scale", "shift"):
            assert torch.equal(call[vector].grad, torch.zeros_like(call[vector]))
        assert call["input"].grad.shape == (0, 8, 5, 6)
        assert call["hidden"].grad.shape == (0, 5, 3, 3)
        both = torch.ops.involution.fused_bottleneck(
            **(bottleneck_arguments() | {"input": call["input"].detach(), "shortcut": None})
        )
    assert y.shape == (0, 8, 3, 3)
    assert [t.shape for t in both] == [(0, 12, 3, 3), (0, 7, 3, 3)]


def test_meta_tensors_have_shapes_and_no_values() -> None:
    call = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments().items()}
    assert fused_layer(**call).shape == (2, 8, 3, 3)


def test_autocast_casts_every_tensor() -> None:
    call = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_layer(**call)
        assert fused_layer(**{n: v.double() if isinstance(v, Tensor) else v for n, v in call.items()}).dtype == (
            torch.float64
        )
    cast = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in call.items()}
    torch.testing.assert_close(y, fused_layer(**cast), rtol=0, atol=0)


def test_a_window_of_ints() -> None:
    call = arguments()
    sizes = {"kernel_size": 3, "stride": 2, "dilation": 1}
    torch.testing.assert_close(fused_layer(**(call | sizes)), fused_layer(**call), rtol=0, atol=0)


def test_fuses() -> None:
    x = torch.empty(1)
    assert fuses(x)
    assert fuses(x.double())
    assert not fuses(x.bfloat16())
    assert not fuses(x.to("meta"))
    with backend("reference"):
        assert not fuses(x)


RUNS = [(name, isa) for name in BACKENDS for isa in (INSTRUCTION_SETS if name == "cpu" else [None])]
every_run = pytest.mark.parametrize(("name", "instruction_set"), RUNS)


@every_run
@both_layouts
@pytest.mark.parametrize("width", [5, 16])
def test_taps_outside_are_skipped(name: str, instruction_set: str | None, channels_last: bool, width: int) -> None:
    """Hidden features that are huge at one border, with weights that are huge at the taps outside of it."""
    torch.manual_seed(0)
    size, groups, huge = 6, 2, 1e30
    x, g = torch.randn(2, 1, groups * width, size, size).unbind()
    hidden, weight = torch.randn(1, 3 + 4, size, size), torch.randn(groups, 3, 3, 3 + 4)
    hidden[:, 3:], weight[..., 3:] = 0, 0
    for border in range(4):  # top, bottom, left, right
        for tensor in (hidden[:, 3 + border], weight[..., 3 + border]):
            tensor.select(1 + border // 2, -(border % 2)).fill_(huge)
    clean = hidden.clone()
    clean[:, 3:] = 0
    weight = weight.flatten(0, 2)
    made = pointwise(hidden, weight, None)
    assert made.isinf().sum() == groups * (4 * 3 * size - 4)
    if channels_last:
        x, g, hidden, clean = (channels_at_end(t) for t in (x, g, hidden, clean))
    window = ([3, 3], [1, 1], [1, 1])
    with backend(name, instruction_set):
        ys, gradients = [], []
        for features in (hidden, clean):
            ys.append(torch.ops.involution.fused_layer(x, features, weight, None, None, None, False, *window))
            gradients.append(torch.ops.involution.fused_layer_backward(g, x, features, weight, None, *window))
    assert ys[0].isfinite().all()
    assert torch.equal(*ys)
    for ours, theirs in list(zip(*gradients, strict=True))[:2]:
        assert torch.equal(ours, theirs)


@every_run
@both_layouts
@pytest.mark.parametrize("width", [5, 16])
def test_nan_stays_nan_through_relu(name: str, instruction_set: str | None, channels_last: bool, width: int) -> None:
    layout = "channels_last" if channels_last else "contiguous"
    layer = Layer(
        1, 2, width, (7, 9), (3, 3), (1, 1), (1, 1), 4, True, True, True, torch.float32, layout, INSTRUCTION_SETS[0], 1
    )
    tensors, _ = layer.tensors(0)
    tensors[0][0, 2, 3, 4] = math.nan
    with backend(name, instruction_set):
        y = torch.ops.involution.fused_layer(*tensors, True, *layer.window)
        wanted = torch.zeros_like(y, dtype=torch.bool)
        wanted[0, 2, 2:5, 3:6] = True
        assert torch.equal(y.isnan(), wanted)
        assert y[~wanted].min() == 0
        block = Block(layer, True, True, 0.0, 19, True, True, True, 33, True)
        given = block.tensors(0)
        given["input"][0, 2, 3, 4] = math.nan
        for y in block.run(given):
            assert torch.equal(y.isnan(), wanted.any(1, keepdim=True).expand_as(y))


@every_backend
def test_an_infinite_gradient_stops_at_relu(name: str) -> None:
    tensors, window = small("2d")
    with backend(name):
        x = tensors[0].requires_grad_()
        y = torch.ops.involution.fused_layer(*tensors, True, *window)
        rectified = y == 0
        assert rectified.any()
        (dx,) = torch.autograd.grad(y, x, torch.where(rectified, math.inf, 1.0).to(y.dtype))
    assert dx.isfinite().all()


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_results_do_not_depend_on_the_thread_count(
    channels_last: bool, dtype: torch.dtype, instruction_set: str
) -> None:
    """Three shapes, because the kernels split an image by rows, long rows, and the number of threads."""
    layout = "channels_last" if channels_last else "contiguous"
    for size, batch in (((14, 14), 4), ((3, 130), 1), ((7, 7), 1)):
        layer = Layer(
            batch, 4, 16, size, (7, 7), (1, 1), (1, 1), 16, True, True, True, dtype, layout, instruction_set, 1
        )
        tensors, g = layer.tensors(0)
        block = Block(layer, False, True, 1e-6, 128, True, True, True, 32, True)
        given = block.tensors(0)
        results = []
        for count in (1, 2, 2):
            with backend("cpu", instruction_set), threads(count):
                results.append(
                    [
                        torch.ops.involution.fused_layer(*tensors, True, *layer.window),
                        *torch.ops.involution.fused_layer_backward(g, *tensors[:4], *layer.window),
                        *block.run(given),
                    ]
                )
        for other in results[1:]:
            assert [torch.equal(a, b) for a, b in zip(results[0], other, strict=True)] == [True] * len(other)
