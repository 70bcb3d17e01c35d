"""`involution convert` on our own checkpoints, and on files that ask for more than weights."""

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUIET
from PIL import Image

from involution import zoo
from involution.cli import main
from involution.tasks.classify import Classifier
from involution.zoo.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `involution fit`."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["fit", "-c", "digits_rednet", *QUIET, "--trainer.default_root_dir", str(folder)]
    assert main([*options, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0
    return folder / "version_0" / "checkpoints" / "last.ckpt"


def loaded(checkpoint: Path) -> Classifier:
    return Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    weights, others = one.state_dict(), other.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_checkpoint_becomes_timms_weights_and_a_checkpoint_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, back = tmp_path / "plain.safetensors", tmp_path / "back.ckpt"
    assert main(["convert", str(trained), str(plain)]) == 0
    call = capsys.readouterr().out.split("next: ")[1].strip()
    model = eval(call, {"timm": timm})  # the line that the command prints
    before = loaded(trained)
    same(model, before.net)
    assert main(["convert", str(plain), str(back)]) == 0
    after = loaded(back)
    same(after, before)
    assert (after.classes, after.preprocessing) == (before.classes, before.preprocessing)
    given, kept = ({k: v for k, v in one.hparams.items() if not k.startswith("_")} for one in (before, after))
    assert kept == given
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), after(x))  # one is contiguous, the other channels_last


def test_a_converted_checkpoint_is_tested_by_the_command_line(trained: Path, tmp_path: Path) -> None:
    """What Lightning's own loading expects of a file is there."""
    back = tmp_path / "back.ckpt"
    assert main(["convert", str(trained), str(back)]) == 0
    few = [*QUIET, "--trainer.default_root_dir", str(tmp_path / "runs"), "--ckpt_path", str(back)]
    assert main(["test", "-c", "digits_rednet", *few, "--trainer.limit_test_batches", "1"]) == 0


def test_plain_weights_of_a_rednet_become_a_checkpoint(tmp_path: Path) -> None:
    """Without what our own files carry: model and preprocessing are those of the network that the weights are of."""
    network = timm.create_model("rednetv2_14_cifar", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    assert main(["convert", str(tmp_path / "plain.pth"), str(tmp_path / "back.ckpt")]) == 0
    module = loaded(tmp_path / "back.ckpt")
    same(module.net, network)
    assert (module.hparams["model_name"], module.classes) == ("rednetv2_14_cifar", ["0", "1", "2"])
    assert module.preprocessing._asdict() == {
        "image_size": 32,
        "resize": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    }
    Image.new("RGB", (40, 50)).save(tmp_path / "photo.png")
    assert module.read(tmp_path / "photo.png").shape == (3, 32, 32)


def test_a_convolution_twins_checkpoint_converts_too(tmp_path: Path) -> None:
    module = Classifier("resnet14_cifar", num_classes=3)
    content: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "twin.ckpt")
    assert main(["convert", str(tmp_path / "twin.ckpt"), str(tmp_path / "OUT.safetensors")]) == 0
    out = str(tmp_path / "OUT.safetensors")
    same(timm.create_model("resnet14_cifar", num_classes=3, checkpoint_path=out), module.net)
    record = read_checkpoint(tmp_path / "OUT.safetensors").record
    assert record["involution"]["module"] == "involution.tasks.classify.module.Classifier"
    assert json.dumps(record)


class Asks:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "meta", "hyper_parameters", "alone", "a dict's state"])
@pytest.mark.parametrize("name", ["a.pth", "a.ckpt"])
def test_a_file_that_asks_for_code_does_not_run_it(
    name: str, place: str, zip_format: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    asks = Asks(os.system, f"touch {marker}")
    weights = {"fc.bias": torch.zeros(3)}
    state = collections.OrderedDict(weights)
    state._metadata = asks
    content: Any = {
        "value": {"state_dict": weights | {"fc.weight": asks}},
        "meta": {"meta": {"config": asks}, "state_dict": weights},
        "hyper_parameters": {"hyper_parameters": {"lr": asks}, "state_dict": weights},
        "alone": asks,
        "a dict's state": state,
    }[place]
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zip_format)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "OUT.safetensors")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("involution convert: weights must be a checkpoint or a state dict")
    assert "system" in message
    assert not marker.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert marker.exists()  # what another reader would have run


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.ckpt"])
def test_a_bare_pickle_under_another_name_is_not_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps(Asks(os.system, f"touch {marker}")))
    assert main(["convert", str(tmp_path / name), str(tmp_path / "OUT.safetensors")]) == 1
    assert "weights must be a checkpoint or a state dict" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.pth", "OUT.safetensors"], 1, "weights must be a file, got none.pth"),
        (["none.pth", "OUT.pth"], 1, "output must end in .safetensors or .ckpt, got OUT.pth"),
        (["none.pth", "OUT.ckpt", "--backbone"], 1, "output must end in .safetensors for a backbone"),
        (["none.pth"], 2, "the following arguments are required: output"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == code
    assert message in capsys.readouterr().err


def test_the_weights_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(timm.create_model("rednet14_cifar").state_dict(), file)
    before = file.read_bytes()
    assert main(["convert", str(file), str(file)]) == 1
    assert "output must be another file than the weights" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_hyperparameters_of_another_module_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carried = {"module": "involution.tasks.classify.module.Classifier", "classes": ["a"], "preprocessing": None}
    content = {"state_dict": {"net.a": torch.zeros(1)}, "hyper_parameters": {"depth": 3}, "involution": carried}
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 1
    assert "hyperparameters must be Classifier's, got" in capsys.readouterr().err


def test_a_backbone_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("rednet14_cifar", num_classes=0).state_dict(), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.ckpt")]) == 1
    assert "weights must be of a classifier, got" in capsys.readouterr().err
    assert zoo.load_checkpoint(tmp_path / "a.pth").num_classes == 0


def test_the_command_loads_no_lightning_for_a_classifier(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save(timm.create_model("rednet14_cifar").state_dict(), tmp_path / "a.pth")
    code = f"""
import sys
sys.modules["lightning"] = sys.modules["jsonargparse"] = None
from involution.cli import main
sys.exit(main(["convert", {str(tmp_path / "a.pth")!r}, {str(tmp_path / "a.safetensors")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").is_file()
