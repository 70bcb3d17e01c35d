"""Published weights, and timm's ways to them: by url, from a folder, from the hub's cache, without a network."""

import json
import pickle
from pathlib import Path
from typing import Any

import published_networks as published
import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models import save_for_hf

from involution import zoo

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> published.PaddleClassifier:
    torch.manual_seed(0)
    backbone = published.settled(published.Backbone(26), IMAGES)
    return published.PaddleClassifier(backbone, 1000).eval()


@pytest.fixture(scope="module")
def pdparams(theirs: published.PaddleClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("paddle") / "RedNet26_pretrained.pdparams"
    file.write_bytes(pickle.dumps({name: one.numpy() for name, one in theirs.state_dict().items()}, 4))
    return file


def at(file: Path) -> dict[str, Any]:
    """What pretrained_cfg_overlay says of a file that `RedNet.load_pretrained` reads."""
    return {"file": str(file), "custom_load": True}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


def output(model: torch.nn.Module, x: torch.Tensor = IMAGES) -> Any:
    with torch.no_grad():
        return model.eval().double()(x.double())


def test_what_is_published_is_listed() -> None:
    listed = zoo.pretrained()
    assert len(listed) == 10
    assert {one.status for one in listed} == {"not verified by us"}
    assert {(one.source, one.licence) for one in listed} == {("PaddleClas", "Apache-2.0"), ("d-li14/involution", "MIT")}
    for one in listed:
        assert timm.is_model(one.name.partition(".")[0])
        assert f"top-1 {one.top1} %" in str(one)
    downloads = [one.name for one in listed if one.source == "PaddleClas"]
    assert downloads == timm.list_models("rednet*", pretrained=True)
    for name in downloads:
        assert timm.get_pretrained_cfg(name).license == "apache-2.0"


def test_a_download_fills_the_network(
    theirs: published.PaddleClassifier, pdparams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's own download, of a file:// url in the place of PaddleClas's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    overlay = {"url": pdparams.as_uri(), "custom_load": True}
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay)
    close(output(model), output(theirs))
    assert (tmp_path / "hub" / "checkpoints" / pdparams.name).is_file()


@pytest.mark.parametrize("name", ["rednet26", "rednet26.paddle_in1k"])
def test_without_a_network_the_error_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    overlay = {"url": "http://127.0.0.1:9/RedNet26_pretrained.pdparams", "custom_load": True}  # where nothing listens
    with pytest.raises(
        RuntimeError, match=r"must download weights of rednet26, which failed: .*pretrained_cfg_overlay"
    ):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_file_takes_the_place_of_a_download(theirs: published.PaddleClassifier, pdparams: Path) -> None:
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=at(pdparams))
    close(output(model), output(theirs))


def test_an_official_file_does_too(tmp_path: Path) -> None:
    official = published.settled(published.Classifier(num_classes=1000), IMAGES)
    torch.save({"meta": {}, "state_dict": official.state_dict()}, tmp_path / "official.pth")
    overlay = at(tmp_path / "official.pth")
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay)
    close(output(model), output(official))


def test_the_classifier_is_left_out_for_another_number_of_classes(
    theirs: published.PaddleClassifier, pdparams: Path
) -> None:
    overlay = at(pdparams)
    for kwargs in ({"num_classes": 5}, {"num_classes": 0}):
        model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        with torch.no_grad():
            want = theirs._backbone[0].double()(IMAGES.double())[-1]
            close(model.eval().double().forward_features(IMAGES.double()), want)
    levels = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    close(output(levels)[-1], want)


def test_the_first_convolution_is_adapted_to_grey_images(theirs: published.PaddleClassifier, pdparams: Path) -> None:
    overlay = at(pdparams)
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    grey = IMAGES[:, :1]
    with torch.no_grad():
        want = theirs.stem[0].conv.double()(grey.double().repeat(1, 3, 1, 1))
        torch.testing.assert_close(model.stem.conv1(grey).double(), want, rtol=1e-4, atol=1e-4)


def test_weights_of_another_depth_are_refused(pdparams: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrained weights must fit the model, got .*missing: layer1\.1\."):
        timm.create_model("rednet38", pretrained=True, pretrained_cfg_overlay=at(pdparams))


def saved(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("rednet14_cifar", num_classes=3, stem_kernel_size=7)
    save_for_hf(model, str(folder), model_args={"stem_kernel_size": 7}, safe_serialization="both")
    return model.eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    weights = one.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_a_saved_network_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "rednet14_cifar"
    same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_a_published_network_comes_back_from_its_folder(
    theirs: published.PaddleClassifier, pdparams: Path, tmp_path: Path
) -> None:
    """What has been loaded from Paddle's format is saved in timm's."""
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=at(pdparams))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    close(output(again), output(theirs))


def test_a_saved_network_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the hub's own cache, filled by hand as a download fills it."""
    commit = "0" * 40
    folder = tmp_path / "models--someone--rednet"
    model = saved(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(timm.create_model("hf-hub:someone/rednet", pretrained=True, cache_dir=tmp_path), model)
