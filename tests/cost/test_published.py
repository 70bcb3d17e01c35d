"""The paper's tables, to the printed digit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from torch.utils.flop_counter import FlopCounterMode

from involution.cli import main
from involution.cost import cost
from involution.cost.published import ROWS, count_row, disagreement

RESULTS = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
# Counted M and G, total G, MAC G: the paper's tables, recomputed. (Others round ResNet-101's 7.8495 to 7.850.)
PRINTED = {
    "RedNet-26": ("9.2339", "1.7334", "1.710", "1.685"),
    "RedNet-38": ("12.3877", "2.2233", "2.200", "2.167"),
    "RedNet-50": ("15.5415", "2.7132", "2.690", "2.649"),
    "RedNet-101": ("25.6537", "4.7423", "4.719", "4.659"),
    "RedNet-152": ("33.9853", "6.7856", "6.763", "6.679"),
    "ResNet-26": ("13.6966", "2.3614", "2.361", "2.342"),
    "ResNet-38": ("19.6268", "3.2417", "3.242", "3.216"),
    "ResNet-50": ("25.5570", "4.1219", "4.122", "4.089"),
    "ResNet-101": ("44.5492", "7.8495", "7.849", "7.801"),
    "ResNet-152": ("60.1928", "11.5807", "11.581", "11.514"),
    "Faster R-CNN, conv neck, conv head": ("31.5985", "177.8451", "178.357", "177.420"),
    "Faster R-CNN, inv neck, conv head": ("29.5080", "135.0071", "135.007", "134.009"),
    "Faster R-CNN, inv neck, inv head": ("28.9854", "91.5245", "91.525", "90.465"),
    "Mask R-CNN, conv, conv": ("34.2417", "224.1476", "231.430", "230.406"),
    "Mask R-CNN, inv, conv": ("32.1513", "181.3096", "188.080", "186.995"),
    "Mask R-CNN, inv, inv": ("29.5383", "104.6129", "104.613", "103.410"),
    "RetinaNet, conv neck": ("27.8141", "210.0965", "210.609", "209.626"),
    "RetinaNet, inv neck": ("26.2463", "199.8985", "199.899", "198.901"),
    "Semantic FPN, conv neck": ("18.4632", "293.9277", "293.928", "292.929"),
    "Semantic FPN, inv neck": ("16.3727", "205.1469", "205.147", "204.023"),
    "UPerNet": ("56.3805", "1825.5688", "1825.569", "1824.490"),
    "Faster R-CNN R50": ("41.5277", "207.0651", "207.065", "206.330"),
    "Mask R-CNN R50": ("44.1710", "253.3676", "260.138", "259.316"),
    "RetinaNet R50": ("37.7433", "239.3165", "239.317", "238.536"),
    "Semantic FPN R50": ("28.4979", "362.8048", "362.805", "362.153"),
    "UPerNet R50": ("66.4152", "1894.4459", "1894.446", "1893.714"),
}
# Where the released code has another stem than the one that the printed figure fits.
OTHER_STEM = {"Faster R-CNN, conv neck, conv head", "Mask R-CNN, conv, conv", "RetinaNet, conv neck"}
# Printed 0.1 away from what the paper's rules give.
ROUNDED_OTHERWISE = {
    "Faster R-CNN, conv neck, conv head",
    "Mask R-CNN, conv, conv",
    "RetinaNet, inv neck",
    "Semantic FPN, inv neck",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_cell(row) -> None:
    counted = count_row(row)
    got = (
        f"{counted.params_trainable / 1e6:.4f}",
        f"{counted.counted / 1e9:.4f}",
        f"{counted.total / 1e9:.3f}",
        f"{counted.mac / 1e9:.3f}",
    )
    assert got == PRINTED[row.name]
    printed = f"{row.printed[0]} / {row.printed[1]}" if row.printed else "-"
    assert f"| {row.name} | {printed} | {got[0]} / {got[1]} | {got[2]} | {got[3]} |" in RESULTS
    said = disagreement(row, counted)
    assert ("its own rules give" in said) == (row.name in ROUNDED_OTHERWISE)  # else printed = counted
    assert ("another stem" in said) == (row.name.startswith("RedNet") or row.name in OTHER_STEM)
    assert ("mask_fcn_logits" in said) == (row.name in ("Mask R-CNN, conv, conv", "Mask R-CNN, inv, conv"))


def test_the_two_conventions_of_torch_and_ours_agree_on_products() -> None:
    import torch

    for name in ("rednet26", "resnet26_paper"):
        model = timm.create_model(name).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224, device="meta"))
        assert cost(model).multiply_adds == counter.get_total_flops() // 2


def test_operations_add_up_and_name_modules() -> None:
    model = timm.create_model("rednet14_cifar")
    found = cost(model, (3, 32, 32))
    modules = dict(model.named_modules())
    assert all(operation.module in modules for operation in found.operations)
    assert {operation.kind for operation in found.operations} >= {"Conv2d", "Involution2d", "BatchNorm2d", "ReLU"}
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.stem.requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in model.stem.parameters())
    assert cost(model, (3, 32, 32)).trainable == found.parameters - frozen > 0


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--published", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in rows] == list(PRINTED)
    assert all(list(row) == ["row", "params_trainable", "counted", "total", "mac"] for row in rows)
    assert all(type(value) is int for row in rows for name, value in row.items() if name != "row")
    assert main(["cost", "rednet14_cifar", "--layers", "--format", "json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert model["input_size"] == [3, 32, 32]
    assert sum(layer["multiply_adds"] for layer in model["layers"]) == model["mac"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "RedNet-50"]) == 0
    assert "2.7132" in capsys.readouterr().out
    assert main(["cost", "rednet50", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "layer4.2.conv2" in out
    assert "its convolutional counterpart resnet50: 25,557,032 parameters" in out
    assert "saves 39.2% of the parameters" in out


@pytest.mark.parametrize("wrong", [[], ["rednet50", "--published"], ["rednet51"]])
def test_wrong_calls(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *wrong]) == 2
    assert "involution cost:" in capsys.readouterr().err


def test_no_gigabytes() -> None:
    """Counting, here the largest rows, computes nothing: memory grows little beyond what the imports take."""
    code = """
import resource, timm
from involution.cost.published import ROWS, count_row
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len([count_row(row) for row in ROWS if row.name in ("ResNet-152", "Mask R-CNN R50", "UPerNet R50")]) == 3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # MiB: the weights of one network, initialised before the move to the meta device
