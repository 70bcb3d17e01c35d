"""Every number of the published segmenters: the paper's recipes and its framework's defaults."""

import colorsys
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from involution.engine.recipes import recipes
from involution.tasks.segment import Cityscapes, Segmenter, SemanticFPN, UPerNet
from involution.tasks.segment.module import pixel_loss, warmup_poly
from involution.tasks.segment.preprocessing import PhotometricDistortion

PAPERS = {name: file for name, file in recipes().items() if name.endswith("_80k")}


@pytest.mark.parametrize("name", PAPERS)
def test_numbers_of_the_papers_recipes(name: str) -> None:
    content = yaml.safe_load(Path(PAPERS[name]).read_text())
    model, data, trainer = content["model"]["init_args"], content["data"]["init_args"], content["trainer"]
    built = Segmenter(num_classes=19, **model).hparams
    assert (built["lr"], built["min_lr"], built["power"], built["lr_batch_size"]) == (0.01, 1e-4, 0.9, 8)
    assert (built["momentum"], built["weight_decay"], built["warmup_steps"]) == (0.9, 5e-4, 0)
    assert (built["auxiliary_weight"], built["loss_over"]) == (0.4, "all")
    assert (built["window"], tuple(built["scales"]), built["flip"]) == (None, (1.0,), False)
    assert (trainer["max_steps"], trainer["sync_batchnorm"], trainer.get("gradient_clip_val")) == (80_000, True, None)
    read = Cityscapes(**data)
    assert read.preprocessing.resize == 1024
    resize, crop, flip, distortion, _, _, padding, _ = read._training.transforms
    assert (resize.min_size, resize.max_size) == (512, 2049)  # 0.5 to 2 of 1024, and torch's ranges are half open
    assert (crop.size, crop.max_share) == ((512, 1024), 0.75)
    assert (padding.size, padding.pad_if_needed, padding.fill) == ((512, 1024), True, {Image: 0.0, Mask: 255})
    assert isinstance(flip, v2.RandomHorizontalFlip)
    assert flip.p == 0.5
    assert isinstance(distortion, PhotometricDistortion)
    assert (distortion.brightness, distortion.hue) == (32, 36)
    assert distortion.contrast == distortion.saturation == (0.5, 1.5)


def test_poly_falls_to_its_floor() -> None:
    """0.01 to 1e-4: the framework's min_lr + (lr - min_lr) * (1 - t)**0.9."""
    for step in (0, 1, 40_000, 79_999, 80_000):
        want = 1e-4 + (0.01 - 1e-4) * (1 - step / 80_000) ** 0.9
        assert 0.01 * warmup_poly(step, 80_000, 0, 0.001, 0.9, floor=0.01) == pytest.approx(want)
    with pytest.raises(ValueError, match=r"min_lr must be from 0 to lr, which is 0.01, got 0.02"):
        Segmenter("semantic_fpn", 2, "rednet26", lr=0.01, min_lr=0.02)
    with pytest.raises(ValueError, match="loss_over must be known or all, got 'none'"):
        Segmenter("semantic_fpn", 2, "rednet26", loss_over="none")


def test_loss_over_all_pixels() -> None:
    """mmsegmentation's: torch's without reduction, which is zero where pixels are ignored, and its mean."""
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    want = nn.functional.cross_entropy(logits, masks, ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(pixel_loss(logits, masks, "all"), want)
    torch.testing.assert_close(pixel_loss(logits, masks), want * masks.numel() / 24)
    assert pixel_loss(logits.bfloat16(), masks, "all").dtype == torch.float32


def distorted(image: torch.Tensor, **params: Any) -> torch.Tensor:
    whole = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "contrast_first": True, **params}
    result = PhotometricDistortion().transform(Image(image), whole)
    assert result.dtype == torch.uint8
    return result.as_subclass(torch.Tensor)


def test_distortions_against_colorsys() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal(distorted(image), image)
    assert torch.equal(distorted(image, brightness=-20.0), (image.int() - 20).clamp(0, 255).byte())
    assert torch.equal(distorted(image, contrast=0.5), (image / 2).round().byte())
    brighter = (image.float() + 32).clamp(max=255)  # in range before contrast multiplies it
    assert torch.equal(distorted(image, brightness=32.0, contrast=1.5), (brighter * 1.5).clamp(max=255).round().byte())
    for params in ({"saturation": 0.6}, {"saturation": 1.5}, {"hue": 36.0}, {"hue": -20.0}):
        want = np.zeros((3, 16, 16))
        for row in range(16):
            for column in range(16):
                hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
                saturation = min(1.0, saturation * params.get("saturation", 1))
                want[:, row, column] = colorsys.hsv_to_rgb((hue + params.get("hue", 0) / 360) % 1, saturation, value)
        assert np.abs(255 * want - distorted(image, **params).numpy()).max() <= 0.51, params
    first, last = (distorted(image, contrast=1.5, saturation=0.5, contrast_first=when) for when in (True, False))
    assert not torch.equal(first, last)


def test_probability_and_range_of_distortions() -> None:
    torch.manual_seed(0)
    draws = [PhotometricDistortion().make_params([]) for _ in range(2000)]
    for name, neutral, low, high in (
        ("brightness", 0, -32, 32), ("contrast", 1, 0.5, 1.5), ("saturation", 1, 0.5, 1.5), ("hue", 0, -36, 36)
    ):  # fmt: skip
        found = [one[name] for one in draws if one[name] != neutral]
        assert 0.45 < len(found) / 2000 < 0.55
        assert low <= min(found) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(found) <= high
    assert 0.45 < sum(one["contrast_first"] for one in draws) / 2000 < 0.55


def test_masks_are_not_distorted() -> None:
    torch.manual_seed(0)
    mask = Mask(torch.randint(0, 3, (8, 8), dtype=torch.uint8))
    image = Image(torch.full((3, 8, 8), 100, dtype=torch.uint8))
    pairs = [PhotometricDistortion()(image, mask) for _ in range(20)]
    assert all(torch.equal(one, mask) for _, one in pairs)
    assert any(not torch.equal(one, image) for one, _ in pairs)


@pytest.mark.parametrize("make", [SemanticFPN, UPerNet])
def test_initialisation_of_decoders(make: Any) -> None:
    torch.manual_seed(0)
    model = make("rednet26")
    classifiers = [model.classify[1]] + ([model.auxiliary[4]] if make is UPerNet else [])
    for layer in classifiers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert not layer.bias.any()
    outside = [part for name, part in model.named_children() if name not in ("body", "pyramid")]
    blocks = [module for part in outside for module in part.modules() if isinstance(module, Conv2dNormActivation)]
    convolutions = [block[0] for block in blocks] + ([model.auxiliary[0]] if make is UPerNet else [])
    assert len(convolutions) == (1 + 1 + 2 + 3 if make is SemanticFPN else 4 + 1 + 3 + 3 + 1 + 1)
    for layer in convolutions:
        want = math.sqrt(2 / (layer.out_channels * layer.kernel_size[0] ** 2))
        assert float(layer.weight.detach().std()) == pytest.approx(want, rel=0.05)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout | nn.Dropout2d) and module.p]
    assert [(type(module), module.p) for module in drops] == [(nn.Dropout2d, 0.1)] * len(classifiers)
