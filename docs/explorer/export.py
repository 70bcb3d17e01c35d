"""Writes network.onnx and network.json of the explorer page from a checkpoint of the digits.

    python docs/explorer/export.py runs/digits_rednet/version_0/checkpoints/best.ckpt

Every involution's kernels are outputs of the ONNX file. network.json says where they lie on the image, and holds ten
test scans of scikit-learn's digits.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from involution.engine.checkpoints import load_module
from involution.export.programs import to_onnx, trace
from involution.show.layers import each_call, involutions
from involution.show.view import jump
from involution.tasks.classify import Digits

HERE = Path(__file__).parent
SIZE = 32


class WithKernels(nn.Module):
    """A network that also returns the kernel map of every involution: logits, and one [1, G, K, K, H, W] per layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of images [1, 3, H, W]."""
        maps: list[Tensor] = []

        def use(name: str, layer: Any, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
            maps.append(kernel_map)

        with each_call(involutions(self.network), use):
            logits = self.network(images)
        return logits, *maps


def layers(network: nn.Module) -> list[dict[str, Any]]:
    """Name, kernel size, stride, dilation, groups and `jump` (see show.view) of every involution, in their order."""
    found: list[dict[str, Any]] = []

    def use(name: str, layer: Any, x: Tensor, kernel_map: Tensor, output: Tensor) -> None:
        facts = {"name": name, "kernel": layer.kernel_size[0], "stride": layer.stride[0], "dilation": layer.dilation[0]}
        size = {"groups": kernel_map.shape[1], "size": kernel_map.shape[-1], "jump": jump(SIZE, x.shape[-1])}
        found.append(facts | size)

    with each_call(involutions(network), use), torch.no_grad():
        network(torch.zeros(1, 3, SIZE, SIZE))
    return found


def examples(data: Digits) -> list[str]:
    """The first test scan of every digit: base64 of 32x32 grey bytes."""
    data.setup("test")
    images, labels = data.test_set.images, data.test_set.labels
    scans = [images[int((labels == digit).nonzero()[0, 0]), 0] for digit in range(10)]
    return [base64.b64encode((255 * scan).round().byte().numpy().tobytes()).decode() for scan in scans]


def main(checkpoint: Path, folder: Path = HERE) -> None:
    """Writes both files to a folder."""
    module: Any = load_module(checkpoint).eval()
    network = module.net.to(memory_format=torch.contiguous_format)
    outputs = ["logits", *involutions(network)]
    file = folder / "network.onnx"
    to_onnx(trace(WithKernels(network).eval(), torch.rand(1, 3, SIZE, SIZE), dynamic=()), file, outputs)
    strip(file)
    given = module.preprocessing
    content = {
        "classes": list(module.classes),
        "layers": layers(network),
        "size": SIZE,
        "mean": given.mean[0],
        "std": given.std[0],
        "examples": examples(Digits()),
    }
    (folder / "network.json").write_text(json.dumps(content) + "\n")
    print(f"wrote {file}, {file.stat().st_size / 1000:.0f} kB, and network.json beside it")


def strip(file: Path) -> None:
    """Removes the exporter's notes on where each node came from: paths of this machine, of more bytes than weights."""
    model = onnx.load(file)
    model.ClearField("metadata_props")
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("value_info")
    onnx.save(model, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
