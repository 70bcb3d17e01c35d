"""The check of a network and its example input before it is optimised or exported for inference."""

from typing import Any

from torch import Tensor, nn


def check_inference(network: Any, example: Any, network_name: str, example_name: str) -> None:
    """Raises unless a network is a module in evaluation mode and its example input a tensor.

    Args:
        network: the network.
        example: its example input.
        network_name: the argument's name in errors.
        example_name: likewise.

    Raises:
        TypeError: network is no module, or example no tensor.
        ValueError: the network, or a part of it, is in training mode.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"{network_name} must be an nn.Module, got {type(network).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"{example_name} must be a torch.Tensor, got {type(example).__name__}")
    for name, module in network.named_modules():
        if module.training:
            raise ValueError(
                f"{network_name} must be in evaluation mode ({network_name}.eval()), but "
                f"{name or f'the {network_name} itself'} is in training mode"
            )
