"""Local self-attention equals torch's attention under a neighbourhood mask."""

import math
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from involution.nn import Involution2d, LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from involution.nn.attention import RELATIVE_POSITIONS, AttentionGenerator

LAYERS = {1: LocalSelfAttention1d, 2: LocalSelfAttention2d, 3: LocalSelfAttention3d}


def neighbourhood(layer: Any, sizes: tuple[int, ...]) -> Tensor:
    """The tap of each query's window at each position of the image, or -1: [O, S]."""
    outputs = [range(-(-size // step)) for size, step in zip(sizes, layer.stride, strict=True)]
    table = torch.full((math.prod(map(len, outputs)), math.prod(sizes)), -1)
    for row, place in enumerate(product(*outputs)):
        for tap, offsets in enumerate(product(*map(range, layer.kernel_size))):
            at = [
                o * s + u * d - d * (k - 1) // 2
                for o, s, u, d, k in zip(place, layer.stride, offsets, layer.dilation, layer.kernel_size, strict=True)
            ]
            if all(0 <= one < size for one, size in zip(at, sizes, strict=True)):
                column = 0
                for one, size in zip(at, sizes, strict=True):
                    column = column * size + one
                table[row, column] = tap
    return table


def by_torch(layer: Any, x: Tensor) -> Tensor:
    """scaled_dot_product_attention over all positions, under a mask; relative positions as an additive float mask."""
    sizes, heads = tuple(x.shape[2:]), layer.heads
    query, key, value = (
        one.unflatten(1, (heads, -1)).flatten(3).transpose(2, 3)
        for one in (layer.generator.query(x), layer.generator.key(x), layer.value(x))
    )
    table = neighbourhood(layer, sizes)
    kind = layer.generator.relative_position
    taps = table.clamp(min=0)
    if kind == "bias":
        mask = layer.generator.bias.flatten(1)[:, taps][None]
    elif kind == "factorised":
        offsets = list(product(*map(range, layer.kernel_size)))
        embeddings = torch.stack(
            [
                torch.cat([e[:, :, u] for e, u in zip(layer.generator.embeddings, offset, strict=True)], 1)
                for offset in offsets
            ]
        )  # [taps, heads, channels per head]
        scores = torch.einsum("nhqc,thc->nhqt", query, embeddings) / math.sqrt(query.shape[-1])
        mask = scores.gather(3, taps.expand(*scores.shape[:2], -1, -1))
    else:
        mask = torch.zeros(1, 1, *table.shape, dtype=x.dtype)
    mask = mask.masked_fill(table < 0, -math.inf)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(len(x), heads, *table.shape))
    outputs = [-(-size // step) for size, step in zip(sizes, layer.stride, strict=True)]
    return found.transpose(2, 3).flatten(1, 2).unflatten(2, outputs)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Tensor]:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    sides = st.integers(1, 4 if dims == 3 else 7)
    sizes, kernel_size, stride = (
        [draw(one) for _ in range(dims)] for one in (sides, st.integers(1, 5), st.integers(1, 2))
    )
    # An even, dilated window can be entirely outside the image, for which torch returns NaN.
    dilation = [draw(st.integers(1, 2)) if size % 2 else 1 for size in kernel_size]
    heads, relative = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(["none", "bias", "factorised"]))
    channels = heads * dims * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = LAYERS[dims](channels, kernel_size, stride, dilation, heads, relative, dtype=torch.float64)
    if relative == "bias":
        nn.init.normal_(layer.generator.bias)
    x = torch.randn(draw(st.integers(1, 2)), channels, *sizes, dtype=torch.float64)
    return layer, x.movedim(1, -1).contiguous().movedim(-1, 1) if draw(st.booleans()) else x


@settings(max_examples=60, deadline=None)
@given(cases())
def test_random_geometries_equal_torchs_attention(case: tuple[Any, Tensor]) -> None:
    """Outputs and all gradients, in float64 to 1e-10 and in float32 to 1e-5."""
    layer, x = case
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        layer, x = layer.to(dtype), x.to(dtype)
        results = []
        for attend in (layer, partial(by_torch, layer)):
            one = x.clone().requires_grad_()
            y = attend(one)
            weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
            results.append((y, *torch.autograd.grad((y * weights).sum(), [one, *layer.parameters()])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_window_over_the_image_is_full_attention(dims: int) -> None:
    torch.manual_seed(0)
    sizes = (4, 3, 5)[:dims]
    layer = LAYERS[dims](8, [2 * size - 1 for size in sizes], heads=2, dtype=torch.float64)
    x = torch.randn(2, 8, *sizes, dtype=torch.float64)
    parts = [layer.generator.query(x), layer.generator.key(x), layer.value(x)]
    query, key, value = (one.unflatten(1, (2, 4)).flatten(3).transpose(2, 3) for one in parts)
    want = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(1, 2).unflatten(2, sizes)
    torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("relative", ["none", "bias"])
def test_flex_attention_agrees(relative: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    size, kernel_size = 8, 5
    layer = LocalSelfAttention2d(16, kernel_size, heads=2, relative_position=relative)
    if relative == "bias":
        nn.init.normal_(layer.generator.bias)
    x = torch.randn(1, 16, size, size)

    def score(found: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = [key // size - query // size, key % size - query % size]
        inside = (offset[0].abs() <= kernel_size // 2) & (offset[1].abs() <= kernel_size // 2)
        if relative == "bias":
            taps = [(one + kernel_size // 2).clamp(0, kernel_size - 1) for one in offset]
            found = found + layer.generator.bias[head, taps[0], taps[1]]
        return torch.where(inside, found, -math.inf)

    with torch.no_grad():
        parts = [layer.generator.query(x), layer.generator.key(x), layer.value(x)]
        query, key, value = (one.unflatten(1, (2, 8)).flatten(3).transpose(2, 3).contiguous() for one in parts)
        want = flex_attention(query, key, value, score_mod=score)
        got = layer(x).unflatten(1, (2, 8)).flatten(3).transpose(2, 3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_its_generator_works_in_any_involution() -> None:
    """Without a value projection: Involution2d applies the kernels to its input."""
    torch.manual_seed(0)
    layer = Involution2d(32, 5, stride=2, kernel_generator=AttentionGenerator)
    x = torch.randn(2, 32, 9, 8)
    assert layer(x).shape == (2, 32, 5, 4)
    kernels = layer.generator(x)
    assert kernels.shape == (2, 2, 5, 5, 5, 4)
    torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(2, 2, 5, 4))


def test_gradients_are_finite_if_no_tap_is_inside() -> None:
    """Two taps, one to the left and two to the right of a single position."""
    layer = LocalSelfAttention1d(4, 2, dilation=3, heads=1)
    x = torch.randn(1, 4, 1, requires_grad=True)
    y = layer(x)
    assert y.abs().max() == 0
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_compiled_and_half_precision() -> None:
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(32, 7, heads=2, relative_position="factorised").eval()
    x = torch.randn(1, 32, 12, 12).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide channels, got heads=3, channels=8"),
        ({"heads": 0}, "heads must be a positive int, got 0"),
        ({"channels": 8.0}, "channels must be a positive int, got 8.0"),
        ({"relative_position": "rotary"}, "relative_position must be one of none, bias, factorised, got 'rotary'"),
        ({"relative_position": "factorised", "heads": 8}, "wants heads whose channels divide by 2, got 1"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        LocalSelfAttention2d(**{"channels": 8, "heads": 2, **options})
    assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"input must be \[N, 8, H, W\] or \[8, H, W\], got \[1, 4, 5, 5\]"):
        LocalSelfAttention2d(8, heads=2)(torch.zeros(1, 4, 5, 5))


def test_one_image_without_a_batch() -> None:
    layer, x = LocalSelfAttention2d(8, 3, stride=2, heads=2), torch.randn(8, 6, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("relative", ["none", "bias", "factorised"])
def test_rednet_with_attention(relative: str) -> None:
    """The paper's comparison; the cost equals torch's FLOP count."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    import involution.zoo  # noqa: F401
    from involution.cost import cost

    torch.manual_seed(0)
    model = timm.create_model("rednet26", attention=relative, num_classes=5)
    layers = [module for module in model.modules() if isinstance(module, LocalSelfAttention2d)]
    assert len(layers) == 9
    assert not any(isinstance(module, Involution2d) for module in model.modules())
    assert [layer.heads for layer in layers[:2]] == [2, 4]
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images[:1])
    assert cost(model, (3, 64, 64)).multiply_adds == counter.get_total_flops() // 2
    levels = timm.create_model("rednet26", attention=relative, features_only=True)(images)
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relative", RELATIVE_POSITIONS)
def test_the_cost_of_a_layer_is_the_documented_one(relative: str, stride: int) -> None:
    """Multiply-adds per output position: of the generator, the value projection and the operator."""
    from involution.cost import multiply_adds

    layer = LocalSelfAttention2d(64, 7, stride, heads=4, relative_position=relative)
    generator = (1 + stride**2) * 64 * 64 + 49 * 64 * (2 if relative == "factorised" else 1)
    wanted = generator + stride**2 * 64 * 64 + 49 * 64
    assert multiply_adds(layer, (64, 8, 8)) == wanted * (8 // stride) ** 2


@pytest.mark.parametrize("options", [{"attention": "rotary"}, {"attention": "bias", "kernel_generator": "linear"}])
def test_rednet_with_bad_attention(options: dict[str, Any]) -> None:
    import timm

    import involution.zoo  # noqa: F401

    with pytest.raises(ValueError, match="attention"):
        timm.create_model("rednet26", **options)


def test_costs_are_the_documented_ones() -> None:
    import timm

    import involution.zoo  # noqa: F401
    from involution.cost import cost

    page = (Path(__file__).parents[2] / "docs" / "family.md").read_text()
    for relative in RELATIVE_POSITIONS:
        with torch.device("meta"):
            found = cost(timm.create_model("rednet50", attention=relative))
        row = f'"{relative}" | {found.parameters / 1e6:.2f} M | {found.multiply_adds / 1e9:.2f} G |'
        assert row in page
