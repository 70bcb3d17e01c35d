"""The documentation runs: tutorials from beginning to end on tiny data, commands of every page, links between pages."""

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from involution.cli import main
from involution.engine.recipes import resolve_configs

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
TUTORIALS = sorted(page.stem for page in (DOCS / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

QUICK = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
ONE_STEP = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
ONE_STEP += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
LOADING = ["--data.batch_size", "2", "--data.num_workers", "0"]
# What makes a tutorial's commands small: options for fit, and for validate.
SMALL: dict[str, list[str]] = {
    "own-folder": ["--data.image_size", "32", "--data.resize", "32", "--model.model_name", "rednetv2_14_cifar"],
    "detector": [
        *("--data.min_size", "48", "--data.max_size", "64", "--data.train_min_sizes", "[48]"),
        *("--model.backbone", "rednetv2_26"),
    ],
    "masks": ["--data.resize", "32", "--data.crop", "32", "--model.backbone", "rednetv2_26"],
}


def picture(number: int, height: int = 40, width: int = 48) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def make_photos() -> None:
    for number in range(4):
        for split in ("train", "val"):
            save(picture(number), Path("photos", split, ("cat", "dog")[number % 2], f"{number}.jpg"))


def make_boxes() -> None:
    """Annotations of COCO's format, and a classifier's weights to begin with."""
    import timm

    import involution.zoo  # noqa: F401

    for split in ("train2017", "val2017"):
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "ball"}]}
        for number in range(1, 4):
            save(picture(number), Path("boxes", split, f"{number}.jpg"))
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 48, "height": 40})
            box = {"image_id": number, "category_id": 1, "bbox": [4, 6, 20, 24], "area": 480, "iscrowd": 0}
            content["annotations"].append({"id": number, **box})
        file = Path("boxes", "annotations", f"instances_{split}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    torch.save(timm.create_model("rednetv2_26", num_classes=3).state_dict(), "classifier.ckpt")


def make_scenes() -> None:
    for split in ("train", "val"):
        for number in range(3):
            mask = np.zeros((40, 48), np.uint8)
            mask[8:24, 8:24], mask[28:36, 4:40] = 1, 2
            save(picture(number), Path("scenes", "images", split, f"{number}.png"))
            save(Image.fromarray(mask), Path("scenes", "masks", split, f"{number}.png"))


def make_trained() -> None:
    """Photos, and a checkpoint of the tutorial that trains on them, untrained."""
    from command_line import saved

    from involution.tasks.classify import Classifier
    from involution.tasks.classify.preprocessing import Preprocessing

    make_photos()
    model = Classifier("rednetv2_14_cifar", 2)
    model.classes, model.preprocessing = ["cat", "dog"], Preprocessing(32, 36, (0.5,) * 3, (0.25,) * 3)
    folder = Path("runs", "imagefolder_rednet50", "version_0", "checkpoints")
    folder.mkdir(parents=True)
    saved(model, folder).rename(folder / "best.ckpt")


DATA: dict[str, Callable[[], None]] = {
    "own-folder": make_photos,
    "detector": make_boxes,
    "masks": make_scenes,
    "deploy": make_trained,
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of a page's runnable blocks."""
    return BLOCK.findall(page.read_text())


def commands(code: str) -> list[list[str]]:
    """The calls of `involution` in a shell block: their arguments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("involution ")]


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if name in DATA:
        DATA[name]()
    names: dict[str, Any] = {}
    found = blocks(DOCS / "tutorials" / f"{name}.md")
    assert found
    for language, code in found:
        if language == "python":
            exec(compile(code, f"{name}.md", "exec"), names)
        for verb, *arguments in commands(code) if language == "sh" else []:
            small = [*QUICK, *LOADING] if verb in ("fit", "validate", "test", "predict") else []
            small += [*ONE_STEP, *SMALL[name]] if verb in ("fit", "validate", "test") else []
            assert main([verb, *arguments, *small]) == 0, arguments
    for run in (file.parent for file in tmp_path.glob("runs/*/*/metrics.csv")):
        assert not (run / "checkpoints").is_dir() or (run / "curves.png").is_file(), run  # of fit, for every task


@pytest.mark.parametrize("page", ["family", "your-network"])
def test_code_of_a_page(page: str) -> None:
    names: dict[str, Any] = {}
    code = [code for language, code in blocks(DOCS / f"{page}.md") if language == "python"]
    assert code
    for block in code:
        exec(compile(block, f"{page}.md", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_recipes_that_exist(page: Path) -> None:
    for language, code in blocks(page):
        for verb, *arguments in commands(code) if language == "sh" else []:
            if verb in ("fit", "validate", "test") and "RECIPE" not in arguments:
                resolve_configs(arguments)


def anchors(page: Path) -> set[str]:
    """The headings of a page as its links name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


TEXTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *PAGES]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_files_that_a_text_names_exist(text: Path) -> None:
    named = re.findall(r"\b((?:tests|csrc|docs|examples|experiments|src)/[\w./-]*\w)", text.read_text())
    missing = {name for name in named if not (ROOT / name).exists() and not (text.parent / name).exists()}
    assert not missing


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_the_repository_stands_alone(text: Path) -> None:
    """No paths out of the repository, and no documents that only its authors have."""
    assert not re.search(r"\.\./shared|/work/|OPERATOR\.md|PUBLISHED\.md|DESIGN\.md|GLOSSARY\.md", text.read_text())


def test_the_warm_start_of_the_tips_is_what_the_command_prints() -> None:
    """From the shapes of timm's ResNet-50: the report does not depend on the weights."""
    import timm

    from involution.zoo import load_resnet

    page = (DOCS / "training-tips.md").read_text()
    model = timm.create_model("rednetv2_50", num_classes=10)
    report = str(load_resnet(model, timm.create_model("resnet50").state_dict()))
    assert report.partition(": ")[2] in page  # without the source's name


def test_the_migration_from_an_unfold_computes_the_same() -> None:
    from involution import involution2d

    n, channels, groups, h, w = 2, 32, 2, 9, 8
    x, kernel_map = torch.randn(n, channels, h, w), torch.randn(n, groups * 49, h, w)
    names: dict[str, Any] = {"F": torch.nn.functional, "involution2d": involution2d, "x": x, "kernel_map": kernel_map}
    names |= {"n": n, "channels": channels, "groups": groups, "h": h, "w": w}
    results = []
    for _, code in blocks(DOCS / "migration.md")[:2]:
        exec(code, names)
        results.append(names.pop("y"))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert len(results) == 2


@pytest.mark.parametrize(
    "name", ["", ".nn", ".zoo", ".rewrite", ".cost", ".tasks.classify", ".tasks.detect", ".tasks.segment"]
)
def test_the_reference_has_every_public_name(name: str) -> None:
    package = importlib.import_module(f"involution{name}")
    reference = set(re.findall(r"^\.\. auto\w+:: .*?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    modules = {public for public in package.__all__ if isinstance(getattr(package, public), ModuleType)}
    assert set(package.__all__) - modules - {"__version__"} <= reference
