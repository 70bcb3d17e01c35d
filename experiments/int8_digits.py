"""Static quantisation by onnxruntime of a network exported to ONNX, and its accuracy on the digits before and after.

    involution fit -c digits_rednet
    python experiments/int8_digits.py runs/digits_rednet/version_0/checkpoints/best.ckpt

prints the table of docs/deploy.md. Ranges of activations are the minima and maxima over training images, without
augmentation; accuracy is on the test images. Weights are int8, activations uint8.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from involution.cli import main as involution
from involution.tasks.classify import Digits

CONVOLUTIONS = ("Conv", "Gemm", "MatMul")


class Images(CalibrationDataReader):
    """Batches of images for a network whose input is called images."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantise(file: Path, result: Path, batches: Iterator[np.ndarray], operators: Sequence[str] | None) -> None:
    """Writes the int8 network; operators None quantises all that onnxruntime can."""
    prepared = result.with_suffix(".prepared.onnx")
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        result,
        Images(batches),
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def accuracy(file: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images whose largest logit is the label's."""
    session = onnxruntime.InferenceSession(str(file))
    [logits] = session.run(["logits"], {"images": images})
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    """Exports, quantises twice, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of involution fit -c digits_rednet")
    parser.add_argument("--calibration", type=int, default=256, help="number of training images")
    options = parser.parse_args()
    data = Digits()
    data.setup("test")
    normalise = data.test_set.transform
    seen, images = (normalise(one.images).numpy() for one in (data.train_set, data.test_set))
    labels = data.test_set.labels.numpy()
    batches = np.split(seen[: options.calibration], range(32, options.calibration, 32))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "float.onnx"
        if involution(["export", options.checkpoint, "--to", "onnx", "--output", str(exported)]):
            raise SystemExit(1)
        print(f"| network | test accuracy, {len(labels)} images | file |\n|---|---|---|")
        files = {"float32": exported}
        for name, operators in (("int8 convolutions", CONVOLUTIONS), ("int8 throughout", None)):
            files[name] = Path(folder) / f"{name}.onnx"
            quantise(exported, files[name], iter(batches), operators)
        for name, file in files.items():
            print(f"| {name} | {accuracy(file, images, labels):.2%} | {file.stat().st_size / 1024:.0f} KiB |")


if __name__ == "__main__":
    main()
