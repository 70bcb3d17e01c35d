"""`involution show --web` in a real browser: load, upload, click, errors; and what its server refuses."""

import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import WIDTHS, is_shown, opened
from PIL import Image

from involution import cli

MODEL = "rednet14_cifar"


def test_a_missing_gradio_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert cli.main(["show", "--web"]) == 1
    assert "show --web needs gradio, not installed here: pip install 'involution[web]'" in capsys.readouterr().err


class Served:
    """A page, its folder for files, and the working directory that it must leave alone."""

    def __init__(self, folder: Path) -> None:
        from involution.show.web import build, launch

        self.folder, self.elsewhere = folder / "files", folder / "elsewhere"
        for place in (self.folder, self.elsewhere):
            place.mkdir()
        Image.new("RGB", (60, 40), "green").save(folder / "given.jpg")
        os.chdir(self.elsewhere)
        self.page = build(MODEL, [folder / "given.jpg"], self.folder)
        _, url, _ = launch(self.page, "127.0.0.1", 0)
        self.url = url.rstrip("/")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="no tests of the web page: gradio is not installed")
    before, environment = Path.cwd(), dict(os.environ)
    server = Served(tmp_path_factory.mktemp("web"))
    yield server
    server.page.close(verbose=False)
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def upload(page: Any, file: Path) -> None:
    page.wait_for_selector("#upload input[type=file]", state="attached")
    page.set_input_files("#upload input[type=file]", file)


def source(page: Any, selector: str) -> str:
    return str(page.locator(f"{selector} img").get_attribute("src"))


@pytest.mark.parametrize("width", WIDTHS)
def test_upload_and_click(width: str, served: Served, chromium: Any, photo: Path) -> None:
    with opened(chromium, served.url, width) as page:
        upload(page, photo)
        page.wait_for_selector("#kernels img")
        assert "class" in page.inner_text("#scores")
        assert f"{MODEL} (random weights)" in page.inner_text("#text")
        before = source(page, "#kernels")
        page.locator("#preview img").click(position={"x": 30, "y": 20})
        page.wait_for_function("old => document.querySelector('#kernels img').getAttribute('src') != old", arg=before)
        pictures = [picture_at(url) for url in (before, source(page, "#kernels"))]
        assert pictures[0].size == pictures[1].size
        assert np.abs(np.subtract(*(np.asarray(one.convert("L"), float) for one in pictures))).max() > 50
        assert is_shown(page, "#kernels img")


def picture_at(url: str) -> Image.Image:
    with urllib.request.urlopen(url) as answer:
        return Image.open(answer).copy()


def test_a_broken_file_is_an_error_and_the_page_lives_on(
    served: Served, chromium: Any, photo: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:1000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    with opened(chromium, served.url, "desktop") as page:
        for file, words in ((broken, "broken.png cannot be read as an image"), (text, "cannot identify image file")):
            upload(page, file)
            page.get_by_text(words).first.wait_for()
            page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
            page.wait_for_selector("#upload input[type=file]", state="attached")
        upload(page, photo)
        page.wait_for_selector("#kernels img")


def test_the_counterpart_is_drawn_beside(served: Served, chromium: Any) -> None:
    with opened(chromium, served.url, "desktop") as page:
        page.locator(".gallery button, .gallery-item").first.click()  # the example
        page.wait_for_selector("#kernels img")
        alone = source(page, "#kernels")
        page.locator("#counterpart input").click()
        page.get_by_role("option", name="resnet14_cifar").click()
        page.wait_for_function("old => document.querySelector('#kernels img').getAttribute('src') != old", arg=alone)
        assert "resnet14_cifar (random weights)" in page.inner_text("#text")
        assert picture_at(source(page, "#kernels")).height > 1.5 * picture_at(alone).height


def test_a_click_does_not_run_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from involution.show import mosaic
    from involution.show.explore import explore
    from involution.show.subject import subject

    model = subject(MODEL)
    explored = explore(model, Image.new("RGB", (40, 40)))
    monkeypatch.setattr(type(model.network), "forward", lambda *_: pytest.fail("the network ran"))
    mosaic.draw_mosaic(explored, mosaic.clicked(explored, 100, 100))


def status(url: str, data: bytes | None = None, kind: str = "application/json") -> int:
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_is_local_and_serves_no_other_files(served: Served) -> None:
    assert served.url.startswith("http://127.0.0.1:")
    assert status(served.url) == 200
    secret = served.elsewhere / "secret.txt"
    secret.write_text("secret")
    try:
        for path in (secret, Path("/etc/passwd"), Path(__file__)):
            assert status(f"{served.url}/gradio_api/file={path}") in (403, 404)
    finally:
        secret.unlink()


def test_a_large_upload_is_refused(served: Served) -> None:
    edge = "boundary"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body = head + bytes(21_000_000) + f"\r\n--{edge}--\r\n".encode()
    assert status(f"{served.url}/gradio_api/upload", body, f"multipart/form-data; boundary={edge}") == 413


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    from involution.engine.images import UnreadableImage
    from involution.show.web import _checked

    Image.new("1", (10_000, 5_001)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match="at most 50,000,000 pixels, got 10000x5001"):
        _checked(str(tmp_path / "bomb.png"))


def test_the_page_has_no_telemetry_and_its_functions_no_public_names(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/config") as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    assert all(one["api_visibility"] == "private" for one in config["dependencies"] if one["targets"])


def test_nothing_is_written_outside_of_the_temporary_folder(served: Served) -> None:
    """After the tests above."""
    assert not list(served.elsewhere.iterdir())
