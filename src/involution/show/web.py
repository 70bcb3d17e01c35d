"""`involution show --web`: a page on this machine that shows an image's prediction and the kernels at a clicked pixel.

The only module that imports Gradio. Files that the page receives and sends are in a temporary folder, which is deleted
at the end; models are those of the command line, of timm and of the working directory's `runs`, never uploaded ones.
"""

import argparse
import os
import signal
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from ..engine.errors import EXPECTED, one_line
from ..engine.images import UnreadableImage, inspect, read_image
from ..zoo.resnet import counterpart
from .explore import Exploration, explore, explore_convolutions
from .mosaic import clicked, draw_mosaic, draw_preview
from .subject import subject

MAX_UPLOAD = "20mb"
MAX_PIXELS = 50_000_000  # of an image: a small file can decode to gigabytes
NONE = "none"
DEFAULT = "rednetv2_50"
Kept = tuple[Exploration, Exploration | None]  # the model's and its counterpart's


def main(arguments: Sequence[str]) -> None:
    """Runs the server until it is interrupted.

    Args:
        arguments: after the verb, without --web.

    Raises:
        FileNotFoundError: the model looks like a file that does not exist.
        ValueError: the model has no involution, or an image cannot be read.
        OSError: the port is taken.
        SystemExit: an argument is wrong (the message is on stderr).
    """
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that the folder is deleted
    with tempfile.TemporaryDirectory(prefix="involution-show-") as folder:
        page = build(options.model, options.images, Path(folder), options.pretrained)
        try:
            _, url, _ = launch(page, options.host, options.port)
            print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
            page.block_thread()
        finally:
            page.close(verbose=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="involution show --web",
        description="Serves a page on this machine: choose a model and an image, click a pixel, see its kernels.",
    )
    parser.add_argument("model", nargs="?", help="a checkpoint of involution fit, or a timm name; others are offered")
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="images that the page offers as examples")
    parser.add_argument("--pretrained", action="store_true", help="names' weights from timm, instead of random ones")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s; 0 takes a free one")
    return parser


def choices(model: str | None) -> list[str]:
    """The models offered: the given one, the best checkpoints below runs/, newest first, and RedNets by name."""
    files = sorted(Path("runs").glob("**/checkpoints/best.ckpt"), key=lambda file: -file.stat().st_mtime)
    names = [DEFAULT, *timm.list_models("rednet*")]
    return list(dict.fromkeys([*([model] if model else []), *map(str, files), *names]))


def examples(folder: Path) -> list[str]:
    """scikit-learn's two photographs and three of its digits, written to the folder."""
    pictures = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    digits = load_digits().images
    for index in (0, 4, 13):
        pictures[f"digit_{index}"] = Image.fromarray((digits[index] * 15.9375).astype("uint8")).convert("RGB")
    files = []
    for name, picture in pictures.items():
        files.append(str(folder / f"{name}.png"))
        picture.save(files[-1])
    return files


