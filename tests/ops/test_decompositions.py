"""The operators in torch's standard ones, against the operators themselves: values, strides, 16 bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from involution.export import decompositions
from involution.nn import Involution1d, Involution2d, Involution3d
from involution.ops.layer import pack

OPS = torch.ops.involution
DECOMPOSITIONS = {
    operator: function for operator, function in decompositions().items() if operator.namespace == "involution"
}
CASES = [
    # sizes, kernel, stride, padding, dilation
    ((9,), (3,), (1,), (1,), (1,)),
    ((10,), (4,), (3,), (0,), (2,)),
    ((6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((7, 8), (5, 2), (2, 1), (2, 3), (1, 3)),
    ((8, 5), (1, 3), (3, 2), (4, 0), (1, 1)),
    ((4, 5, 6), (3, 1, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
]


def tensors(case: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    sizes, kernel, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(0)
    output = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    x = torch.randn(2, 6, *sizes, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(2, 3, *kernel, *output, generator=generator, dtype=torch.float64).to(dtype)
    g = torch.randn(2, 6, *output, generator=generator, dtype=torch.float64).to(dtype)
    return x, k, g, [list(stride), list(padding), list(dilation)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_agree_with_the_operators(case: Any) -> None:
    x, k, g, window = tensors(case)
    for name, first, second, made in (("apply", x, k, g), ("adjoint", g, k, x), ("correlate", g, x, k)):
        operator = getattr(OPS, name).default
        arguments = (first, second, list(made.shape), *window)
        torch.testing.assert_close(DECOMPOSITIONS[operator](*arguments), operator(*arguments), rtol=1e-12, atol=1e-12)


def test_strides_are_the_operators() -> None:
    x, k, g, window = tensors(CASES[3], torch.float32)
    x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    for name, first, second, made in (("apply", x, k, g), ("adjoint", g, k, x), ("correlate", g, x, k)):
        operator = getattr(OPS, name).default
        arguments = (first, second, list(made.shape), *window)
        assert DECOMPOSITIONS[operator](*arguments).stride() == operator(*arguments).stride()


def test_16_bits_accumulate_in_float32() -> None:
    x, k, g, window = tensors(CASES[2], torch.bfloat16)
    operator = OPS.apply.default
    wanted = operator(x.float(), k.float(), list(g.shape), *window).bfloat16()
    found = DECOMPOSITIONS[operator](x, k, list(g.shape), *window)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-6)  # the last bit may round otherwise


@pytest.mark.parametrize("made", [Involution1d, Involution2d, Involution3d])
@pytest.mark.parametrize("stride", [1, 2])
def test_fused_layer_agrees(made: Any, stride: int) -> None:
    torch.manual_seed(0)
    layer = made(32, 3, stride=stride, dilation=2, dtype=torch.float64)
    x = torch.randn(2, 32, *(7, 6, 5)[: made.dims], dtype=torch.float64)
    weight = torch.randn_like(layer.generator.span.weight.flatten(1))
    scale, shift = torch.randn(2, 32, dtype=torch.float64)
    arguments = (x, layer.generator.hidden(x), weight, layer.generator.span.bias, scale, shift, True)
    window = [[3] * made.dims, [stride] * made.dims, [2] * made.dims]
    operator = OPS.fused_layer.default
    with torch.no_grad():
        torch.testing.assert_close(DECOMPOSITIONS[operator](*arguments, *window), operator(*arguments, *window))


@pytest.mark.parametrize("packed", [False, True])
def test_fused_bottleneck_agrees(packed: bool) -> None:
    torch.manual_seed(0)

    def weights(*shape: int) -> tuple[Tensor, Tensor]:
        weight, bias = torch.randn(*shape), torch.randn(shape[0])
        return (pack(weight) if packed else weight), bias

    x, shortcut = torch.randn(2, 32, 7, 6), torch.randn(2, 40, 4, 3)
    span = weights(2 * 9, 8)
    arguments = (
        *(x, *weights(8, 32), 1e-6, *span, *torch.randn(2, 32), True, *weights(40, 32), shortcut, True),
        *weights(8, 40),
    )
    window = [[3, 3], [2, 2], [1, 1]]
    operator = OPS.fused_bottleneck.default
    for found, wanted in zip(DECOMPOSITIONS[operator](*arguments, *window), operator(*arguments, *window), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_plain_torch_export_decomposes_to_the_same_values() -> None:
    torch.manual_seed(0)
    layer = Involution2d(16, 3, stride=2).eval()
    torch.nn.init.normal_(layer.generator.span.weight)  # type: ignore[union-attr, arg-type]
    x = torch.randn(2, 16, 8, 9)
    with torch.no_grad():
        program = torch.export.export(layer, (x,)).run_decompositions(decompositions())
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    assert not any("involution" in str(node.target) for node in program.graph.nodes)


def test_an_exported_program_is_the_same_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Involution2d(16, 3).eval(), torch.randn(2, 16, 8, 9)
    programs = []
    for kernels in (True, False):
        monkeypatch.setattr("involution.ops.backends.selection.fuses", lambda tensor, answer=kernels: answer)
        with torch.no_grad():
            programs.append([str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes])
    assert programs[0] == programs[1]
    assert "involution.fused_layer.default" in programs[0]


def test_torch_knows_of_no_decomposition() -> None:
    """Inductor refuses operators that have one in torch's table where CI is set, and FakeTensors would run it."""
    assert not torch._decomp.get_decompositions(list(DECOMPOSITIONS))
