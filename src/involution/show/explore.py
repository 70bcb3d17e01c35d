"""One forward pass of an image, kept: its prediction, and the kernels of every involution at any pixel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from ..tasks.detect import Detector
from ..tasks.detect.evaluation import detections
from ..tasks.detect.predictions import drawn
from ..tasks.segment import Segmenter
from ..tasks.segment.predictions import overlay
from .subject import Run, Subject
from .view import Box, Grid, View

MIN_SCORE = 0.5  # of the detections that are drawn
Pixel = tuple[int, int]  # x, y


class Prediction(NamedTuple):
    """What a network says about an image.

    `scores` are class -> probability (classifier), best score (detector) or share of the pixels (segmenter); `picture`
    is the image, with boxes and masks drawn into it.
    """

    scores: dict[str, float]
    picture: Image.Image


class Layer(NamedTuple):
    """An involution's call, or a convolution, with the kernels that are shown.

    `kernels` are [G, Kh, Kw, Ho, Wo]; a convolution's, the same at every position, are [G, Kh, Kw].
    """

    title: str
    name: str
    grid: Grid
    kernels: Tensor

    def position(self, view: View, pixel: Pixel) -> Pixel:
        """The output position (column, row) nearest to the centre of a pixel of the image."""
        return self.grid.position(*view.to_input(pixel[0] + 0.5, pixel[1] + 0.5))

    def footprint(self, view: View, pixel: Pixel) -> Box:
        """The box in the image that the kernel at a pixel covers."""
        return view.to_image(self.grid.footprint(*self.position(view, pixel)))

    def at(self, view: View, pixel: Pixel) -> Tensor:
        """The kernels at a pixel of the image, [G, Kh, Kw]."""
        if self.kernels.dim() == 3:
            return self.kernels
        column, row = self.position(view, pixel)
        return self.kernels[..., row, column]


class Exploration(NamedTuple):
    """An image after its forward pass through a network: the layers in the order of execution, and the prediction."""

    title: str
    image: Image.Image
    view: View
    layers: Sequence[Layer]
    prediction: Prediction


def explore(model: Subject, image: Image.Image) -> Exploration:
    """Runs an image through a network and keeps the kernel maps of all involutions that run on the image.

    Raises:
        ValueError: the network has no involution.
    """
    regions = model.of_regions()
    chosen = [name for name in model.layers() if name not in regions]
    with torch.no_grad():
        calls, run = model.calls(image, chosen)
    size = (run.input.shape[2], run.input.shape[3])
    layers = []
    for call in calls:
        if call.kernel_map is None:
            continue
        repeated = sum(other.name == call.name for other in calls) > 1
        name = f"{call.name}, call {call.number}" if repeated else call.name
        grid = Grid.of(call.layer, size, call.input_size, call.output_size)
        layers.append(Layer(f"{name}: {call.kernel}", call.name, grid, call.kernel_map))
    return Exploration(model.title, image, run.view, layers, predict(model, image, run))


def explore_convolutions(model: Subject, image: Image.Image, like: Sequence[Layer]) -> Exploration:
    """Runs an image through a network's convolutional counterpart.

    Args:
        model: whose convolutions have the names of the network's involutions.
        image: as given to `explore`.
        like: the network's layers. Of each convolution of the same name as many filters are kept, those of largest
            norm over all pairs of output and input channel.
    """
    groups = {layer.name: len(layer.kernels) for layer in like}
    found = {
        name: module
        for name, module in model.network.named_modules()
        if name in groups and isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }
    sizes: dict[str, Any] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sizes.setdefault(name, (tuple(args[0].shape[2:]), tuple(output.shape[2:])))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in found.items()]
    try:
        with torch.no_grad():
            run = model.run(image)
    finally:
        for handle in handles:
            handle.remove()
    size = (run.input.shape[2], run.input.shape[3])
    layers = []
    for name, module in found.items():
        filters = module.weight.detach().flatten(0, 1)
        strongest = filters.flatten(1).norm(dim=1).topk(min(groups[name], len(filters))).indices
        title = f"{name}: {'x'.join(map(str, module.kernel_size))} convolution, the same at every pixel"
        layers.append(Layer(title, name, Grid.of(module, size, *sizes[name]), filters[strongest]))
    return Exploration(model.title, image, run.view, layers, predict(model, image, run))


def predict(model: Subject, image: Image.Image, run: Run) -> Prediction:
    """The prediction of a run: see `Prediction`."""
    if isinstance(model.module, Detector):
        return _detected(model.module, image, run.output)
    if isinstance(model.module, Segmenter):
        return _segmented(model.module, image, run.output)
    names = _class_names(model, run.output.shape[1])
    best = run.output[0].softmax(0).topk(min(5, len(names)))
    scores = {names[index]: value for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
    return Prediction(scores, image)


def _class_names(model: Subject, count: int) -> list[str]:
    """A checkpoint's classes; ImageNet's for a thousand of a name's, with a number where two are called the same."""
    if model.module is not None:
        return list(model.module.classes)
    if count != 1000:
        return [f"class {index}" for index in range(count)]
    names = ImageNetInfo()
    titles = [names.index_to_description(index).partition(",")[0] for index in range(count)]
    return [f"{title} ({index})" if titles.count(title) > 1 else title for index, title in enumerate(titles)]


def _detected(module: Detector, image: Image.Image, output: list[dict[str, Tensor]]) -> Prediction:
    found = detections(output[0])
    scores: dict[str, float] = {}
    for one in found:
        name = module.classes[one["label"] - 1]
        scores[name] = max(scores.get(name, 0.0), one["score"])
    shown = [one for one in found if one["score"] >= MIN_SCORE]
    return Prediction(scores, drawn(pil_to_tensor(image), shown, module.classes))


def _segmented(module: Segmenter, image: Image.Image, logits: Tensor) -> Prediction:
    """Of the whole image, without sliding window, scales and flip."""
    mask = F.interpolate(logits, (image.height, image.width), mode="bilinear").argmax(1)[0].byte()
    counts = torch.bincount(mask.flatten().long(), minlength=len(module.classes)) / mask.numel()
    order = counts.argsort(descending=True).tolist()
    scores = {module.classes[index]: counts[index].item() for index in order if counts[index] > 0}
    picture = overlay(pil_to_tensor(image), mask, module.classes, module.palette, 0.5)
    return Prediction(scores, picture.crop((0, 0, *image.size)))
