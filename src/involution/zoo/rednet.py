"""RedNet: ResNet with involution at every bottleneck's 3x3 convolution and in the stem (Li et al., CVPR 2021, 3.2).

Importing this module registers with timm the paper's networks, rednet26, 38, 50, 101 and 152; rednetv2_26 to
rednetv2_152, the same but for kernel generators that their input's scale does not change, which train at any depth; and
rednet14_cifar, rednet26_cifar and their rednetv2 forms for images of 32x32. PaddleClas publishes weights of the paper's
networks, which `pretrained=True` downloads (see `involution.zoo.pretrained`); of the others there are none, and it
raises timm's own RuntimeError.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload
from urllib.error import URLError

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_act_layer, create_classifier, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_notrace_module
from timm.models import register_model as _register_model
from torch import Tensor, nn

from ..nn import (
    BottleneckGenerator,
    ContextGenerator,
    Involution2d,
    LinearGenerator,
    LocalSelfAttention2d,
    PositionGenerator,
    SoftmaxGenerator,
)
from ..nn.attention import RELATIVE_POSITIONS
from ..nn.generators import KERNEL_INITS, KernelInit
from .checkpoints import load_published

__all__ = ["RedNet"]  # timm adds the entry points' names

# The layer checks shapes in Python, which symbolic tracing cannot follow.
register_notrace_module(Involution2d)
register_notrace_module(LocalSelfAttention2d)

Layer = str | Callable[..., nn.Module]
EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])
register_model: Callable[[EntryPoint], EntryPoint] = _register_model  # timm ships without types
_GENERATORS: dict[str, type[nn.Module]] = {
    "bottleneck": BottleneckGenerator,
    "linear": LinearGenerator,
    "context": ContextGenerator,
    "position": PositionGenerator,
    "softmax": SoftmaxGenerator,
}
EXPANSION = 4  # a bottleneck's output channels over its width


class _Parts(NamedTuple):
    """Makes the layers that stem and blocks consist of, with a network's settings filled in."""

    convolution: Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size, stride=1, padding=0)
    involution: Callable[..., nn.Module]  # (channels, kernel_size, stride=1, dilation=1)
    norm: Callable[[int], nn.Module]
    act: Callable[[], nn.Module]


