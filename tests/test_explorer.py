"""The explorer: docs/explorer's page without a server, its network against PyTorch, and the page in a browser."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from browsing import WIDTHS, is_shown, opened
from command_line import saved
from PIL import Image

from involution.nn import BottleneckGenerator
from involution.show import catch_kernel_maps
from involution.show.layers import involutions
from involution.show.view import Grid
from involution.tasks.classify import Classifier, Digits

FOLDER = Path(__file__).parents[1] / "docs" / "explorer"
BUILT = FOLDER.parent / "_build" / "html" / "explorer"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_exported_network_has_the_kernels_of_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"channels": [16, 16, 16, 16], "stem_channels": 32, "group_channels": 8}
    module = Classifier("rednetv2_14_cifar", 10, model_kwargs=options)
    for layer in module.modules():
        if isinstance(layer, BottleneckGenerator):
            torch.nn.init.normal_(layer.span.weight, std=0.1)
    module.preprocessing = Digits.preprocessing
    script("export").main(saved(module, tmp_path), tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    x = torch.randn(1, 3, 32, 32)
    logits, *maps = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(logits, module.eval()(x).detach().numpy(), rtol=1e-3, atol=1e-4)
    wanted = catch_kernel_maps(module.net, x)
    content = json.loads((tmp_path / "network.json").read_text())
    assert [one.name for one in session.get_outputs()[1:]] == list(wanted)
    assert [layer["name"] for layer in content["layers"]] == list(wanted)
    for kernels, (name, kernel_map), facts in zip(maps, wanted.items(), content["layers"], strict=True):
        np.testing.assert_allclose(kernels, kernel_map.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
        assert kernels.shape == (1, facts["groups"], *[facts["kernel"]] * 2, *[facts["size"]] * 2)
        assert involutions(module.net)[name].stride == (facts["stride"],) * 2


def test_the_network_of_the_page_knows_digits() -> None:
    """On the 360 scans that no training saw. The file is small, and has no path of the machine that wrote it."""
    file = FOLDER / "network.onnx"
    assert file.stat().st_size < 500_000
    assert b"/work" not in file.read_bytes()
    session = onnxruntime.InferenceSession(file)
    data = Digits()
    data.setup("test")
    images, labels = zip(*(data.test_set[index] for index in range(len(data.test_set))), strict=True)
    found = [session.run(["logits"], {"images": image[None].numpy()})[0].argmax() for image in images]
    assert np.mean(np.array(found) == np.array([int(label) for label in labels])) > 0.97


@pytest.fixture(scope="module")
def built() -> str:
    if not (BUILT / "ort-wasm.js").is_file():
        pytest.skip("no explorer page: make docs builds it, where onnxruntime-web can be fetched from npm")
    script("build").main(BUILT)  # the present files; the runtime is there
    return (BUILT / "index.html").as_uri()


def network() -> dict[str, Any]:
    """What the page knows of its network."""
    content: dict[str, Any] = json.loads((FOLDER / "network.json").read_text())
    return content


def kernels(page: Any) -> list[str]:
    """The pictures of all kernels."""
    return list(page.evaluate("[...document.querySelectorAll('#kernels canvas')].map((one) => one.toDataURL())"))


@pytest.mark.parametrize(("width", "scheme"), zip(WIDTHS, ("light", "dark"), strict=True))
def test_the_page_as_a_file(width: str, scheme: str, built: str, chromium: Any, tmp_path: Path) -> None:
    """Load, click, upload, a broken file, download."""
    with opened(chromium, built, width, color_scheme=scheme) as page:
        page.wait_for_selector("#kernels canvas")
        assert page.inner_text("#scores div:first-child").startswith("3")
        before = kernels(page)
        assert len(before) == sum(
            layer["groups"] for layer in json.loads((FOLDER / "network.json").read_text())["layers"]
        )
        page.locator("#image").click(position={"x": 100, "y": 60})
        after = kernels(page)
        assert len(after) == len(before)
        assert not set(after) & set(before)
        assert is_shown(page, "#kernels canvas >> nth=0")

        (tmp_path / "broken.png").write_text("no picture")
        page.set_input_files("#file", tmp_path / "broken.png")
        page.wait_for_function("document.querySelector('#status').textContent.includes('broken.png cannot be read')")
        assert kernels(page) == after
        Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "grey.png")
        page.set_input_files("#file", tmp_path / "grey.png")
        page.wait_for_function("document.querySelector('#status').textContent.includes('ms for the network')")
        assert kernels(page) != after
        with page.expect_download() as download:
            page.click("#save")
        with Image.open(download.value.path()) as picture:
            assert picture.format == "PNG"
            assert picture.width >= 320


def test_the_pages_kernels_are_those_of_the_file(built: str, chromium: Any) -> None:
    """onnxruntime in WebAssembly against onnxruntime here, and the page's geometry against `show.view`."""
    content = network()
    session = onnxruntime.InferenceSession(FOLDER / "network.onnx")
    with opened(chromium, built, "desktop") as page:
        page.wait_for_selector("#kernels canvas")
        plane = (np.array(page.evaluate("[...grey]"), np.float32) / 255 - content["mean"]) / content["std"]
        images = np.broadcast_to(plane.reshape(1, 1, 32, 32), (1, 3, 32, 32)).astype(np.float32)
        maps = dict(
            zip([one.name for one in session.get_outputs()], session.run(None, {"images": images}), strict=True)
        )
        for layer in content["layers"]:
            sizes = [(value, value) for value in (layer["kernel"], layer["stride"], layer["dilation"])]
            grid = Grid(*sizes, (layer["jump"],) * 2, (layer["size"],) * 2)
            for x, y in ((0, 31), (13, 18), (30, 7)):
                column, row = grid.position(x + 0.5, y + 0.5)
                place = f"layers.find((one) => one.name == '{layer['name']}')"
                assert page.evaluate(f"[{x}, {y}].map((one) => position({place}, one))") == [column, row]
                left, top, right, bottom = grid.footprint(column, row)
                assert page.evaluate(f"footprint({place}, {column})") == pytest.approx([left, right - left])
                assert page.evaluate(f"footprint({place}, {row})") == pytest.approx([top, bottom - top])
                got = page.evaluate(f"kernelAt({place}, {layer['groups'] - 1}, {column}, {row})")
                wanted = maps[layer["name"]][0, -1, :, :, row, column]
                np.testing.assert_allclose(got, wanted.flatten(), rtol=1e-3, atol=1e-4)


def test_without_the_runtime_the_page_says_so(chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = script("build")

    def fails(folder: Path) -> None:
        raise FileNotFoundError("npm")

    monkeypatch.setattr(builder, "fetch", fails)
    builder.main(tmp_path)
    with opened(chromium, (tmp_path / "index.html").as_uri(), "phone") as page:
        assert "onnxruntime-web is missing" in page.inner_text("#status")
