import csv
import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image

from involution.cli import main
from involution.engine.command import run
from involution.engine.recipes import recipes
from involution.tasks.classify import Classifier

QUICK = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SHORT = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "4"]
FIT = ["fit", "-c", "digits_resnet", *QUICK, *SHORT]
IMAGENET = [f"imagenet_{family}{depth}" for family in ("rednet", "resnet") for depth in (26, 38, 50, 101, 152)]


def write_tree(root):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


def test_every_classification_recipe_is_tested_below():
    """The detectors' are tested in detect/test_detector.py."""
    assert {name for name, file in recipes().items() if file.parts[-3] == "classify"} == {
        "cifar10_rednet26",
        "cifar10_resnet26",
        "digits_rednet",
        "digits_resnet",
        "imagefolder_rednet50",
        "imagenet_rednet50_modern",
        *IMAGENET,
    }


@pytest.mark.parametrize("name", ["digits_rednet", "digits_resnet"])
def test_digits_recipe(name):
    assert main(["fit", "-c", name, *QUICK, "--trainer.fast_dev_run", "true", "--data.batch_size", "8"]) == 0


@pytest.mark.parametrize("name", ["cifar10_rednet26", "cifar10_resnet26"])
def test_cifar10_recipe(name, tmp_path):
    """On 40 images in the npz files' format; test_data.py reads the real ones."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(stream, "JPEG")
    jpeg = np.frombuffer(stream.getvalue(), np.uint8)
    arrays = {"header": np.zeros(0, np.uint8), "data": np.tile(jpeg, 40), "offsets": np.arange(41) * len(jpeg)}
    np.savez(tmp_path / "train.npz", **arrays, labels=np.arange(40, dtype=np.uint8) % 10)
    small = ["--data.root", str(tmp_path), "--data.val_size", "10", "--data.batch_size", "8", "--data.num_workers", "0"]
    assert main(["fit", "-c", name, *QUICK, *small, "--trainer.fast_dev_run", "true"]) == 0


def test_imagefolder_recipe(tmp_path):
    root = write_tree(tmp_path / "images")
    small = ["--data.root", str(root), "--data.image_size", "64", "--data.num_workers", "0"]
    cli = run(["fit", "-c", "imagefolder_rednet50", *QUICK, *small, "--trainer.fast_dev_run", "true"])
    assert cli.model.num_classes == 2  # taken from the folders


def test_the_printed_command_evaluates(tmp_path, capsys):
    """Without a folder of test images it validates."""
    root = write_tree(tmp_path / "images")
    small = ["--data.root", str(root), "--data.image_size", "32", "--data.num_workers", "0"]
    small += ["--model.model_name", "rednet14_cifar", "--trainer.max_epochs", "1"]
    for verb in ("test", "validate"):
        assert main(["fit", "-c", "imagefolder_rednet50", *QUICK, *small]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
        _, *words = line.removeprefix("next: ").split()
        assert words[0] == verb
        assert main(words) == 0
        shutil.rmtree(root / "test", ignore_errors=True)


def test_one_class_folder_is_refused(tmp_path, capsys):
    root = write_tree(tmp_path / "images")
    for part in ("train", "val"):
        shutil.rmtree(root / part / "dog")
    assert main(["fit", "-c", "imagefolder_rednet50", *QUICK, "--data.root", str(root)]) == 1
    assert "num_classes must be at least 2, got 1: with one, every answer is right" in capsys.readouterr().err


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes(name, tmp_path):
    """As published: 130 epochs, Nesterov SGD, lr 0.8 for 2048 images, warm-up from a quarter, decay of all."""
    root = write_tree(tmp_path / "images")
    small = ["--data.image_size", "32", "--data.batch_size", "4", "--data.num_workers", "0"]
    quick = ["--trainer.fast_dev_run", "true", "--trainer.accumulate_grad_batches", "2"]
    cli = run(["fit", "-c", name, *QUICK, *small, *quick, "--data.root", str(root)])
    given, group = cli.model.hparams, cli.trainer.optimizers[0].param_groups[0]
    assert given["model_name"].removesuffix("_paper") == name.removeprefix("imagenet_")
    recipe = (
        given["lr"],
        given["lr_batch_size"],
        given["warmup_steps"],
        given["warmup_ratio"],
        given["label_smoothing"],
    )
    assert recipe == (0.8, 2048, 3130, 0.25, 0.1)
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert [group["weight_decay"] for group in cli.trainer.optimizers[0].param_groups] == [1e-4, 1e-4]
    assert group["initial_lr"] == pytest.approx(0.8 * 8 / 2048)  # four images, accumulated twice
    assert recipes()[name].read_text().count("max_epochs: 130") == 1


def test_modern_recipe(tmp_path):
    root = write_tree(tmp_path / "images")
    small = ["--data.image_size", "64", "--data.batch_size", "4", "--data.num_workers", "0"]
    quick = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "2"]
    cli = run(["fit", "-c", "imagenet_rednet50_modern", *QUICK, *small, *quick, "--data.root", str(root)])
    assert cli.trainer.precision == "bf16-mixed"
    [averaging] = [call for call in cli.trainer.callbacks if isinstance(call, EMAWeightAveraging)]
    saved = torch.load(tmp_path / "runs/imagenet_rednet50_modern/version_0/checkpoints/last.ckpt")
    averaged = averaging._average_model.module.state_dict()
    assert all(torch.equal(saved["state_dict"][name], averaged[name]) for name in saved["state_dict"])
    assert not torch.equal(saved["state_dict"]["net.fc.weight"], saved["current_model_state"]["net.fc.weight"])


def test_warm_up_covers_the_same_images_for_every_batch_size(tmp_path):
    root = write_tree(tmp_path / "images")
    small = ["--data.image_size", "32", "--data.batch_size", "4", "--data.num_workers", "0"]
    cli = run(
        ["fit", "-c", "imagenet_resnet26", *QUICK, *small, "--data.root", str(root), "--trainer.fast_dev_run", "true"]
    )
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.lr_lambdas[0].keywords["warmup"] == round(3130 * 2048 / 4)


def test_a_recipe_takes_other_data(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for index in range(8):
                pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
                (tmp_path / f"{index}.cls").write_text(str(index % 3))
                for name in (f"{index}.jpg", f"{index}.cls"):
                    archive.add(tmp_path / name, name)
    shards = ["--data", "involution.tasks.classify.Shards", "--data.train", f"{tmp_path}/train-*.tar"]
    shards += ["--data.val", f"{tmp_path}/val-*.tar", "--data.classes", "3", "--data.image_size", "32"]
    small = ["--data.batch_size", "4", "--data.num_workers", "0", "--model.model_name", "rednet14_cifar"]
    cli = run(["fit", "-c", "imagenet_rednet50", *QUICK, *shards, *small, "--trainer.max_epochs", "1"])
    assert cli.model.num_classes == 3
    assert cli.trainer.global_step == 2


def test_imagefolder_error_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must hold a folder 'train'.*nowhere"):
        run(["fit", "-c", "imagefolder_rednet50", *QUICK, "--data.root", str(tmp_path / "nowhere")])


def test_each_run_writes_its_own_files(tmp_path):
    for version in range(2):
        cli = run([*FIT, "--trainer.max_epochs", "1", "--model.lr", "0.03"])
        folder = tmp_path / "runs" / "digits_resnet" / f"version_{version}"
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["model"]["init_args"]["lr"] == cli.trainer.optimizers[0].defaults["lr"] == 0.03
        assert saved["data"]["init_args"]["batch_size"] == cli.datamodule.batch_size == 4
        assert saved["seed_everything"] == 0
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        with (folder / "metrics.csv").open(newline="") as lines:
            [row] = [row for row in csv.DictReader(lines) if row["val/accuracy"]]
        assert 0 <= float(row["val/accuracy"]) <= 1
    assert (
        run(["fit", "-c", str(folder / "config.yaml"), *QUICK]).trainer.current_epoch == 1
    )  # a saved config is a recipe


def test_a_named_version_can_be_written_twice(tmp_path):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "here", "--trainer.logger.version", "5"]
    for _ in range(2):
        run([*FIT, *logger, "--trainer.max_epochs", "1"])
    assert (tmp_path / "here" / "lightning_logs" / "version_5" / "config.yaml").is_file()


def test_same_seed_same_weights_and_another_seed_others():
    def weights(seed: int) -> torch.Tensor:
        cli = run([*FIT, "--trainer.max_epochs", "1", "--seed_everything", str(seed)])
        return torch.cat([parameter.detach().flatten() for parameter in cli.model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_resume_continues_at_the_next_epoch(tmp_path):
    first = run([*FIT, "--trainer.max_epochs", "2"])
    last = tmp_path / "runs" / "digits_resnet" / "version_0" / "checkpoints" / "last.ckpt"
    seen = []
    original = Classifier.on_train_epoch_start

    def note(self):
        seen.append((self.current_epoch, self.global_step))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_train_epoch_start", note)
        second = run([*FIT, "--trainer.max_epochs", "4", "--ckpt_path", str(last)])
    assert first.trainer.global_step == 4
    assert seen == [(2, 4), (3, 6)]
    assert second.trainer.global_step == 8


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_takes_a_checkpoint(tmp_path, verb):
    trained = run([*FIT, "--trainer.max_epochs", "1"])
    last = tmp_path / "runs" / "digits_resnet" / "version_0" / "checkpoints" / "last.ckpt"
    # A checkpoint carries the model: the other recipe's name for it does not matter.
    evaluated = run([verb, "-c", "digits_rednet", *QUICK, "--ckpt_path", str(last)])
    assert evaluated.model.hparams["model_name"] == "resnet14_cifar"
    ours, theirs = (cli.model.net.state_dict() for cli in (evaluated, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    part = {"validate": "val", "test": "test"}[verb]
    assert f"{part}/accuracy" in evaluated.trainer.callback_metrics


def test_checkpoint_loads_without_the_command(tmp_path):
    trained = run([*FIT, "--trainer.max_epochs", "1"])
    loaded = Classifier.load_from_checkpoint(tmp_path / "runs/digits_resnet/version_0/checkpoints/last.ckpt").eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), trained.model.eval()(images))


def test_num_classes_is_refused_as_the_data_define_it():
    with pytest.raises(ValueError, match=r"num_classes comes from the data, got --model.num_classes=7"):
        run([*FIT, "--model.num_classes=7"])