class Bottleneck(nn.Module):
    """ResNet's bottleneck with an involution in the middle: 1x1, involution, 1x1, added to the shortcut.

    The shortcut is a strided 1x1 convolution with a norm where the shape changes, else the input itself.

    Args:
        in_channels: of the input.
        width: of the involution; the output has 4 times as many channels.
        parts: makes its convolutions, involutions, norms and activations.
        kernel_size: of the involution.
        stride: of the involution and of the shortcut.
        dilation: of the involution.
        drop_path: probability that training skips the residual branch for a sample.

    Shapes: [N, in_channels, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        parts: _Parts,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = parts.convolution(in_channels, width, 1)
        self.bn1 = parts.norm(width)
        self.act1 = parts.act()
        self.conv2 = parts.involution(width, kernel_size, stride=stride, dilation=dilation)
        self.bn2 = parts.norm(width)
        self.act2 = parts.act()
        self.conv3 = parts.convolution(width, out_channels, 1)
        self.bn3 = parts.norm(out_channels)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = parts.convolution(in_channels, out_channels, 1, stride=stride)
            self.downsample = nn.Sequential(projection, parts.norm(out_channels))
        self.act3 = parts.act()

    def zero_init_last(self) -> None:
        """Zeroes the last norm's scale, so that the block starts as its shortcut."""
        if getattr(self.bn3, "weight", None) is not None:
            nn.init.zeros_(self.bn3.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.act2(self.bn2(self.conv2(branch)))
        branch = self.drop_path(self.bn3(self.conv3(branch)))
        result: Tensor = self.act3(branch + self.downsample(x))
        return result


class RedNet(nn.Module):
    """RedNet (paper, section 3.2), with the interface of timm's ResNet.

    Args:
        layers: blocks in each of the four stages.
        channels: the bottlenecks' width in each stage, as in timm's ResNet; a stage's output has 4 times as many.
        num_classes: of the classifier; 0 leaves it out.
        in_chans: channels of the image.
        output_stride: 8, 16 or 32; stages that would exceed it dilate their involutions instead of striding.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        kernel_size: of the bottlenecks' involutions.
        group_channels: channels that share a kernel; must divide every width and stem_channels / 2; or "all".
        reduction_ratio: of the kernel generators that are bottlenecks.
        kernel_generator: "bottleneck", "linear", "context", "position", "softmax" (of `involution.nn`, in the same
            order), or a callable as `Involution2d` takes it.
        attention: has local self-attention over the same windows in the place of every involution (section 3.3), a head
            for every `group_channels` channels: "none", "bias" or "factorised", its relative positions; None has none.
        stem_channels: of the stem's output.
        stem_layer: the layer in the stem's middle: "involution", or "convolution" (3x3, for comparison).
        stem_kernel_size: of the stem's involution: 3 (classification) or 7 (the paper's dense prediction).
        stem_stride: 4 (strided convolution and max pooling), 2 (strided convolution) or 1 (neither).
        norm_layer: a norm's name in timm or its class, for the network and its kernel generators.
        generator_norm_layer: the kernel generators' own norm; None takes `norm_layer`, "rms" the default of
            `BottleneckGenerator`, which divides every position's features by their RMS.
        kernel_init: how kernels begin, "identity", "box", "paper" or a callable, see `BottleneckGenerator`; attention,
            softmaxed kernels and generators that are not bottlenecks begin in their own way.
        act_layer: an activation's name in timm or its class, for the network and its kernel generators.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth at the last block, growing linearly from 0 at the first.
        zero_init_last: starts every block as its shortcut.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [N, in_chans, H, W] -> [N, num_classes]; any H and W; feature levels have ceil(H / reduction) rows.

    Raises:
        TypeError: kernel_generator is a module.
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        channels: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        kernel_size: int = 7,
        group_channels: int | Literal["all"] = 16,
        reduction_ratio: int = 4,
        kernel_generator: str | Callable[..., nn.Module] = "bottleneck",
        attention: str | None = None,
        stem_channels: int = 64,
        stem_layer: str = "involution",
        stem_kernel_size: int = 3,
        stem_stride: int = 4,
        norm_layer: Layer = nn.BatchNorm2d,
        generator_norm_layer: Layer | None = None,
        kernel_init: KernelInit = "identity",
        act_layer: Layer = nn.ReLU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_stages(layers, channels)
        _check_least("num_classes", num_classes, 0)
        _check_least("in_chans", in_chans, 1)
        _check_choice("output_stride", output_stride, (8, 16, 32))
        _check_choice("stem_layer", stem_layer, ("involution", "convolution"))
        if stem_layer == "convolution" and stem_kernel_size != 3:
            raise ValueError(f"stem_kernel_size must be 3 for a convolution in the stem, got {stem_kernel_size!r}")
        if isinstance(kernel_generator, nn.Module):
            raise TypeError("kernel_generator must make a module for each layer, got a module that all would share")
        if not callable(kernel_generator):
            _check_choice("kernel_generator", kernel_generator, tuple(_GENERATORS))
        if attention is not None:
            _check_choice("attention", attention, RELATIVE_POSITIONS)
            if (kernel_generator, reduction_ratio) != ("bottleneck", 4):
                raise ValueError("attention makes its own kernels, got a kernel_generator or reduction_ratio besides")
        if not callable(kernel_init):
            _check_choice("kernel_init", kernel_init, KERNEL_INITS)
        _check_choice("stem_kernel_size", stem_kernel_size, (3, 7))
        _check_choice("stem_stride", stem_stride, (1, 2, 4))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        factory_kwargs: dict[str, Any] = {
            name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None
        }
        norm = _norm_layer("norm_layer", norm_layer)
        generator_norm = norm
        if generator_norm_layer is not None:
            is_default = generator_norm_layer == "rms"
            generator_norm = None if is_default else _norm_layer("generator_norm_layer", generator_norm_layer)
        settings: dict[str, Any] = {
            "reduction_ratio": reduction_ratio,
            "norm_layer": generator_norm,
            "act_layer": get_act_layer(act_layer),
        }
        if kernel_generator != "softmax":
            settings["kernel_init"] = kernel_init
        generator = kernel_generator if callable(kernel_generator) else _generator(kernel_generator, settings)
        settings |= {"group_channels": group_channels, "kernel_generator": generator}
        parts = _Parts(
            convolution=partial(nn.Conv2d, bias=False, **factory_kwargs),
            involution=partial(Involution2d, **settings, **factory_kwargs),
            norm=partial(norm, **factory_kwargs),
            act=partial(create_act_layer, act_layer, inplace=True),
        )
        if attention is not None:
            parts = parts._replace(involution=partial(_attention, factory_kwargs, group_channels, attention))
        self.stem = _stem(in_chans, stem_channels, stem_layer, stem_kernel_size, min(stem_stride, 2), parts)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        stem_info = {"num_chs": stem_channels, "reduction": min(stem_stride, 2), "module": "stem"}
        stages, stage_info = _stages(
            stem_channels, layers, channels, stem_stride, output_stride, kernel_size, drop_path_rate, parts
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_info: list[dict[str, Any]] = [stem_info, *stage_info]

        self.num_features = EXPANSION * channels[-1]
        self._make_head(global_pool, factory_kwargs)
        self.init_weights(zero_init_last)

    def _make_head(self, global_pool: str, factory_kwargs: dict[str, Any]) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, **factory_kwargs
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Samples every convolution's weights from He's normal distribution (fan out), and lets kernels begin as asked.

        Args:
            zero_init_last: zeroes the last norm's scale in every block.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif zero_init_last and isinstance(module, Bottleneck):
                module.zero_init_last()
        for module in self.modules():
            if isinstance(module, BottleneckGenerator):
                module.init_kernels()

    def load_pretrained(self, checkpoint_path: str | Path) -> None:
        """Fills the network with published weights; timm calls this for `pretrained=True`.

        Args:
            checkpoint_path: see `involution.zoo.checkpoints.load_published`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no weights, or others than this network's.
        """
        load_published(self, Path(checkpoint_path))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into groups from stem to head, for layer-wise learning rates.

        Args:
            coarse: a group for every stage instead of every block.
        """
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @overload
    def get_classifier(self, name_only: Literal[False] = False) -> nn.Module: ...
    @overload
    def get_classifier(self, name_only: Literal[True]) -> str: ...
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one.

        Args:
            num_classes: of the new classifier; 0 leaves it out.
            global_pool: as in the constructor; None keeps the present one.
        """
        some = next(self.parameters())
        self.num_classes = num_classes
        pool: str = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(pool, {"device": some.device, "dtype": some.dtype})
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            x = checkpoint_seq(stage, x)
            return x
        result: Tensor = stage(x)
        return result

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature levels, and the last one unpooled.

        Args:
            x: [N, in_chans, H, W].
            indices: an int takes the last so many of the five levels, a sequence those levels, None all.
            norm: accepted for timm; the levels have no norm left to apply.
            stop_early: leaves out the stages after the last level asked for.
            output_fmt: "NCHW".
            intermediates_only: returns the levels alone.

        Returns:
            (features, levels), or levels: each [N, C, ceil(H / reduction), ceil(W / reduction)].

        Raises:
            ValueError: another output_fmt, or a level that does not exist.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt must be "NCHW", got {output_fmt!r}')
        taken = _taken_levels(indices, len(self.feature_info))
        x = self.stem(x)
        levels = [x] if 0 in taken else []
        x = self.maxpool(x)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        for level, stage in enumerate(stages[: max(taken)] if stop_early else stages, start=1):
            x = self._run(stage, x)
            if level in taken:
                levels.append(x)
        return levels if intermediates_only else (x, levels)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the given feature levels do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: accepted for timm; there is no final norm.
            prune_head: removes pooling and classifier too, which also happens where the last stage goes.

        Returns:
            The levels' indices, counted from the first.

        Raises:
            ValueError: a level does not exist.
        """
        taken = _taken_levels(indices, len(self.feature_info))
        last = max(taken)
        for level in range(last + 1, len(self.feature_info)):
            setattr(self, f"layer{level}", nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        ends_sooner = last + 1 < len(self.feature_info)
        if ends_sooner:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or ends_sooner:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, ceil(H / output_stride), ceil(W / output_stride)]."""
        x = self.maxpool(self.stem(x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless `pre_logits`, the classifier: [N, num_features, h, w] -> [N, num_classes]."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _check_choice(name: str, value: int | str, choices: tuple[int | str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _norm_layer(name: str, value: Layer) -> Any:
    try:
        return get_norm_layer(value)
    except KeyError:
        wanted = "a norm's name in timm or its class" + (', or "rms"' if name == "generator_norm_layer" else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def _check_stages(layers: Sequence[int], channels: Sequence[int]) -> None:
    for name, values in (("layers", layers), ("channels", channels)):
        if len(values) != 4 or any(not isinstance(value, int) or value < 1 for value in values):
            raise ValueError(f"{name} must be four ints of at least 1, one for each stage, got {values!r}")


def _taken_levels(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Indices of feature levels in timm's notation, counted from the first level."""
    wanted = range(-count if indices is None else -indices, 0) if not isinstance(indices, Sequence) else indices
    if not wanted or any(not -count <= index < count for index in wanted):
        raise ValueError(
            f"indices must be None, an int from 1 to {count}, or ints from {-count} to {count - 1}, got {indices!r}"
        )
    return [index % count for index in wanted]


def _generator(name: str, settings: dict[str, Any]) -> Callable[..., nn.Module] | None:
    """What makes the generators of that name, as Involution2d takes it; None is its own, the plain bottleneck."""
    made = _GENERATORS[name]
    if not issubclass(made, BottleneckGenerator):
        return made
    return None if made is BottleneckGenerator else partial(made, **settings)


def _attention(
    factory_kwargs: dict[str, Any],
    group_channels: int | Literal["all"],
    relative_position: str,
    channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
) -> LocalSelfAttention2d:
    """In the place of an involution, with as many heads as that has groups."""
    heads = 1 if group_channels == "all" else channels // group_channels
    return LocalSelfAttention2d(channels, kernel_size, stride, dilation, heads, relative_position, **factory_kwargs)


def _stem(in_chans: int, channels: int, layer: str, kernel_size: int, stride: int, parts: _Parts) -> nn.Sequential:
    """3x3 convolution, involution at half the width, 3x3 convolution: the deep stem with its middle replaced."""
    half = channels // 2
    middle = (
        parts.involution(half, kernel_size) if layer == "involution" else parts.convolution(half, half, 3, padding=1)
    )
    modules = [
        ("conv1", parts.convolution(in_chans, half, 3, stride=stride, padding=1)),
        ("bn1", parts.norm(half)),
        ("act1", parts.act()),
        ("conv2", middle),
        ("bn2", parts.norm(half)),
        ("act2", parts.act()),
        ("conv3", parts.convolution(half, channels, 3, padding=1)),
        ("bn3", parts.norm(channels)),
        ("act3", parts.act()),
    ]
    return nn.Sequential(OrderedDict(modules))


def _stages(
    in_channels: int,
    layers: Sequence[int],
    channels: Sequence[int],
    reduction: int,
    output_stride: int,
    kernel_size: int,
    drop_path_rate: float,
    parts: _Parts,
) -> tuple[list[nn.Sequential], list[dict[str, Any]]]:
    """The four stages, and timm's record of each one's output."""
    stages, records = [], []
    dilation, block_index, last_index = 1, 0, sum(layers) - 1
    for index, (depth, width) in enumerate(zip(layers, channels, strict=True)):
        stride = 1 if index == 0 else 2
        # A stage that gives up its stride dilates from its second block on: its first still reads the former grid.
        first_dilation = dilation
        if reduction * stride > output_stride:
            stride, dilation = 1, dilation * stride
        reduction *= stride
        blocks = []
        for position in range(depth):
            blocks.append(
                Bottleneck(
                    in_channels,
                    width,
                    parts,
                    kernel_size,
                    stride=stride if position == 0 else 1,
                    dilation=first_dilation if position == 0 else dilation,
                    drop_path=drop_path_rate * block_index / last_index,
                )
            )
            in_channels = EXPANSION * width
            block_index += 1
        stages.append(nn.Sequential(*blocks))
        records.append({"num_chs": in_channels, "reduction": reduction, "module": f"layer{index + 1}"})
    return stages, records


def _cfg(**entries: Any) -> dict[str, Any]:
    """timm's record of a variant."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:2103.06255",
        "origin_url": "https://github.com/d-li14/involution",
        **entries,
    }


def _paddle_cfg(name: str) -> dict[str, Any]:
    """Of a variant whose weights PaddleClas publishes; `RedNet.load_pretrained` reads their format."""
    return _cfg(
        url=f"https://paddle-imagenet-models-name.bj.bcebos.com/dygraph/{name}_pretrained.pdparams",
        custom_load=True,
        license="apache-2.0",
        origin_url="https://github.com/PaddlePaddle/PaddleClas",
    )


def _cifar_cfg() -> dict[str, Any]:
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


default_cfgs = generate_default_cfgs(
    {
        "rednet26.paddle_in1k": _paddle_cfg("RedNet26"),
        "rednet38.paddle_in1k": _paddle_cfg("RedNet38"),
        "rednet50.paddle_in1k": _paddle_cfg("RedNet50"),
        "rednet101.paddle_in1k": _paddle_cfg("RedNet101"),
        "rednet152.paddle_in1k": _paddle_cfg("RedNet152"),
        "rednetv2_26": _cfg(),
        "rednetv2_38": _cfg(),
        "rednetv2_50": _cfg(),
        "rednetv2_101": _cfg(),
        "rednetv2_152": _cfg(),
        "rednet14_cifar": _cifar_cfg(),
        "rednet26_cifar": _cifar_cfg(),
        "rednetv2_14_cifar": _cifar_cfg(),
        "rednetv2_26_cifar": _cifar_cfg(),
    }
)


# Blocks in each stage, by the network's layers.
DEPTHS = {
    14: (1, 1, 1, 1),
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# A quarter of the width, except in the stem, whose involution needs one group of 16 channels.
_CIFAR = {"channels": (16, 32, 64, 128), "stem_channels": 32, "stem_stride": 1}
_V2 = {"generator_norm_layer": "rms"}


def _rednet(variant: str, pretrained: bool, **kwargs: Any) -> RedNet:
    try:
        model: RedNet = build_model_with_cfg(RedNet, variant, pretrained, **kwargs)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise RuntimeError(
            f"pretrained=True must download weights of {variant}, which failed: {error}. With the file at hand, "
            'pretrained_cfg_overlay={"file": "NAME.pdparams", "custom_load": True} takes it in their place; '
            "involution.zoo.pretrained() says where there are some"
        ) from error
    return model


@register_model
def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26; 9.23 M parameters."""
    return _rednet("rednet26", pretrained, **{"layers": DEPTHS[26], **kwargs})


@register_model
def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38; 12.39 M parameters."""
    return _rednet("rednet38", pretrained, **{"layers": DEPTHS[38], **kwargs})


@register_model
def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50; 15.54 M parameters."""
    return _rednet("rednet50", pretrained, **{"layers": DEPTHS[50], **kwargs})


@register_model
def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101; 25.65 M parameters."""
    return _rednet("rednet101", pretrained, **{"layers": DEPTHS[101], **kwargs})


@register_model
def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152; 33.98 M parameters."""
    return _rednet("rednet152", pretrained, **{"layers": DEPTHS[152], **kwargs})


@register_model
def rednetv2_26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26 with scale-invariant kernel generators; 9.23 M parameters."""
    return _rednet("rednetv2_26", pretrained, **{**_V2, "layers": DEPTHS[26], **kwargs})


@register_model
def rednetv2_38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38 with scale-invariant kernel generators; 12.39 M parameters."""
    return _rednet("rednetv2_38", pretrained, **{**_V2, "layers": DEPTHS[38], **kwargs})


@register_model
def rednetv2_50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50 with scale-invariant kernel generators; 15.54 M parameters."""
    return _rednet("rednetv2_50", pretrained, **{**_V2, "layers": DEPTHS[50], **kwargs})


@register_model
def rednetv2_101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101 with scale-invariant kernel generators; 25.65 M parameters."""
    return _rednet("rednetv2_101", pretrained, **{**_V2, "layers": DEPTHS[101], **kwargs})


@register_model
def rednetv2_152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152 with scale-invariant kernel generators; 33.98 M parameters."""
    return _rednet("rednetv2_152", pretrained, **{**_V2, "layers": DEPTHS[152], **kwargs})


@register_model
def rednet14_cifar(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """For images of 32x32: one block a stage, 64 to 512 channels, no downsampling in the stem; 10 classes."""
    return _rednet("rednet14_cifar", pretrained, **{**_CIFAR, "layers": DEPTHS[14], **kwargs})


@register_model
def rednet26_cifar(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """For images of 32x32: RedNet-26's depths, 64 to 512 channels, no downsampling in the stem; 10 classes."""
    return _rednet("rednet26_cifar", pretrained, **{**_CIFAR, "layers": DEPTHS[26], **kwargs})


@register_model
def rednetv2_14_cifar(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """rednet14_cifar with scale-invariant kernel generators."""
    return _rednet("rednetv2_14_cifar", pretrained, **{**_V2, **_CIFAR, "layers": DEPTHS[14], **kwargs})


@register_model
def rednetv2_26_cifar(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """rednet26_cifar with scale-invariant kernel generators."""
    return _rednet("rednetv2_26_cifar", pretrained, **{**_V2, **_CIFAR, "layers": DEPTHS[26], **kwargs})
