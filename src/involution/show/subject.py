"""What is shown: the network of a checkpoint or of a timm name, and how an image runs through it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from .. import zoo as zoo  # registers our models with timm
from ..engine.checkpoints import load_module
from ..tasks.detect import Detector
from ..zoo.checkpoints import checkpoint_or_name
from .layers import Call, Layer, Statistics, each_call, involutions
from .view import View, preprocess


class Run(NamedTuple):
    """An image's way through a network: the input [1, 3, H, W], the view of the image that it is, and the output."""

    input: Tensor
    view: View
    output: Any


class Subject(NamedTuple):
    """A network in evaluation mode; `run` runs an image through it.

    With gradients enabled, the input is a leaf that requires them. `module` is a checkpoint's Lightning module.
    """

    title: str
    network: nn.Module
    run: Callable[[Image.Image], Run]
    module: Any = None

    def layers(self) -> dict[str, Layer]:
        """Its involutions by name.

        Raises:
            ValueError: it has none.
        """
        found = involutions(self.network)
        if not found:
            raise ValueError(f"model must have involutions, got {self.title}, which has none")
        return found

    def of_regions(self) -> set[str]:
        """The layers that run on regions of interest, whose positions are not the image's."""
        heads = {name for name, module in self.network.named_modules() if isinstance(module, RoIHeads)}
        return {name for name in self.layers() if any(name.startswith(f"{head}.") for head in heads)}

    def calls(self, image: Image.Image, chosen: list[str]) -> tuple[list[Call], Run]:
        """Runs an image.

        Returns:
            The calls of all involutions in the order of execution, those of chosen layers with kernel map and output;
            and the run.
        """
        calls: list[Call] = []
        regions = self.of_regions()

        def use(name: str, layer: Any, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
            number = sum(call.name == name for call in calls)
            sizes = (x.shape[2], x.shape[3]), (output.shape[2], output.shape[3])
            kept = (kernel_map[0], output[0]) if name in chosen else (None, None)
            groups, values = kernel_map.shape[1], Statistics.of(kernel_map)
            calls.append(Call(name, layer, number, *sizes, groups, values, name in regions, *kept))

        with each_call(self.layers(), use):
            run = self.run(image)
        return calls, run


def subject(model: str, pretrained: bool = False) -> Subject:
    """The network of a checkpoint of `involution fit`, of any task, or of a name of timm's.

    Args:
        model: the file or the name. A name's weights are random, from seed 0.
        pretrained: download a name's weights instead.

    Raises:
        FileNotFoundError: model looks like a file, but there is none.
        ValueError: model is neither, or the checkpoint cannot be read.
    """
    file = checkpoint_or_name(model, pretrained)
    return _of_name(model, pretrained) if file is None else _of_checkpoint(file)


def _of_name(name: str, pretrained: bool) -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=pretrained).eval().requires_grad_(False)
    transform = create_transform(**resolve_model_data_config(network))
    return Subject(f"{name} ({'pretrained' if pretrained else 'random weights'})", network, runner(network, transform))


def _of_checkpoint(file: Path) -> Subject:
    module: Any = load_module(file, "model")
    module.eval().requires_grad_(False)
    run = _detection_runner(module) if isinstance(module, Detector) else runner(module, module.evaluation)
    return Subject(f"{file.name} ({type(module).__name__}, {module.hparams['model_name']})", module.net, run, module)


def runner(network: nn.Module, transform: Any) -> Callable[[Image.Image], Run]:
    """Runs images through a network after a torchvision Compose, see `preprocess`."""

    def run(image: Image.Image) -> Run:
        x, view = preprocess(transform, image)
        batch = x.unsqueeze(0).requires_grad_(torch.is_grad_enabled())
        return Run(batch, view, network(batch))

    return run


def _detection_runner(module: Detector) -> Callable[[Image.Image], Run]:
    """A detector resizes, normalises and pads images itself: its network's input is what its transform returns."""

    def run(image: Image.Image) -> Run:
        caught: list[Any] = []

        def hook(_: nn.Module, __: Any, output: tuple[Any, Any]) -> None:
            output[0].tensors = output[0].tensors.detach().requires_grad_(torch.is_grad_enabled())
            caught.append(output[0])

        handle = module.net.transform.register_forward_hook(hook)
        try:
            output = module([module.evaluation(image)])
        finally:
            handle.remove()
        height, width = caught[0].image_sizes[0]
        view = View((width / image.width, height / image.height), (0.0, 0.0), (width, height))
        return Run(caught[0].tensors, view, output)

    return run


def receptive_field(output: Tensor, x: Tensor, column: int, row: int) -> Tensor:
    """The effective receptive field of an output position (Luo et al. 2016).

    Args:
        output: [C, Ho, Wo], computed from x with gradients.
        x: the network's input, [1, 3, H, W].
        column: of the position.
        row: of the position.

    Returns:
        [H, W]: the sum over x's channels of the absolute gradient of the position's sum over channels.
    """
    [gradient] = torch.autograd.grad(output[:, row, column].sum(), x, retain_graph=True)
    return gradient[0].abs().sum(0)
