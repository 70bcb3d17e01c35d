"""PaddleClas's .pdparams: the format as it is written, and files that ask for more than arrays."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import published_networks as published
import pytest
import timm
import torch

from involution import zoo
from involution.cli import main
from involution.zoo.paddle import NAME_TABLE, read_pdparams

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class NamedArray:
    """Paddle's tensors are pickled as the call of `tuple` with their name and array."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.pair = name, array

    def __reduce__(self) -> Any:
        return tuple, (self.pair,)


def network(num_classes: int = 7) -> published.PaddleClassifier:
    backbone = published.settled(published.Backbone(26), IMAGES)
    return published.PaddleClassifier(backbone, num_classes).eval()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: one.numpy() for name, one in module.state_dict().items()}


def written(file: Path, content: Any, protocol: int = 4) -> Path:
    file.write_bytes(pickle.dumps(content, protocol))
    return file


@pytest.fixture
def old_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its version 2, numpy pickled arrays by numpy.core.multiarray._reconstruct."""
    monkeypatch.setattr(np._core.multiarray._reconstruct, "__module__", "numpy.core.multiarray")


class Recorder(pickle.Unpickler):
    """Python's own reader; remembers the names that a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        self.asked = {*getattr(self, "asked", ()), f"{module}.{name}"}
        return super().find_class(module, name)


def globals_of(file: Path) -> set[str]:
    with file.open("rb") as stream:
        reader = Recorder(stream)
        reader.load()
    return reader.asked


