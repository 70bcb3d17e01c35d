"""Files of the official repository: what comes out computes what the published network computes."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import published_networks as published
import pytest
import timm
import torch
from torch import Tensor

from involution import zoo
from involution.cli import main
from involution.zoo.checkpoints import load_backbone, load_network, read_weights
from involution.zoo.identify import identify
from involution.zoo.official import our_name, renamed

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(**kwargs: Any) -> published.Classifier:
    return published.settled(published.Classifier(**kwargs), IMAGES)


def saved(file: Path, weights: dict[str, Tensor], zip_format: bool = True, **meta: Any) -> Path:
    """As mmcls writes one."""
    content = {
        "meta": {"mmcls_version": "0.9.0", "config": "model = dict()", "epoch": 130, **meta},
        "state_dict": OrderedDict(weights),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.8}]},
    }
    torch.save(content, file, _use_new_zipfile_serialization=zip_format)
    return file


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


def bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes backbone. and head."""
    return {name.removeprefix("backbone.").removeprefix("head."): one for name, one in weights.items()}


@pytest.mark.parametrize(
    ("prefixes", "plain", "zip_format"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_a_converted_file_computes_the_same_in_timm(
    prefixes: bool, plain: bool, zip_format: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = network(plain=plain)
    weights = theirs.state_dict()
    assert ("backbone.layer1.0.conv2.conv2.weight" in weights) is plain
    file = saved(tmp_path / "rednet26.pth", weights if prefixes else bare(weights), zip_format)
    out = tmp_path / "OUT.safetensors"
    assert main(["convert", str(file), str(out)]) == 0
    said = capsys.readouterr().out
    assert f'timm.create_model("rednet26", num_classes=7, checkpoint_path="{out}")' in said
    ours = timm.create_model("rednet26", num_classes=7, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        close(ours.double()(IMAGES.double()), theirs.double()(IMAGES.double()))


def test_load_checkpoint_makes_the_network_of_a_file(tmp_path: Path) -> None:
    theirs = network(depth=38)
    ours = zoo.load_checkpoint(saved(tmp_path / "some.pth", theirs.state_dict()))
    with torch.no_grad():
        close(ours.double()(IMAGES.double()), theirs.double()(IMAGES.double()))
    assert not ours.training


def test_a_bare_state_dict_without_a_head_is_a_backbone(tmp_path: Path) -> None:
    theirs = network(stem_size=7)
    torch.save(theirs.backbone.state_dict(), tmp_path / "rednet26.pth")
    ours = zoo.load_checkpoint(tmp_path / "rednet26.pth")
    with torch.no_grad():
        for got, want in zip(
            ours.double().forward_intermediates(IMAGES.double(), 4, intermediates_only=True),
            theirs.backbone.double()(IMAGES.double()),
            strict=True,
        ):
            close(got, want)


@pytest.mark.parametrize("stem", [3, 7])
@pytest.mark.parametrize("depth", [26, 38, 50, 101, 152])
def test_depth_and_stem_are_found_and_every_tensor_has_its_place(depth: int, stem: int) -> None:
    with torch.device("meta"):
        weights = published.Classifier(depth, 1000, stem).state_dict()
        ours = timm.create_model(f"rednet{depth}", stem_kernel_size=stem).state_dict()
    found = renamed(weights, our_name, "the test")
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in ours.items()}
    assert identify(found, "the test") == (f"rednet{depth}", {"stem_kernel_size": 7} if stem == 7 else {})


def test_tensors_are_mapped_by_name_whatever_their_order(tmp_path: Path) -> None:
    weights = published.Classifier().state_dict()
    straight = read_weights(saved(tmp_path / "straight.pth", weights))
    backwards = read_weights(saved(tmp_path / "backwards.pth", dict(reversed(weights.items()))))
    assert list(straight) == list(reversed(backwards))
    assert all(torch.equal(one, backwards[name]) for name, one in straight.items())


def test_missing_unexpected_and_mis_shaped_tensors_are_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = published.Classifier().state_dict()
    del weights["backbone.layer2.1.bn2.running_var"]
    weights["backbone.layer2.1.surplus"] = torch.zeros(2)
    weights["backbone.layer3.0.conv2.conv1.conv.weight"] = torch.zeros(64, 128, 1, 1)
    file = saved(tmp_path / "rednet26.pth", weights)
    assert main(["convert", str(file), str(tmp_path / "OUT.safetensors")]) == 1
    message = capsys.readouterr().err
    assert "missing: layer2.1.bn2.running_var;" in message
    assert "unexpected: layer2.1.surplus;" in message
    assert "layer3.0.conv2.generator.reduce.weight [64, 128, 1, 1] for [64, 256, 1, 1]" in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == [file]


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    weights = published.Classifier().state_dict()
    weights["backbone.layer1.0.conv2.conv2.bias"] = torch.zeros(196)
    with pytest.raises(ValueError, match=r"every tensor once.*conv2\.conv2\.conv\.bias and .*conv2\.conv2\.bias"):
        read_weights(saved(tmp_path / "rednet26.pth", weights))


def test_blocks_of_no_rednet_are_refused(tmp_path: Path) -> None:
    weights = published.Classifier().state_dict()
    kept = {name: one for name, one in weights.items() if not name.startswith("backbone.layer3.3.")}
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 1\) \(26\).*with \(1, 2, 3, 1\)"):
        zoo.load_checkpoint(saved(tmp_path / "rednet26.pth", kept))


def test_official_files_fill_backbones_and_classifiers(tmp_path: Path) -> None:
    """--model.backbone_weights, and checkpoint_path of a Classifier."""
    theirs = network()
    file = saved(tmp_path / "rednet26.pth", theirs.state_dict())
    body = timm.create_model("rednet26", features_only=True, out_indices=(1, 2, 3, 4))
    assert load_backbone(body, file, "rednet26") == ["fc.weight", "fc.bias"]
    classifier = timm.create_model("rednet26", num_classes=7)
    assert load_network(classifier, file) == []
    with torch.no_grad():
        close(classifier.eval().double()(IMAGES.double()), theirs.double()(IMAGES.double()))
        for got, want in zip(
            body.eval().double()(IMAGES.double()), theirs.backbone.double()(IMAGES.double()), strict=True
        ):
            close(got, want)


def test_class_names_go_along(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(7)]
    file = saved(tmp_path / "rednet26.pth", published.Classifier().state_dict(), CLASSES=tuple(names))
    assert main(["convert", str(file), str(tmp_path / "OUT.safetensors")]) == 0
    from involution.zoo.checkpoints import read_checkpoint

    assert read_checkpoint(tmp_path / "OUT.safetensors").classes == names
