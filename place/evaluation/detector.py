"""A detector on a frozen encoder's patch tokens: ViTDet's simple feature pyramid under torchvision's FCOS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from place.compat import permit_nms
from place.config import DetectionConfig
from place.evaluation.heads import CPU, build_schedule, build_seeded, train_on_tokens

permit_nms()
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.fcos import (  # noqa: E402
    FCOS,
    FCOSClassificationHead,
    FCOSHead,
    FCOSRegressionHead,
)
from torchvision.models.detection.image_list import ImageList  # noqa: E402

MAX_LEVELS, MAX_WIDTH, CONVOLUTIONS = 4, 256, 2
LEAST_SCORE, MOST_CANDIDATES, MOST_BOXES, OVERLAP = 0.05, 100, 20, 0.6


class Boxes(NamedTuple):
    """Of an image: corners x0, y0, x1, y1 in pixels (P,4) fp32, finding of each (P,) int64; scores (P,) of guesses."""

    box_P4: Tensor
    finding_P: Tensor
    score_P: Tensor | None = None


class BoxedSplit(NamedTuple):
    """Tokens fp32 (B,N,D) of images, and the boxes of each."""

    tokens_BND: Tensor
    boxes: list[Boxes]


class SimplePyramid(nn.Module):
    """Maps of twice, once, half and a quarter of the grid, as far as the grid can be halved, from its tokens alone.

    Source: quoted (Li et al. 2022, ViTDet: no lateral connections; 1x1 and 3x3 convolution with a norm a level).
    """

    def __init__(self, width: int, side: int, out_channels: int):
        super().__init__()
        self.side, self.out_channels = side, out_channels
        scales: list[nn.Module] = [nn.ConvTranspose2d(width, width, 2, stride=2), nn.Identity()]
        while side % 2 == 0 and len(scales) < MAX_LEVELS:
            scales.append(nn.MaxPool2d(2 ** (len(scales) - 1)))
            side //= 2
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, out_channels, 1, bias=False),
                nn.GroupNorm(1, out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                nn.GroupNorm(1, out_channels),
            )
            for scale in scales
        )

    def forward(self, tokens_BND: Tensor) -> list[Tensor]:
        """Maps, the finest first."""
        grid_BDYX = tokens_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        return [level(grid_BDYX) for level in self.levels]


def choose_width(width: int) -> int:
    """Channels of a pyramid over tokens: half of theirs, in steps of 32, at most `MAX_WIDTH`."""
    return min(MAX_WIDTH, max(32, width // 64 * 32))


class Detector(nn.Module):
    """Boxes of F findings. The pyramid is as wide as half of the tokens, in steps of 32, at most 256.

    Source: quoted (Tian et al. 2019, FCOS, as torchvision has it); two convolutions a branch instead of four are ours.
    """

    def __init__(self, width: int, num_patches: int, size_px: int, num_findings: int):
        super().__init__()
        side = round(num_patches**0.5)
        channels = choose_width(width)
        pyramid = SimplePyramid(width, side, channels)
        patch_px = size_px / side
        sizes = [int(patch_px / 2 * 2**level) for level in range(len(pyramid.levels))]
        self.size_px = size_px
        self.fcos = FCOS(
            pyramid,
            num_findings,
            anchor_generator=AnchorGenerator(tuple((size,) for size in sizes), ((1.0,),) * len(sizes)),
            head=_build_head(channels, num_findings),
            score_thresh=LEAST_SCORE,
            nms_thresh=OVERLAP,
            detections_per_img=MOST_BOXES,
            topk_candidates=MOST_CANDIDATES,
        )

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    def _read(self, tokens_BND: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Outputs of the head, the anchors of each image, and how many each level has."""
        maps = self.fcos.backbone(tokens_BND)
        frame = ImageList(tokens_BND.new_empty(1, 1, self.size_px, self.size_px), self._list_sizes(tokens_BND))
        anchors = self.fcos.anchor_generator(frame, maps)
        return self.fcos.head(maps), anchors, [level.shape[2] * level.shape[3] for level in maps]

    def _list_sizes(self, tokens_BND: Tensor) -> list[tuple[int, int]]:
        return [(self.size_px, self.size_px)] * len(tokens_BND)

    def compute_loss(self, tokens_BND: Tensor, boxes: Sequence[Boxes]) -> Tensor:
        """Sum of FCOS's three losses: focal, generalised IoU, centredness."""
        device = self.device
        outputs, anchors, counts = self._read(tokens_BND.to(device))
        targets = [{"boxes": truth.box_P4.to(device), "labels": truth.finding_P.to(device)} for truth in boxes]
        losses = self.fcos.compute_loss(targets, outputs, anchors, counts)
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()
    def predict(self, tokens_BND: Tensor) -> list[Boxes]:
        """Boxes of each image on the CPU, the surest first, after suppression of overlaps."""
        found: list[Boxes] = []
        for part_BND in tokens_BND.split(64):
            outputs, anchors, counts = self._read(part_BND.to(self.device))
            levels = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
            cut: list[Any] = [list(anchor.split(counts)) for anchor in anchors]
            guesses = self.fcos.postprocess_detections(levels, cut, self._list_sizes(part_BND))
            found += [Boxes(*(guess[name].cpu() for name in ("boxes", "labels", "scores"))) for guess in guesses]
        return found


def _build_head(channels: int, num_findings: int) -> FCOSHead:
    """FCOS's head with its 8 channels a group; torchvision's 32 groups would leave a narrow one with a channel each."""
    head, norm = FCOSHead(channels, 1, num_findings, CONVOLUTIONS), partial(nn.GroupNorm, channels // 8)
    head.classification_head = FCOSClassificationHead(channels, 1, num_findings, CONVOLUTIONS, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, CONVOLUTIONS, norm)
    # Distances are cut at 0: one that starts there has no gradient and never leaves.
    nn.init.ones_(head.regression_head.bbox_reg.bias)
    return head


def train_detector(
    train: BoxedSplit,
    val: BoxedSplit,
    size_px: int,
    num_findings: int,
    config: DetectionConfig,
    on_progress: Callable[[int], None] | None = None,
    device: torch.device = CPU,
) -> tuple[Detector, int]:
    """Train a detector as `evaluation.detection` says; the weights with the least validation loss are kept.

    Args:
        device: of the detector; the splits stay where they are.
    Returns:
        The detector in eval mode, and the step that its weights are of.
    """
    _, num_patches, width = train.tokens_BND.shape
    detector = build_seeded(lambda: Detector(width, num_patches, size_px, num_findings), config.seed).to(device)

    def compute_train_loss(rows: Tensor) -> Tensor:
        return detector.compute_loss(train.tokens_BND[rows], [train.boxes[row] for row in rows.tolist()])

    def compute_val_loss() -> float:
        starts = range(0, len(val.boxes), 64)
        losses = [detector.compute_loss(val.tokens_BND[at : at + 64], val.boxes[at : at + 64]) for at in starts]
        return float(torch.stack(losses).mean())

    schedule = build_schedule(config)
    return train_on_tokens(
        detector, compute_train_loss, compute_val_loss, len(train.boxes), schedule, config.seed, on_progress
    )
