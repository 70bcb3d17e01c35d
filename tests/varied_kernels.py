"""Networks whose kernels differ from position to position, for the tests of their pictures."""

import torch

from involution.nn import BottleneckGenerator
from involution.show.subject import Subject


def randomised(model: Subject) -> Subject:
    """The same, with random weights from features to kernels."""
    torch.manual_seed(0)
    for module in model.network.modules():
        if isinstance(module, BottleneckGenerator):
            torch.nn.init.normal_(module.span.weight, std=0.1)
    return model
