"""Entry points of torch.hub: `torch.hub.load(FOLDER_OR_REPOSITORY, "rednet50", pretrained=True, num_classes=1000)`.

They are those of timm's registry that `involution.zoo` registers; arguments are timm.create_model's. Where this folder
has no compiled kernels, the operator runs in plain PyTorch and says so once.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))  # torch.hub does not install a repository

import timm

import involution.zoo

dependencies = ["torch", "timm"]

for _name in timm.list_models(module="rednet"):
    globals()[_name] = partial(timm.create_model, _name)
    globals()[_name].__doc__ = timm.model_entrypoint(_name).__doc__


def load_checkpoint(file: str) -> "involution.zoo.RedNet":
    """The RedNet of a file of weights, see `involution.zoo.load_checkpoint`."""
    return involution.zoo.load_checkpoint(file)
