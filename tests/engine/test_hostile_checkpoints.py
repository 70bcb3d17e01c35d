"""Checkpoints that carry code or name other modules and weights, and files with flipped bits or a missing end."""

import io
import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_line import saved
from harness import examples
from safetensors.torch import save_file

from involution.cli import main
from involution.engine import checkpoints
from involution.engine.checkpoints import load_module, module_class
from involution.tasks.classify import Classifier
from involution.tasks.classify.preprocessing import Preprocessing
from involution.zoo.checkpoints import read_checkpoint

TENSORS = {"fc.weight": torch.randn(6, 4), "fc.bias": torch.randn(6), "layer.weight": torch.randn(3, 4, 1, 1)}


class Asks:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint of a small classifier."""
    model = Classifier("rednet14_cifar", 3)
    model.preprocessing = Preprocessing(32, 36, (0.5,) * 3, (0.5,) * 3)
    found: dict[str, Any] = torch.load(saved(model, tmp_path_factory.mktemp("good")))
    return found


def changed(content: dict[str, Any], file: Path, **parts: Any) -> Path:
    """The checkpoint with other entries; a dict's are added to those that it has."""
    new = {
        name: {**content.get(name, {}), **value} if isinstance(value, dict) else value for name, value in parts.items()
    }
    torch.save({**content, **new}, file)
    return file


