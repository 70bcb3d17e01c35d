"""CamVid's road scenes, as SegNet's authors distribute them."""

from typing import Any

from .folders import Folders

_CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


class CamVid(Folders):
    """CamVid as SegNet's authors distribute it: 367, 101 and 233 road scenes of 480x360, eleven classes.

    root/{train,val,test}/images and root/{train,val,test}/labels; id 11 (unlabelled) is ignored.

    Args:
        root: the tree.
        **segmentation: see `SegmentationData`.
    """

    def __init__(
        self, root: str, resize: int = 360, crop: tuple[int, int] | int = (360, 480), **segmentation: Any
    ) -> None:
        super().__init__(
            root,
            list(_CAMVID),
            images="{split}/images",
            masks="{split}/labels",
            test="test",
            ignore_index=len(_CAMVID),
            palette=list(_CAMVID.values()),
            resize=resize,
            crop=crop,
            **segmentation,
        )
