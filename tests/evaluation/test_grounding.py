"""The grounding task: which phrases are judged, on which maps, and that a model which looks at the box is found out."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from place.config import EvaluationConfig, UsageError
from place.data.prepared import read_samples
from place.evaluation import grounding
from place.evaluation.encoder import PatchFeatures, encode_images, encode_occluded, encode_patches, read_images
from place.evaluation.grounding import Judged, Phrase, build_maps, build_prior, list_phrases, summarize_phrases
from place.evaluation.task import Task, TaskInput
from place.model.place import TextFeatures
from place.training.checkpoint import load_run

SIDE = 4


@pytest.fixture(scope="module")
def run(run_dir):
    return load_run(run_dir)


def build_task(run, data_dir, folder=None, **options) -> Task:
    evaluation = EvaluationConfig(bootstrap=50, batch_size=16, **options)
    return Task(TaskInput(run, data_dir, {"labels": ["effusion", "edema"]}, "test", evaluation, folder=folder))


def build_sample(**boxes) -> dict:
    sentences = [{"section": "findings", "text": text} for text in ("One.", "Two.")]
    image = cv2.imencode(".png", np.zeros((100, 60), np.uint8))[1].tobytes()
    return {"sample_id": 5, "image": image, "sentences": sentences, "boxes": list(boxes.values())}


def build_judged(finding: str, value: float) -> Judged:
    return Judged(Phrase(0, "One.", finding, [], 8), {"patch": {"cnr": value}})


def test_boxes_of_one_sentence_are_one_phrase_in_the_frame_of_the_square():
    box = {"finding": "nodule", "box_xyxy": [0, 30, 10, 40]}
    sample = build_sample(
        a=box | {"sentence": 1},
        b=box | {"sentence": 1, "box_xyxy": [20, 30, 30, 40]},
        c=box | {"sentence": 0, "phrase": "My own words."},
        untold=box | {"sentence": None},
        unseen=box | {"sentence": 1, "box_xyxy": [0, 0, 9, 19]},
    )
    assert list(list_phrases(sample)) == [
        Phrase(5, "Two.", "nodule", [(0, 10, 10, 20), (20, 10, 30, 20)], 60),
        Phrase(5, "My own words.", "nodule", [(0, 10, 10, 20)], 60),
    ]


def test_maps_are_the_patch_cosine_and_the_attention_of_the_nearest_observation():
    generator = torch.Generator().manual_seed(0)
    patches, observations, attention = (
        torch.randn(2, n, w, generator=generator) for n, w in ((16, 8), (3, 8), (3, 16))
    )
    text, sentence = torch.randn(5, 8, generator=generator), torch.randn(5, 4, 8, generator=generator)
    maps = build_maps(
        PatchFeatures(patches, observations, attention), TextFeatures(text, sentence, torch.ones(5, 4) > 0), 1, 3
    )
    assert maps["patch"][2, 1] == pytest.approx(float(patches[1, 2 * SIDE + 1] @ text[3]), abs=1e-6)
    nearest = max(range(3), key=lambda k: float(observations[1, k] @ sentence[3, 0]))
    assert np.array_equal(maps["attention"].ravel(), attention[1, nearest].numpy())


def test_patches_go_through_the_projection_of_the_image(run, data_dir):
    jpegs = [sample["image"] for sample in read_samples(data_dir, "test")][:3]
    patches, images = encode_patches(run, jpegs), encode_images(run, jpegs)
    assert patches.patches_BNE.shape == (3, 16, 8)
    assert torch.allclose(patches.patches_BNE.norm(dim=-1), torch.ones(3, 16), atol=1e-5)
    assert torch.allclose(patches.attention_BKN, images.attention_BKN, atol=1e-6)
    assert torch.allclose(patches.observations_BKE, images.observations_BKE, atol=1e-6)


def test_an_occluded_image_has_each_patch_and_its_neighbours_at_the_mean_grey(run, data_dir):
    jpeg = next(read_samples(data_dir, "test"))["image"]
    image, patch_px = read_images(run, [jpeg]), run.model.vision.patch_px
    occluded = encode_occluded(run, jpeg, batch_size=5)
    assert occluded.shape == (SIDE * SIDE, 8)
    for row in range(SIDE):
        for column in range(SIDE):
            hidden = image.clone()
            top, left = max(row - 1, 0) * patch_px, max(column - 1, 0) * patch_px
            hidden[:, :, top : (row + 2) * patch_px, left : (column + 2) * patch_px] = 0
            expected = run.model.encode_image(hidden).image_BE[0]
            assert torch.allclose(occluded[row * SIDE + column], expected, atol=1e-5)


def test_the_map_of_occlusion_is_largest_where_the_cosine_falls(run, data_dir, monkeypatch):
    # The patch in row 2, column 0 is covered by the box; the words' feature is the whole image's.
    def hide(_, jpeg, batch_size):
        features = torch.eye(8)[0].repeat(16, 1)
        features[2 * SIDE] = torch.eye(8)[1]
        return features

    monkeypatch.setattr(grounding, "encode_occluded", hide)
    monkeypatch.setattr(
        grounding,
        "encode_reports",
        lambda _, reports: TextFeatures(
            torch.eye(8)[:1].repeat(len(reports), 1), torch.ones(len(reports), 4, 8), torch.ones(len(reports), 4) > 0
        ),
    )
    result = grounding.run_grounding(build_task(run, data_dir, occlusion=True))
    assert result.metrics["occlusion.mean_pointing_game"] == (1, 1, 1)
    assert result.metrics["occlusion.mean_cnr"].value > 1
    assert "occlusion" in result.protocol["other_scores"]
    assert "occlusion.mean_cnr" not in grounding.run_grounding(build_task(run, data_dir)).metrics


def test_a_model_that_looks_at_its_box_scores_full_and_the_picture_is_drawn(run, data_dir, tmp_path, monkeypatch):
    # The box of the data set, (4, 40, 24, 60) of 72 x 64 pixels, covers the patch in row 2, column 0.
    def look(_, jpegs):
        patches = torch.zeros(len(jpegs), 16, 8)
        patches[:, 2 * SIDE] = 1
        return PatchFeatures(patches, torch.ones(len(jpegs), 3, 8), torch.full((len(jpegs), 3, 16), 1 / 16))

    def read(_, reports):
        return TextFeatures(
            torch.ones(len(reports), 8), torch.ones(len(reports), 4, 8), torch.ones(len(reports), 4) > 0
        )

    monkeypatch.setattr(grounding, "encode_patches", look)
    monkeypatch.setattr(grounding, "encode_reports", read)
    result = grounding.run_grounding(build_task(run, data_dir, tmp_path))
    with_box = sum(bool(sample["boxes"]) for sample in read_samples(data_dir, "test"))
    assert result.num_samples == with_box == result.protocol["findings"]["effusion"]["phrases"]
    assert result.metrics["mean_pointing_game"] == (1, 1, 1)
    assert result.metrics["mean_cnr"].value > 1
    # Even attention is at chance: a sixteenth of the patches' centres is inside the box.
    assert result.metrics["attention.mean_pointing_game"].value == pytest.approx(1 / 16)
    assert result.metrics["attention.mean_cnr"].value == 0
    # All boxes are alike: the training boxes touch four patches, the centre of one of which is inside.
    assert result.metrics["prior.mean_pointing_game"].value == 0.25
    assert "miou_cosine.effusion" in result.metrics
    assert "attention.miou_cosine.effusion" not in result.metrics
    picture = cv2.imread(str(tmp_path / "grounding.png"))
    assert picture.shape[0] > 500
    assert picture.std() > 10


def test_each_phrase_is_judged_on_its_own_image_by_its_own_words(run, data_dir, monkeypatch):
    # Boxes on the left and on the right, one an image; they cover the patches in row 2, columns 0 and 3.
    words, boxes, patches = ("Left.", "Right."), ([4, 40, 24, 60], [44, 40, 64, 60]), (2 * SIDE, 2 * SIDE + 3)
    samples = list(read_samples(data_dir, "test"))
    with_box = [sample for sample in samples if sample["boxes"]]
    place_of = {}
    for number, sample in enumerate(with_box):
        place_of[sample["image"]] = place = number % 2
        sample["boxes"][0] |= {"phrase": words[place], "box_xyxy": boxes[place]}

    def look(_, jpegs):
        """An image lights its box for its own words and a corner for the other ones; without a box it stays dark."""
        patches_BNE = torch.zeros(len(jpegs), 16, 8)
        for own_NE, jpeg in zip(patches_BNE, jpegs):
            if jpeg in place_of:
                place = place_of[jpeg]
                own_NE[patches[place], place] = own_NE[0, 1 - place] = 1
        return PatchFeatures(patches_BNE, torch.ones(len(jpegs), 3, 8), torch.ones(len(jpegs), 3, 16))

    def read(_, reports):
        text_BE = torch.eye(8)[[words.index(report[0]) for report in reports]]
        return TextFeatures(text_BE, torch.ones(len(reports), 4, 8), torch.ones(len(reports), 4) > 0)

    monkeypatch.setattr(grounding, "read_samples", lambda *_: iter(samples))
    monkeypatch.setattr(grounding, "encode_patches", look)
    monkeypatch.setattr(grounding, "encode_reports", read)
    result = grounding.run_grounding(build_task(run, data_dir))
    assert result.num_samples == len(with_box)
    assert result.metrics["mean_pointing_game"].value == 1


def test_findings_weigh_the_same_however_many_phrases_they_have():
    judged = [build_judged("a", 0.0), build_judged("a", 1.0), build_judged("a", np.nan), build_judged("b", 4.0)]
    metrics = summarize_phrases(judged, ["a", "b"], np.array(["p", "q", "r", "s"]), 200)
    assert metrics["cnr.a"].value == 0.5
    assert metrics["mean_cnr"].value == 2.25
    assert metrics["cnr.a"].low == 0
    assert metrics["cnr.a"].high == 1


def test_patients_are_resampled_whole():
    judged = [build_judged("a", float(number % 2)) for number in range(40)]
    alone = summarize_phrases(judged, ["a"], np.arange(40), 300)["cnr.a"]
    twins = summarize_phrases(judged, ["a"], np.arange(40) % 2, 300)["cnr.a"]
    assert 0.25 < alone.low < alone.high < 0.75
    assert (twins.low, twins.high) == (0, 1)


def test_the_prior_is_the_share_of_training_boxes_and_takes_any_image_size():
    boxes = [((0.0, 0.0, 40.0, 40.0), 80), ((0.0, 0.0, 20.0, 40.0), 40)]
    assert build_prior(boxes, 2).tolist() == [[1, 0], [0.5, 0]]
    assert build_prior([], 2).tolist() == [[0, 0], [0, 0]]


def test_findings_without_a_box_are_told(run, data_dir, unlabelled_dir):
    with pytest.raises(UsageError, match="none of them has a box in split 'test'; there are effusion"):
        grounding.run_grounding(build_task(run, data_dir, findings=["edema"]))
    with pytest.raises(UsageError, match="no sentence of split 'test' has a box"):
        grounding.run_grounding(build_task(run, unlabelled_dir))
    result = grounding.run_grounding(build_task(run, data_dir, findings=["effusion", "edema"]))
    assert [*result.protocol["findings"]] == ["effusion"]
    assert result.protocol["left_out"] == {"edema": "no phrase with a box in split 'test'"}


def test_a_finding_that_nobody_knows_is_refused(run, data_dir):
    with pytest.raises(UsageError, match="no label 'efusion'; did you mean 'effusion'"):
        grounding.run_grounding(build_task(run, data_dir, findings=["edema", "effusion", "efusion"]))
    judged = [build_judged("nodule", 0.0)]
    names = grounding.choose_grounded(judged, build_task(run, data_dir, findings=["mass", "nodule"]), ["mass"])[0]
    assert names == ["nodule"], "boxes may be of findings that are no labels"
