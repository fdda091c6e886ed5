"""Source `phantom`: procedural chest radiographs, encoded and then read back through the real decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from place.config import PrepareConfig
from place.data.identity import PHANTOM_SALT, IdHasher, compute_split, describe_hash_split
from place.data.masks import SourceMask, encode_mask
from place.data.rows import Row, Table

if TYPE_CHECKING:
    from place.data.phantom import PhantomStudy


def open_phantom(config: PrepareConfig) -> Table:
    """`count` studies of a seed, with labels, boxes and the sentence of each box. Source: ours."""
    from place.data.phantom import FINDINGS

    rule = describe_hash_split(config.seed, config.split)
    return Table(PhantomRows(config, 0, config.count), list(FINDINGS), rule, [], "phantom")


class PhantomRows:
    """Studies that are generated when they are iterated over: in the task, not in the process that hands tasks out."""

    ids = IdHasher(PHANTOM_SALT)

    def __init__(self, config: PrepareConfig, begin: int, end: int):
        self.config, self.begin, self.end = config, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, where: slice) -> PhantomRows:
        begin, end, _ = where.indices(len(self))
        return PhantomRows(self.config, self.begin + begin, self.begin + end)

    def __iter__(self) -> Iterator[Row]:
        from place.data.phantom import generate_study

        for index in range(self.begin, self.end):
            yield self._build_row(index, generate_study(self.config.seed, index, self.config.size_px))

    def _build_row(self, index: int, study: PhantomStudy) -> Row:
        ids = self.ids
        sentences = [("findings", text) for text in study.findings] + [
            ("impression", text) for text in study.impression
        ]
        return Row(
            number=index,
            sample_id=ids.number("image", f"phantom {self.config.seed} {index}"),
            patient=ids.code("patient", study.patient),
            study=ids.code("study", study.study),
            split=compute_split(study.patient, self.config.seed, self.config.split),
            image=self._encode(study),
            sections=tuple(sentences),
            view=study.view,
            labels=dict(study.labels),
            boxes=tuple(_build_boxes(study)),
            masks=tuple(_build_masks(study)),
        )

    def _encode(self, study: PhantomStudy) -> bytes:
        from place.data.phantom import encode_dicom, encode_jpeg

        return encode_dicom(study) if self.config.phantom_format == "dicom" else encode_jpeg(study.image_YX)


def _build_boxes(study: PhantomStudy) -> Iterator[dict[str, Any]]:
    """A box for each finding, with the first sentence that tells of it."""
    for number, region in enumerate(study.regions):
        told = number in study.region_of_sentence
        yield {
            "finding": region.finding,
            "side": region.side,
            "severity": region.severity,
            "box_xyxy": list(region.box_xyxy),
            "sentence": study.region_of_sentence.index(number) if told else None,
        }


def _build_masks(study: PhantomStudy) -> Iterator[SourceMask]:
    """The mask of each finding, and for each finding that is not there, that it is not."""
    for number, region in enumerate(study.regions):
        yield SourceMask(region.finding, encode_mask(region.mask_YX), number)
    for finding, positive in study.labels.items():
        if not positive:
            yield SourceMask(finding, b"")
