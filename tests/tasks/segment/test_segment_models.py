"""The networks' shapes, and RedNet as an encoder of segmentation-models-pytorch."""

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import involution.zoo  # noqa: F401  (registers RedNet with timm)
from involution.nn import Involution2d
from involution.tasks.segment import SemanticFPN, UPerNet


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SemanticFPN, {"neck": "involution"}),
        (SemanticFPN, {"neck": "convolution", "backbone": "resnet26_paper"}),
        (UPerNet, {"channels": 32}),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (33, 47)])
def test_logits_have_the_images_size(make: Any, options: dict[str, Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = make(**{"backbone": "rednet26", "num_classes": 5, **options})
    images = torch.randn(2, 3, *size)
    logits = model(images)
    assert set(logits) == ({"out", "aux"} if make is UPerNet else {"out"})
    assert all(one.shape == (2, 5, *size) for one in logits.values())
    sum(one.square().mean() for one in logits.values()).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    with torch.no_grad():
        assert set(model.eval()(images)) == {"out"}


def test_where_involutions_are() -> None:
    def outside_the_backbone(neck: str) -> int:
        model = SemanticFPN("rednet26", neck=neck)
        return sum(isinstance(module, Involution2d) for module in model.pyramid.fpn.modules())

    assert outside_the_backbone("involution") == 4
    assert outside_the_backbone("convolution") == 0
    with pytest.raises(ValueError, match="neck must be convolution or involution, got 'attention'"):
        SemanticFPN("rednet26", neck="attention")


def test_auxiliary_head_is_optional() -> None:
    model = UPerNet("rednet26", channels=16, auxiliary=False)
    assert set(model(torch.randn(2, 3, 64, 64))) == {"out"}


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("FPN", {}),
        ("UPerNet", {"decoder_channels": 32}),
        ("Unet", {}),
        ("DeepLabV3Plus", {"encoder_output_stride": 16}),
    ],
)
def test_encoder_of_segmentation_models_pytorch(decoder: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    name = "tu-rednet50" if decoder == "DeepLabV3Plus" else "tu-rednet26"  # of one block, a stage dilates nothing
    model = getattr(smp, decoder)(name, encoder_weights=None, classes=4, **options)
    logits = model(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 4, 64, 96)
    logits.square().mean().backward()
    stages = [module for module in model.encoder.modules() if isinstance(module, Involution2d)]
    assert stages
    assert all(p.grad is not None for module in stages for p in module.parameters())
    if decoder == "DeepLabV3Plus":
        features = model.encoder(torch.randn(1, 3, 64, 96))
        assert features[-1].shape[-2:] == (4, 6)
        assert any(module.dilation != (1, 1) for module in stages)


def test_batch_norms_that_are_not_synchronised() -> None:
    """The paper's rule: all but those of kernel generators and the stem's one after its involution are synchronised."""
    from involution.engine.sync_batch_norm import norms_of_involutions, synchronised

    model = SemanticFPN("rednet26", neck="involution")
    converted = synchronised(model, norms_of_involutions(model))
    plain = {name for name, module in converted.named_modules() if isinstance(module, nn.BatchNorm2d)}
    generators = {
        name for name, module in converted.named_modules() if isinstance(module, nn.BatchNorm2d) and "generator" in name
    }
    assert plain == generators | {"pyramid.body.stem.bn2"}
    assert len(generators) == 1 + 8 + 4  # the stem's, the blocks', the neck's
    shared = {name for name, module in converted.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert {"pyramid.body.stem.bn1", "pyramid.body.layer1.0.bn2", "branches.0.0.1"} <= shared
