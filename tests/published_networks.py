"""The published networks once more, by their definitions and under the module names of the code that trained them.

What is converted from their state dicts must compute the same. Nothing here uses this package: involutions unfold.
Names and structure are those of github.com/d-li14/involution with mmcls, mmdet 2.x and mmseg 0.x, and of PaddleClas's
ppcls/arch/backbone/model_zoo/rednet.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Block(nn.Module):
    """mmcv's convolution with norm and activation: without a norm it has a bias; ReLU unless told otherwise."""

    def __init__(self, width: int, out: int, size: int, stride: int = 1, norm: bool = True, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, size, stride, size // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(out)
        self.norm, self.act = norm, act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x) if self.norm else x
        return x.relu() if self.act else x


class Involution(nn.Module):
    """Kernels from pooled features, applied to unfolded windows; `plain`: the second convolution has no wrapper."""

    def __init__(self, channels: int, size: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.size, self.stride, self.groups = size, stride, channels // 16
        taps = size * size * self.groups
        self.conv1 = Block(channels, channels // 4, 1)
        self.conv2 = (
            nn.Conv2d(channels // 4, taps, 1) if plain else Block(channels // 4, taps, 1, norm=False, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.conv2(self.conv1(F.avg_pool2d(x, self.stride) if self.stride > 1 else x))
        n, _, h, w = kernels.shape
        windows = F.unfold(x, self.size, padding=self.size // 2, stride=self.stride)
        windows = windows.view(n, self.groups, 16, self.size**2, h, w)
        return torch.einsum("ngkhw,ngckhw->ngchw", kernels.view(n, self.groups, -1, h, w), windows).flatten(1, 2)


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int, plain: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Involution(width, 7, stride, plain), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if in_channels != 4 * width:
            shortcut = nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Backbone(nn.Module):
    """RedNet: the four stages' outputs."""

    def __init__(self, depth: int, stem_size: int = 3, plain: bool = False) -> None:
        super().__init__()
        middle = [Involution(32, stem_size, plain=plain), nn.BatchNorm2d(32), nn.ReLU()]
        self.stem = nn.Sequential(Block(3, 32, 3, 2), *middle, Block(32, 64, 3))
        width = 64
        for stage, blocks in enumerate(DEPTHS[depth]):
            layers = []
            for index in range(blocks):
                layers.append(Bottleneck(width, 64 * 2**stage, 2 if stage and not index else 1, plain))
                width = 256 * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        outputs = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            outputs.append(x)
        return outputs


class LinearHead(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2048, num_classes)


class Classifier(nn.Module):
    """mmcls: a backbone, an average and a linear layer."""

    def __init__(self, depth: int = 26, num_classes: int = 7, stem_size: int = 3, plain: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(depth, stem_size, plain)
        self.head = LinearHead(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.backbone(x)[-1].mean((2, 3)))


class FPN(nn.Module):
    """mmdet's and mmseg's: `extra` is the number of levels by convolutions of stride 2 from the last stage."""

    def __init__(self, widths: Sequence[int], layer: str, extra: int = 0) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Block(width, 256, 1, norm=False, act=False) for width in widths)
        self.fpn_convs = nn.ModuleList(three_by_three(256, layer, act=False) for _ in widths)
        for index in range(extra):
            self.fpn_convs.append(Block(256 if index else widths[-1], 256, 3, 2, norm=False, act=False))

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        levels = [lateral(stage) for lateral, stage in zip(self.lateral_convs, stages, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            levels[index - 1] = levels[index - 1] + F.interpolate(levels[index], size=levels[index - 1].shape[2:])
        outputs = [convolution(level) for convolution, level in zip(self.fpn_convs, levels, strict=False)]
        last = stages[-1]
        for extra in self.fpn_convs[len(levels) :]:
            last = extra(last)
            outputs.append(last)
        return outputs


def three_by_three(channels: int, layer: str, act: bool) -> nn.Module:
    """A 3x3 convolution in a wrapper, or a 7x7 involution, which has none."""
    return Involution(channels, 7) if layer == "involution" else Block(channels, channels, 3, norm=False, act=act)


class ProposalHead(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.rpn_conv = Involution(256, 7) if layer == "involution" else nn.Conv2d(256, 256, 3, padding=1)
        self.rpn_cls, self.rpn_reg = nn.Conv2d(256, 3, 1), nn.Conv2d(256, 12, 1)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        level = self.rpn_conv(level).relu()
        return self.rpn_cls(level), self.rpn_reg(level)


class BoxHead(nn.Module):
    """Scores of the classes and, last, of the background; box deltas of the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc_cls, self.fc_reg = nn.Linear(1024, num_classes + 1), nn.Linear(1024, 4 * num_classes)
        self.shared_fcs = nn.ModuleList([nn.Linear(256 * 49, 1024), nn.Linear(1024, 1024)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu()
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    def __init__(self, num_classes: int, layer: str) -> None:
        super().__init__()
        layers = [three_by_three(256, layer, act=True) for _ in range(4)]
        if layer == "involution":
            layers = [nn.Sequential(one, nn.ReLU()) for one in layers]
        self.convs = nn.ModuleList(layers)
        self.upsample, self.conv_logits = nn.ConvTranspose2d(256, 256, 2, 2), nn.Conv2d(256, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x)
        return self.conv_logits(self.upsample(x).relu())


class RegionHead(nn.Module):
    def __init__(self, num_classes: int, layer: str, masks: bool) -> None:
        super().__init__()
        self.bbox_head = BoxHead(num_classes)
        if masks:
            self.mask_head = MaskHead(num_classes, layer)


class TwoStage(nn.Module):
    """mmdet's Faster R-CNN and Mask R-CNN, without what has no parameters."""

    def __init__(self, neck: str, head: str, masks: bool, num_classes: int = 80, depth: int = 26) -> None:
        super().__init__()
        self.backbone = Backbone(depth, 7)
        self.neck = FPN([256, 512, 1024, 2048], neck)
        self.rpn_head = ProposalHead(head)
        self.roi_head = RegionHead(num_classes, head, masks)

    def forward(self, images: Tensor, boxes: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Of images, of regions' features [R, 256, 7, 7] and of [R, 256, 14, 14]."""
        levels = self.neck(self.backbone(images))
        levels.append(levels[-1][..., ::2, ::2])
        scores, deltas = zip(*(self.rpn_head(level) for level in levels), strict=True)
        result = {f"level {index}": level for index, level in enumerate(levels)}
        result |= {f"objectness {index}": one for index, one in enumerate(scores)}
        result |= {f"proposal deltas {index}": one for index, one in enumerate(deltas)}
        result["scores"], result["deltas"] = self.roi_head.bbox_head(boxes)
        if masks is not None:
            result["masks"] = self.roi_head.mask_head(masks)
        return result


class RetinaHead(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(Block(256, 256, 3, norm=False) for _ in range(4))
        self.reg_convs = nn.ModuleList(Block(256, 256, 3, norm=False) for _ in range(4))
        self.retina_cls = nn.Conv2d(256, 9 * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(256, 36, 3, padding=1)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        scores = deltas = level
        for of_scores, of_deltas in zip(self.cls_convs, self.reg_convs, strict=True):
            scores, deltas = of_scores(scores), of_deltas(deltas)
        return self.retina_cls(scores), self.retina_reg(deltas)


class RetinaNet(nn.Module):
    """mmdet's, from the stage of stride 8 on."""

    def __init__(self, neck: str, num_classes: int = 80, depth: int = 26) -> None:
        super().__init__()
        self.backbone = Backbone(depth, 7)
        self.neck = FPN([512, 1024, 2048], neck, extra=2)
        self.bbox_head = RetinaHead(num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = self.neck(self.backbone(images)[1:])
        scores, deltas = zip(*(self.bbox_head(level) for level in levels), strict=True)
        result = {f"level {index}": level for index, level in enumerate(levels)}
        result |= {f"scores {index}": one for index, one in enumerate(scores)}
        return result | {f"deltas {index}": one for index, one in enumerate(deltas)}


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class FPNHead(nn.Module):
    """mmseg's decoder on a pyramid: 3x3 blocks, each but the finest level's followed by upsampling, until stride 4."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(128, num_classes, 1)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            steps: list[nn.Module] = []
            for index in range(max(1, level)):
                steps.append(Block(128 if index else 256, 128, 3))
                if level:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, levels: list[Tensor]) -> Tensor:
        first, *others = (branch(level) for branch, level in zip(self.scale_heads, levels, strict=True))
        return self.conv_seg(first + sum(resized(other, first) for other in others))


class UPerHead(nn.Module):
    """mmseg's: pooled grids beside the last stage, a top-down path, and all levels joined."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(512, num_classes, 1)
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(grid), Block(2048, 512, 1)) for grid in (1, 2, 3, 6)]
        self.psp_modules = nn.ModuleList(pools)
        self.bottleneck = Block(2048 + 4 * 512, 512, 3)
        self.lateral_convs = nn.ModuleList(Block(width, 512, 1) for width in (256, 512, 1024))
        self.fpn_convs = nn.ModuleList(Block(512, 512, 3) for _ in range(3))
        self.fpn_bottleneck = Block(4 * 512, 512, 3)

    def forward(self, stages: list[Tensor]) -> Tensor:
        *finer, last = stages
        levels = [lateral(stage) for lateral, stage in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *(resized(pool(last), last) for pool in self.psp_modules)], 1)))
        for index in (2, 1, 0):
            levels[index] = levels[index] + resized(levels[index + 1], levels[index])
        smooth = [block(level) for block, level in zip(self.fpn_convs, levels[:3], strict=True)] + [levels[3]]
        joined = torch.cat([smooth[0], *(resized(level, smooth[0]) for level in smooth[1:])], 1)
        return self.conv_seg(self.fpn_bottleneck(joined))


class FCNHead(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(256, num_classes, 1)
        self.convs = nn.Sequential(Block(1024, 256, 3))

    def forward(self, stage: Tensor) -> Tensor:
        return self.conv_seg(self.convs(stage))


class SemanticFPN(nn.Module):
    """mmseg's encoder and decoder with a pyramid between them; logits at stride 4."""

    def __init__(self, neck: str, num_classes: int = 19, depth: int = 26) -> None:
        super().__init__()
        self.backbone = Backbone(depth, 7)
        self.neck = FPN([256, 512, 1024, 2048], neck)
        self.decode_head = FPNHead(num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": resized(self.decode_head(self.neck(self.backbone(images))), images)}


class UPerNet(nn.Module):
    """mmseg's, with its auxiliary head."""

    def __init__(self, num_classes: int = 19, depth: int = 26, auxiliary: bool = True) -> None:
        super().__init__()
        self.backbone = Backbone(depth, 7)
        self.decode_head = UPerHead(num_classes)
        if auxiliary:
            self.auxiliary_head = FCNHead(num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stages = self.backbone(images)
        logits = {"out": self.decode_head(stages), "aux": self.auxiliary_head(stages[2])}
        return {name: resized(one, images) for name, one in logits.items()}


class PaddleBatchNorm(nn.Module):
    """Paddle's: its running statistics are _mean and _variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("_mean", torch.zeros(channels))
        self.register_buffer("_variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self._variance + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self._mean * scale)[:, None, None]


class PaddleLinear(nn.Module):
    """Paddle's: its weight is [in, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class PaddleClassifier(nn.Module):
    """PaddleClas's RedNet: no prefixes, Paddle's batch norm and linear layer; takes the backbone's parameters over."""

    def __init__(self, backbone: Backbone, num_classes: int = 7) -> None:
        super().__init__()
        for name, module in list(backbone.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, child = name.rpartition(".")
                norm = PaddleBatchNorm(module.num_features)
                norm.weight, norm.bias = module.weight, module.bias
                norm._mean, norm._variance = module.running_mean, module.running_var
                setattr(backbone.get_submodule(parent), child, norm)
        for name, child in backbone.named_children():
            self.add_module(name, child)
        self.fc = PaddleLinear(2048, num_classes)
        self._backbone = [backbone]  # in a list: not a module once more

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self._backbone[0](x)[-1].mean((2, 3)))


def settled(network: nn.Module, *inputs: Tensor | None) -> nn.Module:
    """With norms off their start, and running statistics of these inputs, so that nothing over- or underflows.

    Every tensor then makes a difference, which a wrong one would change.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(*inputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network.eval()
