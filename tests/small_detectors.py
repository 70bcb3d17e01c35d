"""Sizes of detectors that tests build and train in seconds."""

from typing import Any

# A RedNet of one narrow block per stage. Group norm, because running statistics of a few images are meaningless.
NARROW: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "norm_layer": "groupnorm1"}
SMALL: dict[str, Any] = {"backbone": "rednet26", "min_size": 64, "max_size": 96, "backbone_kwargs": NARROW}

# Few regions, which take most of the time of Faster and Mask R-CNN.
FEW: dict[str, int] = {"box_batch_size_per_image": 32, "box_detections_per_img": 10} | {
    f"rpn_{when}_nms_top_n_{part}": number
    for part in ("train", "test")
    for when, number in (("pre", 200), ("post", 60))
}
