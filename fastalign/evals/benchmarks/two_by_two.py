"""Two images and two captions that belong together crosswise: Winoground's and BiVLC's scores.

Four comparisons: for each image, is its own caption preferred; for each caption, is its own image?
With the method ``match`` each of the four image-caption pairs gets a score, s[i][c], and preferred
means strictly higher. Otherwise the two are offered side by side, in both orders (for images, the
model must take two).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..benchmark import Verdict
from ..images import Picture
from ..protocols import ORDERS, Ask, Reply, Wording, matches, read_pair, which_caption, which_image


@dataclass(frozen=True)
class Square:
    """Caption i belongs to image i."""

    id: str
    where: str
    images: tuple[Picture, Picture]
    captions: tuple[str, str]
    group: str


def ask(sample: Square, wording: Wording) -> list[Ask]:
    if wording.method == "match":
        return [
            matches(f"image{i}-caption{c}", sample.images[i], sample.captions[c])
            for i in (0, 1)
            for c in (0, 1)
        ]
    asks = []
    for own, other in ((0, 1), (1, 0)):
        right, wrong = sample.captions[own], sample.captions[other]
        asks += which_caption(f"image{own}-", sample.images[own], right, wrong, wording)
        images = sample.images[own], sample.images[other]
        asks += which_image(f"caption{own}-", right, *images, wording)
    return asks


def judge(sample: Square, replies: Mapping[str, Reply]) -> Verdict:
    """``to_text``: of each image, whether its caption won; ``to_image``: of each caption, its image."""
    unread = 0
    if "image0-caption0" in replies:
        s = [[replies[f"image{i}-caption{c}"].scores[0] for c in (0, 1)] for i in (0, 1)]
        to_text = [s[0][0] > s[0][1], s[1][1] > s[1][0]]
        to_image = [s[0][0] > s[1][0], s[1][1] > s[0][1]]
    else:
        to_text, to_image = [], []
        for own, other in ((0, 1), (1, 0)):
            first, second = (replies[f"image{own}-{order}"] for order in ORDERS)
            caption = read_pair(first, second, (sample.captions[own], sample.captions[other]))
            first, second = (replies[f"caption{own}-{order}"] for order in ORDERS)
            image = read_pair(first, second)
            to_text.append(caption.wins)
            to_image.append(image.wins)
            unread += caption.unread + image.unread
    return {
        "group": sample.group,
        "to_text": to_text,
        "to_image": to_image,
        "both": all(to_text) and all(to_image),
        "unread": unread,
    }
