"""RedNet, and involutions in place of convolutions, in YOLO networks of the package ultralytics.

    pip install ultralytics
    python examples/yolo.py rednet        a network from a YAML: RedNet's features, involutions in the head
    python examples/yolo.py replace       YOLO11n with involutions in place of its 3x3 convolutions

Trains an epoch on a few drawn rectangles, validates, fuses, and exports to ONNX, under runs/yolo/. For data of your own
pass their YAML: `python examples/yolo.py rednet --data my.yaml --epochs 100 --imgsz 640`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv

import involution.zoo
from involution import Involution2d
from involution.export import to_onnx, trace
from involution.rewrite import replace

# The import above registers RedNet with timm.
assert involution.zoo

REDNET = {
    "nc": 2,
    "backbone": [
        [-1, 1, "RedNetFeatures", ["rednetv2_26"]],  # 0
        [0, 1, "Index", [512, 0]],  # 1: stride 8
        [0, 1, "Index", [1024, 1]],  # 2: stride 16
        [0, 1, "Index", [2048, 2]],  # 3: stride 32
        [-1, 1, "Conv", [128, 1, 1]],
        [-1, 1, "SPPF", [128, 5]],  # 5
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "Conv", [128, 1, 1]],
        [-1, 1, "InvolutionBlock", [128]],  # 9: stride 16
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 1], 1, "Concat", [1]],
        [-1, 1, "Conv", [128, 1, 1]],
        [-1, 1, "InvolutionBlock", [128]],  # 13: stride 8
        [[13, 9, 5], 1, "Detect", ["nc"]],
    ],
}


class RedNetFeatures(nn.Module):
    """RedNet's features as a list, of which ultralytics' Index takes one: strides 8, 16 and 32.

    Shapes: [N, 3, H, W] -> [N, 512, H/8, W/8], [N, 1024, H/16, W/16], [N, 2048, H/32, W/32].
    """

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.body = timm.create_model(name, pretrained, features_only=True, out_indices=(2, 3, 4))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The three feature levels."""
        levels: list[Tensor] = self.body(images)
        return levels


class InvolutionBlock(nn.Module):
    """Involution, batch norm and activation: ultralytics' Conv, but for the weight that it folds the norm into.

    Shapes: [N, channels, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, channels: int, kernel_size: int = 7, stride: int = 1) -> None:
        super().__init__()
        self.involution = Involution2d(channels, kernel_size, stride)
        self.bn = nn.BatchNorm2d(channels)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)]."""
        result: Tensor = self.act(self.bn(self.involution(x)))
        return result


# A YAML names classes that ultralytics' own module knows.
tasks.RedNetFeatures, tasks.InvolutionBlock = RedNetFeatures, InvolutionBlock


def with_involutions(network: nn.Module, **options: Any) -> nn.Module:
    """Replaces 3x3 convolutions in place. A Conv whose convolution was replaced becomes an InvolutionBlock.

    ultralytics folds norms into `Conv.conv.weight`; an involution has none, so that no Conv may hold one.
    """
    print(replace(network, **options))
    for name, block in list(network.named_modules()):
        if isinstance(block, Conv) and isinstance(block.conv, Involution2d):
            made = InvolutionBlock(block.bn.num_features)
            made.involution, made.bn, made.act = block.conv, block.bn, block.act
            for key in ("i", "f", "type", "np"):  # a layer's place in the network
                if hasattr(block, key):
                    setattr(made, key, getattr(block, key))
            network.set_submodule(name, made)
    return network


class ReplacingTrainer(DetectionTrainer):
    """Trains the network of a YAML with involutions: ultralytics builds the network anew when training begins."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """The network, with the weights of a checkpoint where there is one."""
        model = with_involutions(super().get_model(cfg, None, verbose))
        if weights:
            model.load(weights)
        return model


def rectangles(folder: Path, count: int = 8, size: int = 64) -> Path:
    """Writes grey images with a light or a dark rectangle, in ultralytics' layout; returns their YAML."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            label, (x, y), (w, h) = number % 2, random.integers(2, 26, 2), random.integers(16, 32, 2)
            pixels = random.integers(96, 160, (size, size, 3), dtype=np.uint8)
            pixels[y : y + h, x : x + w] = 255 * label
            for kind, suffix in (("images", "png"), ("labels", "txt")):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                file = folder / kind / split / f"{number}.{suffix}"
                if kind == "images":
                    Image.fromarray(pixels).save(file)
                else:
                    box = np.array([x + w / 2, y + h / 2, w, h]) / size
                    file.write_text(f"{label} {' '.join(f'{value:.4f}' for value in box)}\n")
    described = folder / "rectangles.yaml"
    described.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: [dark, light]\n")
    return described


def export(yolo: YOLO, file: Path, size: int) -> None:
    """Writes an ONNX file of standard operators: [N, 3, size, size] -> boxes and scores [N, 4 + classes, anchors]."""
    network = yolo.model.float().eval().fuse(verbose=False)
    for module in network.modules():
        if hasattr(module, "export"):
            module.export, module.format = True, "onnx"  # the head's one tensor of boxes and scores
    to_onnx(trace(network, torch.rand(1, 3, size, size), dynamic=()), file, ["detections"])


def main(arguments: list[str] | None = None) -> YOLO:
    """Trains, validates, fuses and exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("rednet", "replace"))
    parser.add_argument("--data", help="ultralytics' YAML of a data set; default: drawn rectangles")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--imgsz", type=int, default=64)
    options = parser.parse_args(arguments)
    folder = Path("runs/yolo")
    data = options.data or rectangles(folder / "rectangles")
    named = "yolo11n.yaml"
    if options.network == "rednet":
        import yaml

        named = str(folder / "rednet.yaml")
        Path(named).write_text(yaml.safe_dump(REDNET))
    yolo = YOLO(named, task="detect")
    settings: dict[str, Any] = {"data": str(data), "imgsz": options.imgsz, "plots": False, "workers": 0}
    trainer = ReplacingTrainer if options.network == "replace" else None
    yolo.train(trainer=trainer, epochs=options.epochs, project=str(folder.resolve()), name="run", amp=False, **settings)
    found = yolo.val(**settings)
    print(f"mAP50-95 {found.box.map:.3f}")
    export(yolo, folder / f"{options.network}.onnx", options.imgsz)
    return yolo


if __name__ == "__main__":
    main()
