"""Masks of objects: 28x28 training targets of regions, and pasting 28x28 outputs into the image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

CHUNK = 1 << 20  # pixels sampled at a time: 16 MiB of coordinates and values


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The target of each box: the part of its object's mask inside the box, by RoIAlign, binarised at 0.5.

    Args:
        masks: [n, H, W] of 0 and 1, of the true objects of an image.
        boxes: [k, 4] float32, left, top, right, bottom in pixels.
        matched: [k] int64, the object of each box.
        size: height and width of the result.

    Returns:
        [k, size, size] float32 of 0 and 1.
    """
    regions = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    cut = roi_align(masks[:, None].float(), regions, (size, size), 1.0, 0, aligned=True)
    return (cut[:, 0] >= 0.5).float()


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], chunk: int = CHUNK) -> Tensor:
    """Masks in an image: bilinear sampling at the sub-pixel box, thresholded at 0.5.

    Memory besides the result (one byte per pixel and mask) is 16 bytes for each of `chunk` pixels, whatever the image's
    size and the number of masks: the rows of a box are sampled and thresholded chunk by chunk.

    Args:
        masks: [n, 1, m, m] float, probabilities inside a box; they are 0 outside.
        boxes: [n, 4], left, top, right, bottom in pixels of the image, which need not be integers.
        size: height and width of the image.
        chunk: pixels sampled at a time, but at least one row.

    Returns:
        [n, 1, *size] bool.
    """
    height, width = size
    boxes = boxes.float()
    result = torch.zeros(len(masks), 1, height, width, dtype=torch.bool, device=masks.device)
    for mask, box, into in zip(masks.float(), boxes.tolist(), result[:, 0], strict=True):
        left, top, right, bottom = box
        first, last = max(0, math.floor(left)), min(width, math.ceil(right))
        if first >= last:
            continue  # outside the image
        x = _centres(first, last, left, right, boxes.device)
        begin, end = max(0, math.floor(top)), min(height, math.ceil(bottom))
        rows = max(1, chunk // len(x))
        for row in range(begin, end, rows):
            y = _centres(row, min(row + rows, end), top, bottom, boxes.device)
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
            sampled = F.grid_sample(mask[None], grid[None], mode="bilinear", align_corners=False)
            into[row : row + len(y), first:last] = sampled[0, 0] >= 0.5
    return result


def _centres(first: int, last: int, begin: float, end: float, device: torch.device) -> Tensor:
    """The centres of pixels in grid_sample's coordinates, in which the box from `begin` to `end` is -1 to 1."""
    centres = torch.arange(first, last, dtype=torch.float32, device=device) + 0.5
    return (centres - begin) * (2 / max(end - begin, 1e-6)) - 1
