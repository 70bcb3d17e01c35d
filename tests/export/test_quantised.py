"""int8: onnxruntime's static quantisation takes an exported network."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from involution.export import to_onnx, trace
from involution.zoo.rednet import RedNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as exported."""
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    network = RedNet((1, 1, 1, 1), (16, 16, 16, 16), 5, kernel_size=3, stem_channels=32, zero_init_last=False).eval()
    to_onnx(trace(network, torch.randn(2, 3, 32, 32)), folder / "float.onnx", ["logits"])
    return folder / "float.onnx"


@pytest.mark.parametrize("operators", [["Conv", "Gemm"], None], ids=["convolutions", "all"])
def test_a_network_in_int8(file: Path, operators: list[str] | None, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self, images: np.ndarray) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter([{"images": images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    images = torch.randn(8, 3, 32, 32).numpy()
    quantize_static(file, tmp_path / "int8.onnx", Batches(images), op_types_to_quantize=operators, per_channel=True)
    kept = {one.name: one.data_type for one in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    weights = [name for name in kept if name.endswith("weight_quantized")]
    assert weights
    assert all(kept[name] == onnx.TensorProto.INT8 for name in weights)
    wanted, found = (
        onnxruntime.InferenceSession(str(one)).run(None, {"images": images})[0]
        for one in (file, tmp_path / "int8.onnx")
    )
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
