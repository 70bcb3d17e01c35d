"""ONNX files: standard operators alone, any batch and image size, and torch's values in onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from involution.export import to_onnx, trace
from involution.nn import Involution1d, Involution2d, Involution3d, LocalSelfAttention2d, SoftmaxGenerator
from involution.tasks.segment.models import PyramidPooling
from involution.zoo.rednet import RedNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def randomised(layer: nn.Module) -> nn.Module:
    """A layer begins as the identity; kernels must not."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return RedNet((1, 1, 1, 1), (16, 16, 16, 16), 5, kernel_size=3, stem_channels=32, zero_init_last=False).eval()


def written(network: nn.Module, example: Tensor, folder: Path, **options: Any) -> Any:
    file = folder / "model.onnx"
    to_onnx(trace(network, example, **options), file, ["out"], {"classes": ["a", "b"], "task": "classify"})
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    return onnxruntime.InferenceSession(str(file))


def agrees(session: Any, network: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        wanted = network(images).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_at_other_sizes(stride: int, tmp_path: Path) -> None:
    layer = randomised(Involution2d(32, (3, 5), stride=stride, dilation=(2, 1)))
    session = written(layer, torch.randn(2, 32, 8, 9), tmp_path)
    for size in ((1, 32, 8, 9), (3, 32, 5, 12), (2, 32, 13, 7)):
        agrees(session, layer, torch.randn(size))
    assert session.get_modelmeta().custom_metadata_map == {"classes": '["a", "b"]', "task": "classify"}


@pytest.mark.parametrize("made", [Involution1d, Involution3d])
def test_one_and_three_axes(made: Any, tmp_path: Path) -> None:
    layer, sizes = randomised(made(16, 3, stride=2)), (7, 6, 5)[: made.dims]
    session = written(layer, torch.randn(2, 16, *sizes), tmp_path, dynamic=(0,))
    agrees(session, layer, torch.randn(3, 16, *sizes))


@pytest.mark.parametrize(
    "layer",
    [Involution2d(32, 3, stride=2, kernel_generator=SoftmaxGenerator), LocalSelfAttention2d(32, 3, heads=2)],
    ids=["softmax", "attention"],
)
def test_maps_without_the_fused_layer(layer: nn.Module, tmp_path: Path) -> None:
    session = written(randomised(layer), torch.randn(2, 32, 6, 7), tmp_path)
    agrees(session, layer, torch.randn(1, 32, 9, 5))


def test_a_network_at_other_sizes(tmp_path: Path) -> None:
    network = tiny()
    session = written(network, torch.randn(2, 3, 32, 40), tmp_path)
    for size in ((2, 3, 32, 40), (1, 3, 45, 33)):
        agrees(session, network, torch.randn(size))


def test_adaptive_pooling_at_other_sizes(tmp_path: Path) -> None:
    network = randomised(nn.Sequential(nn.AdaptiveAvgPool2d((3, 4))))
    session = written(network, torch.randn(2, 3, 8, 9), tmp_path)
    for size in ((2, 3, 8, 9), (1, 3, 13, 4), (1, 3, 2, 3)):
        agrees(session, network, torch.randn(size))


@pytest.mark.parametrize("size", [(7, 9), (6, 6)])
def test_pyramid_pooling_at_other_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    """Also where the traced size is one of the grids'."""
    network = PyramidPooling(8, 4).eval()
    session = written(network, torch.randn(2, 8, *size), tmp_path)
    agrees(session, network, torch.randn(1, 8, 12, 14))


def test_sums_alternate_with_products(tmp_path: Path) -> None:
    """In any other order onnxruntime has the products of all taps in memory before it begins to add."""
    file = tmp_path / "model.onnx"
    to_onnx(trace(randomised(Involution2d(16, 3)), torch.randn(2, 16, 6, 6)), file, ["out"])
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    first = kinds.index("Pad")
    ordered = [kind for kind in kinds[first:] if kind in ("Mul", "Add")]
    assert ordered == ["Mul", "Mul", *["Mul", "Add"] * 7, "Add"]


def test_a_plain_torch_onnx_export_works() -> None:
    layer = randomised(Involution2d(16, 3))
    images = torch.randn(1, 16, 6, 7)
    with torch.no_grad():
        made = torch.onnx.export(layer, (images,), dynamo=True, verbose=False)
    assert made is not None
    assert {node.domain for node in made.model_proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, layer(images).numpy(), rtol=1e-4, atol=1e-4)
