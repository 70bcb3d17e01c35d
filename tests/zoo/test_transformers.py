"""RedNet as a backbone of transformers, docs/training-code.md; skipped where transformers is not installed."""

from pathlib import Path

import pytest
import timm
import torch

import involution.zoo as zoo

transformers = pytest.importorskip("transformers")
assert zoo  # registers RedNet with timm


def test_a_backbone_has_timms_features() -> None:
    config = transformers.TimmBackboneConfig(backbone="rednetv2_26", out_indices=(1, 2, 3, 4))
    backbone = transformers.TimmBackbone(config).eval()
    ours = timm.create_model("rednetv2_26", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    ours.load_state_dict(backbone._backbone.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(list(backbone(images).feature_maps), ours(images))


def test_a_segmenter_trains_and_reads_back(tmp_path: Path) -> None:
    backbone = transformers.TimmBackboneConfig(backbone="rednetv2_26", out_indices=(1, 2, 3, 4))
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=5, hidden_size=32, use_auxiliary_head=False
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    images = torch.rand(2, 3, 64, 64)
    model(pixel_values=images, labels=torch.randint(5, (2, 64, 64))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values=images).logits, model(pixel_values=images).logits)
