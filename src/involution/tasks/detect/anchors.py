"""Anchors, and the matching of anchors and proposals with true boxes, as in the published detectors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

RATIOS = (0.5, 1.0, 2.0)  # of all detectors' anchors: height over width


class Anchors(AnchorGenerator):
    """Anchors at the levels' strides, not rounded, in float32 whatever the features' dtype.

    torchvision rounds anchors to whole pixels, computes them in the features' dtype (bfloat16 cannot represent the
    coordinates), and computes a stride as image size // level size: 61 instead of 64 for a level whose size was
    rounded up.

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
        """The anchors of one position, centred at the origin, [ratios * scales, 4]."""
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
    """torchvision's matcher, with the published rule for low-quality matches.

    Every true box also matches the anchors or proposals of its maximum IoU, even if those overlap more with another
    box; the last box wins where several have the same maximum. (torchvision's low-quality matches keep the box that the
    anchor overlaps most with, and have no minimum IoU.)

    Args:
        high_threshold: minimum IoU of a positive anchor or proposal.
        low_threshold: IoU below which one is negative; between the two it is neither.
        min_quality: minimum IoU of a low-quality match, which must also exceed 0; None has no such matches.
    """

    def __init__(self, high_threshold: float, low_threshold: float, min_quality: float | None = None) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=min_quality is not None)
        self.min_quality = min_quality

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """IoU [boxes, predictions] -> box index of each prediction, [predictions] int64; -1 negative, -2 neither."""
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
