"""Anchors, and which true box an anchor or a proposal belongs to, as the published detectors have them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class Anchors(AnchorGenerator):
    """Anchors at the levels' own strides and of sizes as they are, float32 whatever the features' dtype.

    torchvision rounds them to whole pixels, takes the features' dtype, which bfloat16 coordinates do not fit into, and
    divides the image's size by the level's for the stride: 61 in the place of 64 where the level's size is rounded up.

    Args:
        strides: of the levels, in pixels.
        scales: sizes of a level's anchors, as multiples of its stride; an anchor's area is the square of its size.
        ratios: height over width.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float]) -> None:
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (torchvision's signature)
    ) -> Tensor:
        """A position's anchors around the origin, [ratios * scales, 4]."""
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        right, bottom = (sizes / roots).flatten() / 2, (sizes * roots).flatten() / 2
        return torch.stack([-right, -bottom, right, bottom], dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """All levels' anchors of every image, [A, 4] float32 (left, top, right, bottom) in pixels."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class Matcher(TorchvisionMatcher):
    """torchvision's; afterwards every true box takes the anchors or proposals that overlap most with it.

    One of them can so belong to a box that it overlaps less with than with another; where several boxes want it, it is
    the last one's. (Where torchvision matches low qualities, it stays with the box that it overlaps most with, and
    there is no least IoU.)

    Args:
        high_threshold: IoU from which on an anchor or proposal is positive.
        low_threshold: IoU below which it is negative; between the two it is neither.
        min_quality: IoU that a box's best match must have, and more than 0; None has no such matches.
    """

    def __init__(self, high_threshold: float, low_threshold: float, min_quality: float | None = None) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=min_quality is not None)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """IoU [boxes, predictions] -> the box of each prediction, [predictions] int64; -1 negative, -2 neither."""
        if match_quality_matrix.shape[1] == 0:
            return match_quality_matrix.new_empty(0, dtype=torch.int64)
        matches: Tensor = super().__call__(match_quality_matrix)
        return matches

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Changes `matches` in place."""
        assert self.min_quality is not None
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        wanted = (match_quality_matrix == best) & (best >= self.min_quality) & (best > 0)
        boxes, predictions = torch.where(wanted)
        last = torch.full_like(matches, -1).scatter_reduce_(0, predictions, boxes, "amax")
        matches.copy_(torch.where(last >= 0, last, matches))
