"""Segmenters of mmseg 0.x: what is converted computes what the published network computes."""

from functools import partial
from pathlib import Path
from typing import Any

import published_networks as published
import pytest
import torch
from torch import nn

from involution.cli import main
from involution.tasks.segment import Segmenter
from involution.tasks.segment import convert as names
from involution.zoo.official import name_in_detector, renamed

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
CITYSCAPES = [f"class {index}" for index in range(19)]


def converted(theirs: nn.Module, folder: Path) -> Segmenter:
    """By way of a file as mmseg writes it, and of a checkpoint as `involution fit` writes it."""
    meta = {"mmseg_version": "0.11.0", "iter": 80000, "CLASSES": CITYSCAPES, "PALETTE": [[128, 64, 128]] * 19}
    torch.save({"meta": meta, "state_dict": theirs.state_dict(), "optimizer": {}}, folder / "theirs.pth")
    assert main(["convert", str(folder / "theirs.pth"), str(folder / "ours.ckpt")]) == 0
    return Segmenter.load_from_checkpoint(folder / "ours.ckpt", map_location="cpu", weights_only=True).eval()


def agree(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


def test_a_semantic_fpn_computes_the_same(tmp_path: Path) -> None:
    theirs = published.settled(published.SemanticFPN("involution"), IMAGES)
    module = converted(theirs, tmp_path)
    given = module.hparams
    assert (given["model_name"], given["neck"], given["backbone"]) == ("semantic_fpn", "involution", "rednet26")
    assert given["backbone_kwargs"] == {"stem_kernel_size": 7}
    assert module.classes == CITYSCAPES
    assert module.preprocessing.resize == 1024
    with torch.no_grad():
        agree(module.double()(IMAGES.double()), theirs.double()(IMAGES.double())["out"])


def test_a_upernet_and_its_auxiliary_head_compute_the_same(tmp_path: Path) -> None:
    theirs = published.settled(published.UPerNet(), IMAGES)
    module = converted(theirs, tmp_path)
    assert module.hparams["model_name"] == "upernet"
    with torch.no_grad():
        want = theirs.double()(IMAGES.double())
        agree(module.double()(IMAGES.double()), want["out"])
        logits = module.net.auxiliary(module.net.body(IMAGES.double())[2])
        agree(nn.functional.interpolate(logits, size=IMAGES.shape[2:], mode="bilinear"), want["aux"])


@pytest.mark.parametrize(
    "theirs",
    [
        partial(published.SemanticFPN, "convolution"),
        partial(published.SemanticFPN, "involution"),
        published.UPerNet,
        partial(published.UPerNet, auxiliary=False),
    ],
    ids=["semantic FPN", "semantic FPN, involution", "UPerNet", "UPerNet without its auxiliary head"],
)
def test_every_tensor_of_the_published_segmenters_has_its_place(theirs: Any) -> None:
    """RedNet-50, as published: names and shapes, without values."""
    with torch.device("meta"):
        weights = renamed(theirs(depth=50).state_dict(), name_in_detector, "the test")
        arguments, ours, _ = names.converted(weights, Path("the test"))
        wanted = Segmenter(**arguments).net.state_dict()
    assert (arguments["backbone"], arguments["num_classes"]) == ("rednet50", 19)
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in wanted.items()}


def test_plain_weights_and_back(tmp_path: Path) -> None:
    module = converted(published.SemanticFPN("involution"), tmp_path)
    plain, back = tmp_path / "plain.safetensors", tmp_path / "back.ckpt"
    assert main(["convert", str(tmp_path / "ours.ckpt"), str(plain)]) == 0
    assert main(["convert", str(plain), str(back)]) == 0
    again = Segmenter.load_from_checkpoint(back, map_location="cpu", weights_only=True)
    assert (again.classes, again.preprocessing) == (module.classes, module.preprocessing)
    assert [tuple(one) for one in again.palette] == [tuple(one) for one in module.palette]
    state = module.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())


def test_all_that_does_not_fit_is_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = published.UPerNet().state_dict()
    del weights["decode_head.psp_modules.2.1.bn.weight"]
    weights["decode_head.surplus"] = torch.zeros(1)
    weights["decode_head.fpn_bottleneck.conv.weight"] = torch.zeros(512, 2048, 1, 1)
    torch.save({"state_dict": weights}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")]) == 1
    message = capsys.readouterr().err
    assert "missing: pooling.pools.2.1.1.weight;" in message
    assert "unexpected: decode_head.surplus;" in message
    assert "join.0.weight [512, 2048, 1, 1] for [512, 2048, 3, 3]" in message
