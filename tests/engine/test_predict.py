"""`involution predict`: a checkpoint and images."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image, ImageOps

from involution.cli import main
from involution.engine import predict as predict_module
from involution.engine.command import run
from involution.engine.data import TaskData
from involution.engine.module import TaskModule
from involution.engine.writer import PredictionWriter
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained for two steps on three classes of photographs."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        for name in ("cat", "cow", "dog"):
            (folder / split / name).mkdir(parents=True)
            image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 50, 3), dtype=np.uint8))
            image.save(folder / split / name / "0.png")
    small = ["--data.root", str(folder), "--data.image_size", "32", "--data.resize", "36", "--data.num_workers", "0"]
    model = ["--model.model_name", "rednet14_cifar", "--trainer.max_epochs", "1", "--trainer.num_sanity_val_steps", "0"]
    run(["fit", "-c", "imagefolder_rednet50", *small, *model, *QUIET, "--trainer.default_root_dir", str(folder)])
    return folder / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(["b.png", "a.JPG", "more/c.png", "more/d.png"]):
        size = (60 + index, 40, 3)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(checkpoint: Path, path: Path, output: Path, *options: str) -> int:
    where = ["--ckpt_path", str(checkpoint), "--data.predict_path", str(path), "--output", str(output)]
    where += ["--data.num_workers", "0"] if "--data.num_workers" not in options else []
    return main(["predict", *where, *QUIET, *options])


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_folder_gives_the_most_probable_classes_of_every_image(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(checkpoint, photographs, out, "--data.batch_size", "3", "--top_k", "2") == 0
    rows = table(out / "predictions.csv")
    files = [photographs / name for name in ("a.JPG", "b.png", "more/c.png", "more/d.png")]
    assert [row["image"] for row in rows] == [str(file) for file in files for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    model = Classifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    assert model.classes == ["cat", "cow", "dog"]
    assert (model.preprocessing.image_size, model.preprocessing.resize) == (32, 36)
    with torch.no_grad():
        probabilities = model(torch.stack([model.read(file) for file in files])).softmax(dim=1)
    values, indices = probabilities.topk(2, dim=1)
    assert [row["class"] for row in rows] == [model.classes[i] for i in indices.flatten()]
    assert [float(row["probability"]) for row in rows] == pytest.approx(values.flatten().tolist(), abs=1e-4)
    shown = capsys.readouterr().out
    assert "predictions.csv" in shown
    assert "top 2" in shown
    assert not (out / "predictions.png").exists()


def test_a_file_and_a_grid(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    assert predict(checkpoint, photographs / "b.png", tmp_path / "out", "--grid", "9") == 0
    rows = table(tmp_path / "out" / "predictions.csv")
    assert sorted(row["class"] for row in rows) == ["cat", "cow", "dog"]
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=2e-4)
    one = Image.open(tmp_path / "out" / "predictions.png")
    assert predict(checkpoint, photographs, tmp_path / "out", "--grid", "9", "--grid_columns", "3") == 0
    four = Image.open(tmp_path / "out" / "predictions.png")
    assert four.size == (3 * one.width, 2 * one.height)
    assert len(np.unique(np.asarray(four))) > 200  # of the photographs, which are noise


def test_preprocessing_is_that_of_validation(checkpoint: Path, tmp_path: Path) -> None:
    """Prediction reads an image as the validation set does."""
    from involution.tasks.classify import ImageFolder

    root = checkpoint.parents[2]
    data = ImageFolder(str(root), image_size=32, resize=36)
    data.setup("validate")
    model = Classifier.load_from_checkpoint(checkpoint, map_location="cpu")
    torch.testing.assert_close(model.read(Path(data.val_set.samples[0][0])), data.val_set[0][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no checkpoint", "ckpt_path must be a checkpoint, got"),
        ("an image as checkpoint", "ckpt_path must be a checkpoint of involution fit, got"),
        ("weights as checkpoint", "ckpt_path must be a checkpoint of involution fit, got"),
        ("no module class", "ckpt_path must name its module class under involution.module, got"),
        (
            "an unknown module class",
            "ckpt_path must name a module class that is installed here, got 'involution.origami.Folder' in",
        ),
        ("a class of another kind", "ckpt_path must name a subclass of TaskModule, got 'torch.nn.Linear' in"),
        ("no images", "data.predict_path must be an image or a folder of images, got"),
        ("an empty folder", "data.predict_path must hold images"),
        ("a broken image", r"broken.jpg cannot be read as an image"),
        ("an image as output", "File exists"),
    ],
)
def test_errors_name_what_is_wrong(
    what: str, message: str, checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, other, empty, broken = (tmp_path / name for name in ("weights.pt", "other.ckpt", "empty", "broken.jpg"))
    torch.save({"weight": torch.zeros(3)}, weights)
    contents = {
        "no module class": {"task": "classify"},
        "an unknown module class": {"module": "involution.origami.Folder"},
        "a class of another kind": {"module": "torch.nn.Linear"},
    }
    torch.save({"involution": contents.get(what)}, other)
    empty.mkdir()
    broken.write_bytes(b"no image")
    path = {"no images": tmp_path / "nowhere", "an empty folder": empty, "a broken image": broken}.get(
        what, photographs
    )
    out = photographs / "b.png" if what == "an image as output" else tmp_path / "out"
    file = {
        "no checkpoint": tmp_path / "nowhere.ckpt",
        "an image as checkpoint": photographs / "b.png",
        "weights as checkpoint": weights,
        **dict.fromkeys(contents, other),
    }.get(what, checkpoint)
    assert predict(file, path, out) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("involution predict: ")


def test_an_image_is_decoded_once_with_its_picture(
    checkpoint: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a picture shows it; its cell is the photograph itself."""
    opened: list[Path] = []
    original = predict_module.read_image

    def read(file: Path) -> Image.Image:
        opened.append(file)
        return original(file)

    monkeypatch.setattr(predict_module, "read_image", read)
    assert predict(checkpoint, photographs, tmp_path, "--grid", "3", "--grid_columns", "2") == 0
    assert sorted(opened) == [photographs / name for name in ("a.JPG", "b.png", "more/c.png", "more/d.png")]
    grid = Image.open(tmp_path / "predictions.png").convert("RGB")
    assert grid.size == (2 * 192, 2 * (192 + 16 * 3 + 4))
    cell = ImageOps.contain(Image.open(photographs / "b.png"), (188, 188))
    left, top = 192 + (192 - cell.width) // 2, (192 - cell.height) // 2
    assert np.array_equal(grid.crop((left, top, left + cell.width, top + cell.height)), cell)


