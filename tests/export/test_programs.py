"""torch.export programs and AOTInductor packages, and the errors of tracing."""

import json
from pathlib import Path

import pytest
import torch
from elsewhere import CHECK, elsewhere
from torch import nn

from involution.export import decompositions, to_aoti, to_pt2, trace
from involution.nn import Involution2d


def randomised() -> nn.Module:
    torch.manual_seed(0)
    layer = Involution2d(16, 3, stride=2).eval()
    nn.init.normal_(layer.generator.span.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return layer


def test_a_program_keeps_the_operators_and_reads_back(tmp_path: Path) -> None:
    layer, images = randomised(), torch.randn(3, 16, 11, 8)
    to_pt2(trace(layer, torch.randn(2, 16, 8, 9)), tmp_path / "kept.pt2", {"classes": ["a"]})
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "kept.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == {"classes": ["a"]}
    assert any("involution" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), layer(images), rtol=1e-5, atol=1e-5)


def test_a_decomposed_program_runs_without_this_package(tmp_path: Path) -> None:
    layer, images = randomised(), torch.randn(3, 16, 11, 8)
    to_pt2(trace(layer, torch.randn(2, 16, 8, 9)), tmp_path / "standard.pt2", keep=False)
    torch.save(images, tmp_path / "x.pt")
    with torch.no_grad():
        torch.save(layer(images), tmp_path / "y.pt")
    assert elsewhere("run = torch.export.load('standard.pt2').module()" + CHECK, tmp_path) == "agrees\n"


@pytest.mark.slow
def test_an_aoti_package_runs_without_this_package(tmp_path: Path) -> None:
    layer, images = randomised(), torch.randn(3, 16, 8, 9)
    metadata = {"classes": ['with "quotes"', "b"], "task": "classify"}
    to_aoti(trace(layer, torch.randn(2, 16, 8, 9), dynamic=(0,)), tmp_path / "package.pt2", metadata)
    torch.save(images, tmp_path / "x.pt")
    with torch.no_grad():
        torch.save(layer(images), tmp_path / "y.pt")
    code = "run = torch._inductor.aoti_load_package('package.pt2'); print(run.get_metadata()['classes'])"
    assert elsewhere("import torch._inductor\n" + code + CHECK, tmp_path) == '["with \\"quotes\\"", "b"]\nagrees\n'


def test_decompositions_keep_pytorchs_own() -> None:
    ours, theirs = decompositions(), torch.export.default_decompositions()
    assert set(theirs) < set(ours)
    assert {operator.namespace for operator in set(ours) - set(theirs)} == {"involution"}


def test_wrong_arguments() -> None:
    layer = randomised()
    with pytest.raises(ValueError, match=r"example must have at least 2 images.*got \[1, 16, 8, 8\]"):
        trace(layer, torch.randn(1, 16, 8, 8))
    layer.generator.norm.train()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"generator\.norm is in training mode"):
        trace(layer, torch.randn(2, 16, 8, 8))
    with pytest.raises(TypeError, match=r"network must be an nn.Module, got function"):
        trace(lambda x: x, torch.randn(2, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"example must be a torch.Tensor, got tuple"):
        trace(nn.ReLU().eval(), (1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"file must end in .pt2 for AOTInductor, got a.so"):
        to_aoti(None, Path("a.so"))  # type: ignore[arg-type]
