"""RedNet in torchvision's registry, docs/training-code.md: what its references' train.py asks for."""

import re
from pathlib import Path

import timm
import torch
import torchvision

PAGE = Path(__file__).parents[2] / "docs" / "training-code.md"


def test_the_pages_file_registers_a_network() -> None:
    [block] = [
        one for one in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "register_model" in one
    ]
    exec(block, {"__name__": "beside_train"})
    assert "rednet50" in torchvision.models.list_models()
    torch.manual_seed(0)
    model = torchvision.models.get_model("rednet50", weights=None, num_classes=7)  # train.py's call
    torch.manual_seed(0)
    ours = timm.create_model("rednet50", num_classes=7)
    assert all(torch.equal(one, ours.state_dict()[name]) for name, one in model.state_dict().items())
