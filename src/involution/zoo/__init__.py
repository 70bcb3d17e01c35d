"""Networks made of involutions, and their twins made of convolutions.

Importing this package registers them with timm: ``timm.create_model("rednet50", num_classes=10)``.
"""

from . import resnet
from .rednet import RedNet
from .warm_start import WarmStart, load_resnet

__all__ = ["RedNet", "WarmStart", "load_resnet", "resnet"]
