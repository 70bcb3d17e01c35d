"""RedNet: ResNet with involutions in the bottlenecks and the stem (Li et al., CVPR 2021, section 3.2).

Importing this module registers with timm:

- rednet26, 38, 50, 101 and 152, the paper's networks. `pretrained=True` downloads PaddleClas's weights for them (see
  `involution.zoo.pretrained`). The others have no published weights: there it raises timm's RuntimeError.
- rednetv2_26 to rednetv2_152, with kernel generators that do not depend on their input's scale: they train at any
  depth.
- rednet14_cifar, rednet26_cifar, rednetv2_14_cifar and rednetv2_26_cifar, for images of 32x32.
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
from ..nn.norms import norm_act
from .checkpoints import load_published

__all__ = ["RedNet"]  # timm adds the entry points' names

# Their shape checks are Python control flow, which torch.fx cannot trace.
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
EXPANSION = 4  # ratio of a bottleneck's output channels to its width


class _Factories(NamedTuple):
    """Callables that construct the layers of stem and blocks with a network's settings."""

    convolution: Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size, stride=1, padding=0)
    involution: Callable[..., nn.Module]  # (channels, kernel_size, stride=1, dilation=1)
    norm: Callable[[int], nn.Module]
    act: Callable[[], nn.Module]


class NormActSequential(nn.Sequential):
    """nn.Sequential that runs a batch norm and the ReLU behind it as one operator (`involution.nn.norms`)."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Sequential's."""
        modules = list(self)
        while modules:
            module = modules.pop(0)
            joined = isinstance(module, nn.BatchNorm2d) and modules and isinstance(modules[0], nn.ReLU)
            input = norm_act(input, module, modules.pop(0) if joined else None)
        return input