class Sums(Classifier):
    """A task of one's own: classifies as its base does, and writes sums of pixels."""

    class Writer(PredictionWriter):
        def __init__(self, folder: Path, files: Sequence[Path]) -> None:
            super().__init__(folder, files)
            self.sums: dict[int, int] = {}

        def add(self, index: int, output: torch.Tensor, pixels: torch.Tensor | None) -> None:
            assert pixels is not None
            self.sums[index] = int(pixels.sum())

        def close(self) -> None:
            (self.folder / "sums.txt").write_text(" ".join(str(self.sums[index]) for index in sorted(self.sums)))

    def writer(self, folder: Path, files: Sequence[Path]) -> PredictionWriter:  # type: ignore[override]
        return self.Writer(folder, files)


def test_a_checkpoint_names_its_module_class(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    """Of a task that is in no table: predict imports it and uses its own writer."""
    assert torch.load(checkpoint)["involution"]["module"] == "involution.tasks.classify.module.Classifier"
    model = Sums("rednet14_cifar", 3)
    model.preprocessing = Preprocessing(32, 36, (0.5,) * 3, (0.5,) * 3)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert predict(tmp_path / "mine.ckpt", photographs / "more", tmp_path / "out") == 0
    want = [int(np.asarray(Image.open(file)).sum()) for file in sorted((photographs / "more").iterdir())]
    assert (tmp_path / "out" / "sums.txt").read_text() == " ".join(map(str, want))


def test_a_task_without_the_contracts_methods_cannot_be_instantiated() -> None:
    class Unfinished(TaskModule):
        pass

    missing = r"collate.*diagnose.*predict_step.*unlabelled.*writer"
    with pytest.raises(TypeError, match=missing):
        Unfinished(2, True)  # type: ignore[abstract]
    with pytest.raises(TypeError, match="setup"):
        type("NoData", (TaskData,), {})(1, 0)


def test_a_broken_image_among_others_can_be_skipped(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(RuntimeWarning, match=r"skipped: .*broken\.jpg"):
        code = predict(checkpoint, photographs, tmp_path, "--data.on_error", "skip", "--data.batch_size", "3")
    assert code == 0
    rows = table(tmp_path / "predictions.csv")
    assert [Path(row["image"]).name for row in rows[::3]] == ["a.JPG", "b.png", "c.png", "d.png"]
    assert "skipped 1 of 5 files" in capsys.readouterr().out


def test_results_before_an_error_are_kept(
    checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "bad.jpg").write_bytes(b"no image")  # the third of five, each a batch
    assert predict(checkpoint, photographs, tmp_path, "--data.batch_size", "1") == 1
    assert "bad.jpg cannot be read as an image" in capsys.readouterr().err
    kept = {Path(row["image"]).name for row in table(tmp_path / "predictions.csv")}
    assert {"a.JPG"} <= kept <= {"a.JPG", "b.png"}  # Lightning reads a batch ahead


def test_workers_do_not_change_the_order(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (40 + index, 40), (index, 99, 0)).save(photographs / f"{index}.png")
    assert predict(checkpoint, photographs, tmp_path / "none") == 0
    assert predict(checkpoint, photographs, tmp_path / "two", "--data.num_workers", "2", "--data.batch_size", "2") == 0
    one, two = (table(tmp_path / folder / "predictions.csv") for folder in ("none", "two"))
    assert [(row["image"], row["class"]) for row in one] == [(row["image"], row["class"]) for row in two]


@pytest.mark.parametrize("option", [["--top_k", "0"], ["--data.batch_size", "0"], ["--data.on_error", "shrug"]])
def test_options_are_checked_before_anything_runs(
    option: list[str], checkpoint: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        predict(checkpoint, photographs, tmp_path / "out", *option)
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_a_recipe_is_refused(checkpoint: Path, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        predict(checkpoint, photographs, tmp_path, "-c", "digits_rednet")
    assert caught.value.code == 2
