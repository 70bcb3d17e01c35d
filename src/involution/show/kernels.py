"""Pictures of the kernels that involution layers generate, in the style of the paper's Figure 4."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .layers import Layer, each_call, involutions


def catch_kernel_maps(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Runs the model on a batch in evaluation mode and records the kernel maps that its layers generate.

    Args:
        model: contains Involution2d or LocalSelfAttention2d layers; its training mode is restored afterwards.
        images: the model's input, [N, C, H, W].
        layers: names as in model.named_modules(), in the order wanted; None takes all.

    Returns:
        name -> kernel map [N, G, Kh, Kw, Ho, Wo], detached.

    Raises:
        ValueError: a name is not that of such a layer, or the model has none.
        RuntimeError: a layer did not run.
    """
    found = involutions(model)
    wanted = list(found) if layers is None else list(layers)
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise ValueError(f"layers must be of {', '.join(found) or 'a model with involutions'}, got {unknown}")
    caught: dict[str, Tensor] = {}

    def keep(name: str, layer: Layer, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
        caught[name] = kernel_map

    was_training = model.training
    try:
        with each_call({name: found[name] for name in wanted}, keep), torch.no_grad():
            model.eval()(images)
    finally:
        model.train(was_training)
    silent = [name for name in wanted if name not in caught]
    if silent:
        raise RuntimeError(f"these layers did not run: {', '.join(silent)}")
    return {name: caught[name] for name in wanted}


def kernel_heat(kernel_map: Tensor) -> Tensor:
    """The sum of each kernel's K x K weights: [N, G, Kh, Kw, Ho, Wo] -> [N, G, Ho, Wo]."""
    return kernel_map.sum(dim=(2, 3))


def draw_kernels(images: Tensor, heats: Mapping[str, Tensor], file: Path, title: str = "") -> Figure:
    """Draws a column per image and, below the images, a row per group of each layer (paper, Figure 4).

    Every row has its own colour scale, since groups differ in range: from the 2nd to the 98th percentile over all
    images, so that a few extreme positions do not dominate it.

    Args:
        images: [N, 3, H, W] or [N, 1, H, W], in 0..1.
        heats: layer name -> [N, G, Ho, Wo], from `kernel_heat`.
        file: the picture; its folder is created.
        title: above everything.

    Returns:
        The figure, already saved.

    Raises:
        ValueError: a layer's heat map has another number of images.
    """
    count = len(images)
    for name, heat in heats.items():
        if heat.dim() != 4 or len(heat) != count:
            raise ValueError(f"heats[{name!r}] must be [{count}, G, H, W] for {count} images, got {list(heat.shape)}")
    rows = [(name, group) for name, heat in heats.items() for group in range(heat.shape[1])]
    figure = Figure(figsize=(0.95 * count + 1.9, 0.95 * (len(rows) + 1) + 0.5), dpi=120, layout="constrained")
    if title:
        figure.suptitle(title)
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, image in zip(axes[0], images.cpu(), strict=True):
        axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    _label(axes[0, 0], "image")
    for row, (name, group) in zip(axes[1:], rows, strict=True):
        heat = heats[name][:, group].float().cpu()
        low, high = heat.quantile(torch.tensor([0.02, 0.98])).tolist()
        for axis, one in zip(row, heat, strict=True):
            axis.imshow(one.numpy(), cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        _label(row[0], f"{name}\n{heat.shape[1]}x{heat.shape[2]}, group {group}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return figure


def _label(axis: object, text: str) -> None:
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)  # type: ignore[attr-defined]