class Bottleneck(nn.Module):
    """ResNet's bottleneck with an involution in place of the 3x3 convolution: 1x1, involution, 1x1, plus the shortcut.

    The shortcut is a strided 1x1 convolution and a norm if the shape changes, else the identity.

    Args:
        in_channels: of the input.
        width: of the involution; the output has 4 times as many channels.
        make: constructs its convolutions, involutions, norms and activations.
        kernel_size: of the involution.
        stride: of the involution and of the shortcut.
        dilation: of the involution.
        drop_path: stochastic depth: the probability of skipping the residual branch of a sample in training.

    Shapes: [N, in_channels, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        make: _Factories,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = make.convolution(in_channels, width, 1)
        self.bn1 = make.norm(width)
        self.act1 = make.act()
        self.conv2 = make.involution(width, kernel_size, stride=stride, dilation=dilation)
        self.bn2 = make.norm(width)
        self.act2 = make.act()
        self.conv3 = make.convolution(width, out_channels, 1)
        self.bn3 = make.norm(out_channels)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = make.convolution(in_channels, out_channels, 1, stride=stride)
            self.downsample = NormActSequential(projection, make.norm(out_channels))
        self.act3 = make.act()

    def zero_init_last(self) -> None:
        """Zero-initialises the last norm's scale, so that the block starts as its shortcut."""
        if getattr(self.bn3, "weight", None) is not None:
            nn.init.zeros_(self.bn3.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        branch = norm_act(self.conv1(x), self.bn1, self.act1)
        branch = self.conv3(norm_act(self.conv2(branch), self.bn2, self.act2))
        shortcut = self.downsample(x)
        if isinstance(self.drop_path, nn.Identity):
            return norm_act(branch, self.bn3, self.act3, shortcut)
        result: Tensor = self.act3(self.drop_path(self.bn3(branch)) + shortcut)
        return result


class RedNet(nn.Module):
    """RedNet (paper, section 3.2), with the interface of timm's ResNet.

    Args:
        layers: number of blocks in each of the four stages.
        channels: the bottlenecks' width in each stage, as in timm's ResNet; a stage's output has 4 times as many.
        num_classes: of the classifier; 0 for none.
        in_chans: channels of the image.
        output_stride: 8, 16 or 32; stages that would exceed it have dilated involutions instead of a stride.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        kernel_size: of the bottlenecks' involutions.
        group_channels: channels that share a kernel; must divide every width and stem_channels / 2; or "all".
        reduction_ratio: of bottleneck kernel generators.
        kernel_generator: "bottleneck", "linear", "context", "position" or "softmax" (the generators of
            `involution.nn`), or a callable as in `Involution2d`.
        attention: replaces every involution by local self-attention over the same window (section 3.3), with one head
            per `group_channels` channels and relative positions "none", "bias" or "factorised"; None keeps involutions.
        stem_channels: of the stem's output.
        stem_layer: the middle layer of the stem: "involution", or "convolution" (3x3, for comparison).
        stem_kernel_size: of the stem's involution: 3 (classification) or 7 (the paper's dense prediction).
        stem_stride: 4 (strided convolution and max pooling), 2 (strided convolution) or 1 (neither).
        norm_layer: timm's name of a norm or its class, for the network and its kernel generators.
        generator_norm_layer: the kernel generators' norm; None takes `norm_layer`, "l2" the default of
            `BottleneckGenerator`, an L2 norm over channels.
        kernel_init: the initial kernels, "identity", "box", "paper" or a callable, see `BottleneckGenerator`; ignored
            by attention, softmax and generators that are not bottlenecks.
        act_layer: timm's name of an activation or its class, for the network and its kernel generators.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, with a linear rule from 0 at the first block to this rate at the last.
        zero_init_last: zero-initialise each block's last norm, so that it starts as its shortcut.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: [N, in_chans, H, W] -> [N, num_classes], for any H and W; feature levels have ceil(H / reduction) rows.

    Raises:
        TypeError: kernel_generator is a module, which all layers would share.
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
        _check_min("num_classes", num_classes, 0)
        _check_min("in_chans", in_chans, 1)
        _check_choice("output_stride", output_stride, (8, 16, 32))
        _check_choice("stem_layer", stem_layer, ("involution", "convolution"))
        if stem_layer == "convolution" and stem_kernel_size != 3:
            raise ValueError(f"stem_kernel_size must be 3 for a convolution in the stem, got {stem_kernel_size!r}")
        _check_choice("stem_kernel_size", stem_kernel_size, (3, 7))
        _check_choice("stem_stride", stem_stride, (1, 2, 4))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        factory_kwargs: dict[str, Any] = {
            name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None
        }
        make = _factories(
            group_channels,
            reduction_ratio,
            kernel_generator,
            attention,
            norm_layer,
            generator_norm_layer,
            kernel_init,
            act_layer,
            factory_kwargs,
        )
        self.stem = _stem(in_chans, stem_channels, stem_layer, stem_kernel_size, min(stem_stride, 2), make)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        stem_info = {"num_chs": stem_channels, "reduction": min(stem_stride, 2), "module": "stem"}
        stages, stage_info = _stages(
            stem_channels, layers, channels, stem_stride, output_stride, kernel_size, drop_path_rate, make
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
        """Initialises convolutions by Kaiming normal (fan out), and kernel generators by `kernel_init`.

        Args:
            zero_init_last: zero-initialise the last norm's scale in every block.
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
        """Regular expressions that group parameters from stem to head, for layer-wise learning rates.

        Args:
            coarse: one group per stage instead of per block.
        """
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing: recompute each block in backward instead of saving its activations."""
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
            num_classes: of the new classifier; 0 for none.
            global_pool: as in the constructor; None keeps the current one.
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
        """Forward pass that returns feature levels, as in timm.

        Args:
            x: [N, in_chans, H, W].
            indices: an int n takes the last n of the five levels, a sequence those levels, None all.
            norm: for timm's interface; there is no final norm.
            stop_early: skip the stages after the last requested level.
            output_fmt: "NCHW".
            intermediates_only: return only the levels.

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
        """Removes the layers that the given feature levels do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: for timm's interface; there is no final norm.
            prune_head: remove pooling and classifier; implied if the last stage is removed.

        Returns:
            The levels' indices, non-negative.

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
        wanted = "a norm's name in timm or its class" + (', or "l2"' if name == "generator_norm_layer" else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None


def _check_min(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def _check_stages(layers: Sequence[int], channels: Sequence[int]) -> None:
    for name, values in (("layers", layers), ("channels", channels)):
        if len(values) != 4 or any(not isinstance(value, int) or value < 1 for value in values):
            raise ValueError(f"{name} must be four ints of at least 1, one for each stage, got {values!r}")


def _taken_levels(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """timm's `indices` of feature levels, as non-negative ints."""
    wanted = range(-count if indices is None else -indices, 0) if not isinstance(indices, Sequence) else indices
    if not wanted or any(not -count <= index < count for index in wanted):
        raise ValueError(
            f"indices must be None, an int from 1 to {count}, or ints from {-count} to {count - 1}, got {indices!r}"
        )
    return [index % count for index in wanted]


def _factories(
    group_channels: int | Literal["all"],
    reduction_ratio: int,
    kernel_generator: str | Callable[..., nn.Module],
    attention: str | None,
    norm_layer: Layer,
    generator_norm_layer: Layer | None,
    kernel_init: KernelInit,
    act_layer: Layer,
    factory_kwargs: dict[str, Any],
) -> _Factories:
    """The callables that construct a network's layers; arguments as in `RedNet`."""
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
    norm = _norm_layer("norm_layer", norm_layer)
    generator_norm = norm
    if generator_norm_layer is not None:
        is_default = generator_norm_layer == "l2"
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
    make = _Factories(
        convolution=partial(nn.Conv2d, bias=False, **factory_kwargs),
        involution=partial(Involution2d, **settings, **factory_kwargs),
        norm=partial(norm, **factory_kwargs),
        act=partial(create_act_layer, act_layer, inplace=True),
    )
    if attention is not None:
        make = make._replace(involution=partial(_attention, factory_kwargs, group_channels, attention))
    return make


def _generator(name: str, settings: dict[str, Any]) -> Callable[..., nn.Module] | None:
    """The `kernel_generator` argument of Involution2d for a name; None for the bottleneck, its default."""
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
    """Local self-attention with the arguments of an involution, and as many heads as that has groups."""
    heads = 1 if group_channels == "all" else channels // group_channels
    return LocalSelfAttention2d(channels, kernel_size, stride, dilation, heads, relative_position, **factory_kwargs)


def _stem(in_chans: int, channels: int, layer: str, kernel_size: int, stride: int, make: _Factories) -> nn.Sequential:
    """ResNet's deep stem of three 3x3 convolutions, the second of which, at half the width, is an involution."""
    half = channels // 2
    middle = make.involution(half, kernel_size) if layer == "involution" else make.convolution(half, half, 3, padding=1)
    modules = [
        ("conv1", make.convolution(in_chans, half, 3, stride=stride, padding=1)),
        ("bn1", make.norm(half)),
        ("act1", make.act()),
        ("conv2", middle),
        ("bn2", make.norm(half)),
        ("act2", make.act()),
        ("conv3", make.convolution(half, channels, 3, padding=1)),
        ("bn3", make.norm(channels)),
        ("act3", make.act()),
    ]
    return NormActSequential(OrderedDict(modules))


def _stages(
    in_channels: int,
    layers: Sequence[int],
    channels: Sequence[int],
    reduction: int,
    output_stride: int,
    kernel_size: int,
    drop_path_rate: float,
    make: _Factories,
) -> tuple[list[nn.Sequential], list[dict[str, Any]]]:
    """The four stages, and timm's feature_info of each one."""
    stages, records = [], []
    dilation, block_index, last_index = 1, 0, sum(layers) - 1
    for index, (depth, width) in enumerate(zip(layers, channels, strict=True)):
        stride = 1 if index == 0 else 2
        # A stage without its stride dilates from its second block on, as timm's ResNet does.
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
                    make,
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
    """timm's record of a variant whose weights PaddleClas publishes; `RedNet.load_pretrained` reads their format."""
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
# A quarter of the width, but the stem's involution needs a group of 16 channels.
_CIFAR = {"channels": (16, 32, 64, 128), "stem_channels": 32, "stem_stride": 1}
_V2 = {"generator_norm_layer": "l2"}


def _rednet(variant: str, pretrained: bool, **kwargs: Any) -> RedNet:
    try:
        model: RedNet = build_model_with_cfg(RedNet, variant, pretrained, **kwargs)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise RuntimeError(
            f"pretrained=True must download weights of {variant}, which failed: {error}. If you have the file, pass "
            'pretrained_cfg_overlay={"file": "NAME.pdparams", "custom_load": True}; '
            "involution.zoo.pretrained() lists the files that are published"
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
