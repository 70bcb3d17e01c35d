"""examples/yolo.py: trains, validates, fuses and exports; skipped where ultralytics is not installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from involution import Involution2d

pytest.importorskip("ultralytics")


@pytest.mark.slow
@pytest.mark.parametrize(("network", "count", "moved"), [("rednet", 11, 2), ("replace", 20, 19)])
def test_a_yolo_trains_fuses_and_exports(
    network: str, count: int, moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import yolo

    trained = yolo.main([network]).model
    involutions = [module for module in trained.modules() if isinstance(module, Involution2d)]
    assert len(involutions) == count
    # The epoch is one step: a span, which begins at zero, moves where a gradient reaches it. RedNet's blocks end in
    # norms that begin at zero, and the first convolution of YOLO11n sees almost none.
    spans = [one.involution.generator.span for one in trained.modules() if isinstance(one, yolo.InvolutionBlock)]
    assert sum(bool(span.weight.abs().max() > 0) for span in spans) >= moved
    assert not any(isinstance(module, yolo.Conv) and hasattr(module, "bn") for module in trained.modules())
    images = torch.rand(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(f"runs/yolo/{network}.onnx")
    with torch.no_grad():
        wanted = trained(images)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, rtol=1e-3, atol=1e-3)