@pytest.mark.parametrize(
    ("protocol", "table"),
    [(2, {"fc.weight": "linear_0.w_0"}), (4, None), (4, {})],
    ids=["protocol 2, table", "protocol 4, no table", "protocol 4, empty table"],
)
def test_a_converted_file_computes_the_same_in_timm(
    protocol: int, table: dict[str, str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = network()
    content: dict[str, Any] = arrays(theirs)
    assert {"stem.0.bn._mean", "layer1.0.bn1._variance"} < set(content)
    if table is not None:
        content[NAME_TABLE] = table
    file = written(tmp_path / "RedNet26_pretrained.pdparams", content, protocol)
    asked = {"numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}
    assert globals_of(file) == (asked | {"_codecs.encode"} if protocol == 2 else asked)
    out = tmp_path / "OUT.safetensors"
    assert main(["convert", str(file), str(out)]) == 0
    assert "rednet26" in capsys.readouterr().out
    ours = timm.create_model("rednet26", num_classes=7, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(IMAGES.double()), theirs.double()(IMAGES.double()), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("protocol", [2, 4])
def test_old_numpys_pickles_are_read(protocol: int, old_numpy: None, tmp_path: Path) -> None:
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = written(tmp_path / "a.pdparams", {"a.weight": want}, protocol)
    assert "numpy.core.multiarray._reconstruct" in globals_of(file)
    assert torch.equal(read_pdparams(file)["a.weight"], torch.from_numpy(want))


@pytest.mark.parametrize("protocol", [2, 4])
def test_tuples_of_name_and_array_are_read(protocol: int, tmp_path: Path) -> None:
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"a.weight": NamedArray("conv_0.w_0", want), "b.weight": ("conv_1.w_0", 2 * want)}
    file = written(tmp_path / "a.pdparams", content, protocol)
    assert ("__builtin__.tuple" if protocol == 2 else "builtins.tuple") in globals_of(file)
    got = read_pdparams(file)
    assert torch.equal(got["a.weight"], torch.from_numpy(want))
    assert torch.equal(got["b.weight"], torch.from_numpy(2 * want))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "i8"])
@pytest.mark.parametrize(
    ("protocol", "shape"),
    [(protocol, shape) for protocol in (2, 4) for shape in ((), (5,), (2, 3), (2, 3, 4, 5))] + [(4, (0, 3))],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_as_numpy_had_them(
    order: Any, protocol: int, shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    want = np.asarray(np.random.default_rng(0).normal(size=shape) * 9, dtype=dtype, order=order)
    got = read_pdparams(written(tmp_path / "a.pdparams", {"a.weight": want}, protocol))["a.weight"]
    assert torch.equal(got, torch.from_numpy(np.ascontiguousarray(want)).reshape(shape))
    assert got.is_contiguous()


def test_a_square_classifier_is_transposed_too(tmp_path: Path) -> None:
    theirs = network(num_classes=2048)
    ours = zoo.load_checkpoint(written(tmp_path / "RedNet26.pdparams", arrays(theirs)))
    assert torch.equal(ours.fc.weight, theirs.fc.weight.t())
    with torch.no_grad():
        torch.testing.assert_close(
            ours.double()(IMAGES.double()), theirs.double()(IMAGES.double()), rtol=1e-8, atol=1e-8
        )


class Asks:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def spoilt(array: np.ndarray, element: Any) -> Any:
    """An array whose state, which numpy would fill it with, holds something else than bytes."""
    function, arguments, state = array.__reduce__()
    return Asks.__new__(type("Spoilt", (), {"__reduce__": lambda self: (function, arguments, (*state[:4], element))}))


ARRAY = np.zeros(2, np.float32)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("place", ["value", "in a tuple", "in a list", "in a table", "key", "alone", "in an array"])
def test_a_file_that_asks_for_code_does_not_run_it(place: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    asks = Asks(os.system, f"touch {marker}")
    content: Any = {
        "value": {"a.weight": asks},
        "in a tuple": {"a.weight": ("name", asks)},
        "in a list": {"a.weight": [[ARRAY, asks]]},
        "in a table": {"a.weight": ARRAY, NAME_TABLE: {"a": asks}},
        "key": {("a", asks): ARRAY},
        "alone": asks,
        "in an array": {"a.weight": spoilt(ARRAY, asks)},
    }[place]
    file = written(tmp_path / "a.pdparams", content, protocol)
    with pytest.raises(ValueError, match=r"the global (posix|nt)\.system is refused"):
        read_pdparams(file)
    assert not marker.exists()
    if place == "alone":
        pickle.loads(file.read_bytes())
        assert marker.exists()  # what another reader would have run


@pytest.mark.parametrize("protocol", [2, 4])
def test_eval_is_refused_by_name(protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """paddle.save writes some of its objects as calls of eval."""
    file = written(tmp_path / "a.pdparams", {"a.weight": Asks(eval, "data", {"data": ARRAY})}, protocol)
    assert main(["convert", str(file), str(tmp_path / "OUT.safetensors")]) == 1
    module = "__builtin__" if protocol == 2 else "builtins"
    assert f"{file}: the global {module}.eval is refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cnumpy\nload\n.", r"numpy\.load is refused"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0etuple.__base__\x93.", r"builtins\.tuple\.__base__ is refused"),
        (b"\x80\x04\x8c\x05numpy\x8c\x15dtype.__init_subclass\x93.", r"numpy\.dtype\.__init_subclass is refused"),
        (b"(S'x'\nios\nsystem\n.", r"os\.system is refused"),
        (b"cnumpy._core.multiarray\n_reconstruct\n}S'a'\nI1\nsb.", "missing 1 required positional argument"),
        (b"c_codecs\nencode\nNcnumpy\ndtype\n\x86b.", "missing 1 required positional argument"),
        (b"cbuiltins\ntuple\n}S'a'\nI1\nsb.", ""),
        (b"Pname\n.", "persistent"),
        (b"\x80\x02\x82\x01.", "extension"),
        (b"\x80\x04}.", "which holds none"),
        (b"\x80\x04]\x94.", "a list"),
        (b"\x80\x04}\x8c\x01aK\x01s.", "'a' is no array"),
        (b"\x80\x04}\x8c\x01acnumpy\nndarray\nR.", ""),
        (b"", "pickle exhausted"),
        (b"PK\x03\x04", ""),
    ],
)
def test_pickles_by_hand_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pdparams"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^weights must be .*a\.pdparams.*{message}"):
        read_pdparams(file)
    assert torch.equal(read_pdparams(written(file, {"a": ARRAY}))["a"], torch.zeros(2))  # nothing has been changed


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([None, 1], dtype=object), r"numpy\.dtype must be one of .*got 'O8'"),
        (np.zeros(2, dtype=[("a", "f4")]), r"numpy\.dtype must be one of .*got 'V4'"),
        (np.zeros(2, dtype=">f4"), "little-endian"),
        (np.zeros(2, dtype="U3"), r"numpy\.dtype must be one of .*got 'U3'"),
        (np.zeros(2, dtype="datetime64[s]"), r"numpy\.dtype must be one of .*got 'M8'"),
        (np.float32(1), r"numpy\._core\.multiarray\.scalar is refused"),
        (np.ma.masked_array([1.0]), r"numpy\.ma\.core\._mareconstruct is refused"),
        (spoilt(ARRAY, [1, 2]), "other objects"),
        (spoilt(ARRAY, b"123"), "must hold 8 bytes, got 3"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_arrays_are_refused(array: Any, message: str, protocol: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_pdparams(written(tmp_path / "a.pdparams", {"a.weight": array}, protocol))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights must be a file, got .*none\.pdparams"):
        zoo.load_checkpoint(tmp_path / "none.pdparams")
