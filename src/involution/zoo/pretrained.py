"""The published weights of RedNet: network, publisher, file, licence and published accuracy."""

from typing import NamedTuple

from .rednet import default_cfgs

NOT_VERIFIED = "not verified by us"  # no file could be fetched where this was written


class Published(NamedTuple):
    """Published weights.

    `name` is the network's in timm's registry, with a tag if `timm.create_model(name, pretrained=True)` downloads them;
    `source` the publisher; `url` the file, or the page that links to it; `top1` the published accuracy on ImageNet's
    validation images, in percent; `licence` the publisher's; `status` whether we have verified the file.
    """

    name: str
    source: str
    url: str
    top1: float
    licence: str
    status: str

    def __str__(self) -> str:
        """All fields in a line."""
        return (
            f"{self.name}: top-1 {self.top1} % as published by {self.source}, {self.licence}, {self.status}; {self.url}"
        )


# The tables of both repositories: README.md of d-li14/involution (21c3158), docs/en/models/RedNet_en.md of
# PaddlePaddle/PaddleClas (d178931).
_OFFICIAL = "https://github.com/d-li14/involution#model-zoo"
_TOP1 = {  # depth: official, PaddleClas
    26: (75.96, 75.95),
    38: (77.48, 77.47),
    50: (78.35, 78.33),
    101: (78.92, 78.94),
    152: (79.12, 79.17),
}


def pretrained() -> list[Published]:
    """All published weights of RedNet for ImageNet that are known.

    PaddleClas's are what `pretrained=True` downloads. The official ones are links in a table, to be opened in a
    browser; `involution convert` reads the files. Accuracies are the publishers', measured by them.
    """
    found = []
    for depth, (official, paddle) in _TOP1.items():
        name, tag = f"rednet{depth}", "paddle_in1k"
        url = str(default_cfgs[name].cfgs[tag].url)
        found.append(Published(f"{name}.{tag}", "PaddleClas", url, paddle, "Apache-2.0", NOT_VERIFIED))
        found.append(Published(name, "d-li14/involution", _OFFICIAL, official, "MIT", NOT_VERIFIED))
    return found
