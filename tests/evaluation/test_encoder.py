"""Encoding: what a study's features are depends on that study alone."""

from __future__ import annotations

import shutil

import pyarrow.parquet as pq
import pytest
import torch

from place.config import RunError, UsageError
from place.data.prepared import read_samples
from place.evaluation.encoder import build_study, encode_reports, encode_split, read_units
from place.training.checkpoint import load_run


@pytest.fixture(scope="module")
def run(run_dir):
    return load_run(run_dir)


def test_features_do_not_depend_on_the_batch(run, data_dir):
    alone, together = (encode_split(run, data_dir, "test", size) for size in (1, 41))
    for one, other in zip(alone[2:], together[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_features_are_unit_length_fp32_in_sample_id_order_with_their_patients(run, data_dir):
    split = encode_split(run, data_dir, "test", 16)
    ids = [study.sample_id for study in split.studies]
    units = read_units(data_dir, "test")
    assert ids == sorted(ids)
    assert [units[sample_id] for sample_id in ids] == split.unit_B.tolist()
    assert split.image_BE.dtype == torch.float32
    for features in (split.image_BE, split.text_BE, split.observations_BKE, split.sentences_BSE[split.mask_BS]):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))


def test_features_belong_to_their_study(run, data_dir):
    split = encode_split(run, data_dir, "test", 7)
    text_BE = encode_reports(run, [study.sentences for study in split.studies]).text_BE
    torch.testing.assert_close(split.text_BE, text_BE, atol=1e-5, rtol=1e-5)


def test_progress_counts_up_to_the_split(run, data_dir):
    seen = []
    encode_split(run, data_dir, "test", 16, lambda done, total: seen.append((done, total)))
    assert seen == [(16, 41), (32, 41), (41, 41)]


def test_a_study_without_a_patient_is_a_unit_of_its_own(data_dir):
    units = read_units(data_dir, "test")
    assert len(units) == 41
    assert len(set(units.values())) == 22


def test_reports_that_the_model_reads_alike_are_one_group(data_dir):
    samples = list(read_samples(data_dir, "test"))
    assert len({build_study(sample, "all").report_group for sample in samples}) > 30
    findings = [build_study(sample, "findings") for sample in samples]
    assert len({study.report_group for study in findings}) == 4
    assert len(findings[0].sentences) == 2


def test_features_that_are_not_finite_are_refused(run, data_dir):
    head = run.model.project_image[2].bias
    kept = head.data.clone()
    head.data[0] = torch.nan
    try:
        with pytest.raises(RunError, match="image encoder gave a feature that is not finite"):
            encode_split(run, data_dir, "test", 16)
    finally:
        head.data = kept


def test_a_split_that_is_not_there_is_named(run, data_dir):
    with pytest.raises(UsageError, match="no samples in split 'nowhere'"):
        encode_split(run, data_dir, "nowhere", 16)


def test_a_missing_or_short_manifest_is_named(run, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    table = pq.read_table(copy / "manifest.parquet")
    pq.write_table(table.slice(0, len(table) - 1), copy / "manifest.parquet")
    with pytest.raises(RunError, match="in the shards but not in manifest"):
        encode_split(run, copy, "test", 16)
    (copy / "manifest.parquet").unlink()
    with pytest.raises(RunError, match="manifest.parquet is missing"):
        encode_split(run, copy, "test", 16)