COMMANDS = {
    "predict": ["predict", "--ckpt_path", "FILE", "--data.predict_path", ".", "--output", "out"],
    "fit": ["fit", "-c", "digits_rednet", "--ckpt_path", "FILE", "--trainer.max_epochs", "1"],
    "validate": ["validate", "-c", "digits_rednet", "--ckpt_path", "FILE"],
    "convert": ["convert", "FILE", "out.safetensors"],
    "doctor": ["doctor", "FILE"],
    "init_from": ["fit", "-c", "digits_rednet", "--model.init_from", "FILE", "--trainer.max_epochs", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_checkpoint_is_not_executed(
    command: str, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    file = changed(content, tmp_path / "evil.ckpt", callbacks={"evil": Asks(os.system, f"touch {marker}")})
    assert main([str(file) if word == "FILE" else word for word in COMMANDS[command]]) == 1
    assert "evil.ckpt" in capsys.readouterr().err
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # what another reader would have run


@pytest.mark.parametrize("command", ["predict", "fit", "doctor"])
def test_a_module_that_a_checkpoint_names_is_not_imported(
    command: str, content: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.py").write_text("open('marker', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = {"involution": {"module": "stranger.Net"}, "hyper_parameters": {"_class_path": "stranger.Net"}}
    file = changed(content, tmp_path / "a.ckpt", **names)
    assert main([str(file) if word == "FILE" else word for word in COMMANDS[command]]) == 1
    assert "names the class 'stranger.Net', which is not imported" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert "stranger" not in sys.modules


def test_a_package_declares_its_tasks(content: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine.py").write_text("from involution.tasks.classify import Classifier\nclass Net(Classifier): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = changed(content, tmp_path / "a.ckpt", involution={"module": "mine.Net"})
    declared = [EntryPoint("mine", "mine", "involution.tasks")]
    monkeypatch.setattr(checkpoints, "entry_points", lambda group: declared if group == "involution.tasks" else [])
    assert module_class(file).__name__ == "Net"


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Linear", "involution.zoo.RedNet", "", "module", "..a"])
def test_a_name_of_something_else_is_refused(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        module_class(changed(content, tmp_path / "a.ckpt", involution={"module": name}))


def test_an_instantiator_of_its_own_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    file = changed(content, tmp_path / "a.ckpt", hyper_parameters={"_instantiator": "os.path.join"})
    with pytest.raises(ValueError, match="allowlist of trusted instantiators"):
        load_module(file)


def test_a_checkpoint_reads_and_downloads_no_other_weights(
    content: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Also in files for the rewritten network: options of timm that name weights are left out."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were requested")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    options = {"pretrained": True, "checkpoint_path": "/etc/passwd", "cache_dir": "/"}
    file = changed(content, tmp_path / "a.ckpt", hyper_parameters={"model_kwargs": options})
    loaded = load_module(file)
    assert loaded.hparams["model_kwargs"] == {}
    assert all(torch.equal(one, content["state_dict"][name]) for name, one in loaded.state_dict().items())
    assert main(["convert", str(file), str(tmp_path / "a.safetensors")]) == 0


def written(kind: str, content: dict[str, Any]) -> bytes:
    """A good file of a kind."""
    stream = io.BytesIO()
    if kind == "pdparams":
        return pickle.dumps({name: one.numpy() for name, one in TENSORS.items()}, 4)
    if kind == "safetensors":
        save_file(TENSORS, "good.safetensors", {"involution": '{"involution": {"classes": ["a", "b"]}}'})
        return Path("good.safetensors").read_bytes()
    whole = {**content, "state_dict": {f"net.{name}": one for name, one in TENSORS.items()}}
    torch.save(whole if kind == "ckpt" else TENSORS, stream)
    return stream.getvalue()


def mutated(good: bytes, numbers: random.Random) -> bytes:
    """The file with flipped bits, other bytes, a part doubled or left out, or without its end."""
    bad = bytearray(good)
    place, kind = numbers.randrange(len(bad)), numbers.randrange(5)
    if kind == 0:
        return bytes(bad[:place])
    if kind == 1:
        return bytes(bad[:place] + bad[min(place + numbers.randint(1, 64), len(bad)) :])
    if kind == 2:
        return bytes(bad[:place] + bad[max(0, place - numbers.randint(1, 64)) :])
    head = numbers.random() < 0.5  # where the structure is, and not the numbers
    for _ in range(numbers.choice([1, 1, 2, 8])):
        place = numbers.randrange(min(len(bad), 512) if head else len(bad))
        bad[place] = bad[place] ^ (1 << numbers.randrange(8)) if kind == 3 else numbers.randrange(256)
    return bytes(bad)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "pth", "pdparams"])
def test_damaged_files_are_refused_or_read(kind: str, content: dict[str, Any], tmp_path: Path) -> None:
    """A clear error or tensors, in bounded time and memory; no format has checksums that all readers verify."""
    good, numbers = written(kind, content), random.Random(kind)
    file, refused, memory = tmp_path / f"a.{kind}", 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readers: list[Callable[[Path], Any]] = [read_checkpoint, *([module_class] if kind == "ckpt" else [])]
    count = examples(30)
    for number in range(count):
        file.write_bytes(mutated(good, numbers))
        for read in readers:
            start = time.perf_counter()
            try:
                found = read(file)
            except ValueError as error:
                refused, message = refused + 1, str(error)
                assert f"a.{kind}" in message, number
            else:
                weights = getattr(found, "weights", {})
                assert all(isinstance(one, torch.Tensor) for one in weights.values()), number
            assert time.perf_counter() - start < 30, number
    assert refused > count / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


@pytest.mark.parametrize("operation", [b"r\xff\xff\xff\x7f", b"p2000000000\n"])
def test_a_large_memo_index_is_refused(operation: bytes, tmp_path: Path) -> None:
    """Python's unpickler would allocate 32 GB for it."""
    (tmp_path / "a.pdparams").write_bytes(b"\x80\x04}" + operation + b".")
    with pytest.raises(ValueError, match=r"a\.pdparams: a memo index must be at most"):
        read_checkpoint(tmp_path / "a.pdparams")


def test_arrays_larger_than_their_data_are_refused(tmp_path: Path) -> None:
    array = np.zeros(4, np.float32)
    function, arguments, state = array.__reduce__()  # type: ignore[misc]
    for shape in ((1 << 40,), (-4,), (1 << 40, 0)):
        whole = (state[0], shape, *state[2:])
        big = type("Big", (), {"__reduce__": lambda self, whole=whole: (function, arguments, whole)})()
        (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"a": big}, 4))
        with pytest.raises(ValueError, match=r"a\.pdparams"):
            read_checkpoint(tmp_path / "a.pdparams")
