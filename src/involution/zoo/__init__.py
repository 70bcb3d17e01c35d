"""RedNet, its convolutional counterparts, feature pyramids, and warm starts from a ResNet's weights.

Importing this package registers the networks with timm: ``timm.create_model("rednet50", num_classes=10)``.
"""

try:
    import timm  # noqa: F401  (for an error that names the extra)
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    missing = "involution.zoo needs timm, not installed here: pip install 'involution[zoo]'"
    raise ModuleNotFoundError(missing, name="timm") from error

from . import resnet
from .identify import load_checkpoint
from .pretrained import Published, pretrained
from .rednet import RedNet
from .warm_start import WarmStart, load_resnet

__all__ = ["Published", "RedNet", "WarmStart", "load_checkpoint", "load_resnet", "pretrained", "resnet"]