def build(model: str | None, images: Sequence[Path], folder: Path, pretrained: bool = False) -> Any:
    """The page, a gradio.Blocks that has not been launched.

    Args:
        model: chosen first, or None.
        images: the examples; without any, those of `examples`.
        folder: for all files of the page; Gradio reads it from the environment.
        pretrained: names have timm's weights.

    Raises:
        ValueError: the model has no involution, or an image cannot be read.
    """
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    import gradio

    given = [str(folder / f"example_{index}.png") for index in range(len(images))]
    for file, copy in zip(images, given, strict=True):
        read_image(file).save(copy)
    offered = choices(model)
    load = lru_cache(maxsize=4)(lambda name: subject(name, pretrained and not Path(name).is_file()))
    if model:
        load(model).layers()

    def run(name: str, other: str, file: str | None) -> tuple[Any, ...]:
        """A forward pass, and the kernels at the centre."""
        if file is None:
            return None, None, None, None, "Choose or upload an image."
        try:
            image = _checked(file)
            explored = explore(load(name), image)
            beside = None if other == NONE else explore_convolutions(load(other), image, explored.layers)
        except EXPECTED as error:
            raise gradio.Error(one_line(error).replace(f"{Path(file).parent}{os.sep}", ""), duration=None) from error
        pixel = image.width // 2, image.height // 2
        return (explored, beside), *_pictures((explored, beside), pixel), _text(explored, beside)

    def click(kept: Kept | None, event: gradio.SelectData) -> tuple[Any, ...]:
        """The kernels at the clicked pixel, from the maps that were kept."""
        if kept is None:
            raise gradio.Error("The page has forgotten this image: choose it again.")
        preview, _, mosaic = _pictures(kept, clicked(kept[0], *event.index))
        return preview, mosaic

    def counterparts(name: str) -> Any:
        return gradio.Dropdown(choices=[NONE, *_counterparts(name, offered)], value=NONE)

    with gradio.Blocks(title="involution", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown("# involution\nChoose a model and an image, then click a pixel: its kernels, in every layer.")
        kept = gradio.State(None, time_to_live=3600)
        with gradio.Row():
            with gradio.Column(min_width=300):
                name = gradio.Dropdown(offered, value=offered[0], label="Model or checkpoint", elem_id="model")
                beside = [NONE, *_counterparts(offered[0], offered)]
                other = gradio.Dropdown(beside, value=NONE, label="Convolutional counterpart", elem_id="counterpart")
                file = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam"],
                    label="Image",
                    height=240,
                    elem_id="upload",
                    buttons=[],
                )
                gradio.Examples(
                    [[one] for one in given or examples(folder)], [file], cache_examples=False, api_visibility="private"
                )
                scores = gradio.Label(num_top_classes=5, label="Prediction", elem_id="scores")
            with gradio.Column(min_width=300, scale=2):
                text = gradio.Markdown(elem_id="text")
                picture: dict[str, Any] = {"interactive": False, "format": "png", "show_label": False}
                preview = gradio.Image(**picture, label="Click a pixel", elem_id="preview", buttons=["download"])
                mosaic = gradio.Image(
                    **picture, label="Kernels at the pixel", elem_id="kernels", buttons=["download", "fullscreen"]
                )
        shown = [kept, preview, scores, mosaic, text]
        private: dict[str, Any] = {"api_visibility": "private"}
        name.change(counterparts, name, other, **private)
        for changed in (name, other, file):
            changed.change(run, [name, other, file], shown, **private)
        preview.select(click, kept, [preview, mosaic], show_progress="hidden", **private)
    return page


def launch(page: Any, host: str, port: int) -> tuple[Any, str, str]:
    """Starts the server without blocking; returns Gradio's app, the page's address and an empty string."""
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no font server
    launched: tuple[Any, str, str] = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        state_session_capacity=8,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=gradio.themes.Default(**fonts),
    )
    return launched


def _checked(file: str) -> Image.Image:
    """An uploaded image.

    Raises:
        UnreadableImage: it cannot be decoded, or has too many pixels.
    """
    width, height = inspect(Path(file)).size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"image must have at most {MAX_PIXELS:,} pixels, got {width}x{height}")
    return read_image(file)


def _counterparts(name: str, offered: Sequence[str]) -> list[str]:
    """The convolutional counterpart of a name, and the other checkpoints."""
    by_name = [counterpart(name.partition(".")[0])]
    return [one for one in by_name if one] + [one for one in offered if one != name and Path(one).is_file()]


def _pictures(kept: Kept, pixel: tuple[int, int]) -> tuple[Any, ...]:
    explored, beside = kept
    preview = draw_preview(explored, pixel)
    return preview, explored.prediction.scores, draw_mosaic(explored, pixel, beside)


def _text(explored: Exploration, beside: Exploration | None) -> str:
    lines = [f"**{explored.title}**, seen at {explored.view.size[0]}x{explored.view.size[1]}"]
    if "random weights" in explored.title:
        lines.append("The weights are random: the prediction means nothing.")
    if beside is not None:
        best = sorted(beside.prediction.scores.items(), key=lambda item: -item[1])[:3]
        lines.append(f"**{beside.title}**: " + ", ".join(f"{name} {score:.0%}" for name, score in best))
    return "\n\n".join(lines)
