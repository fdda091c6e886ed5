"""Report tokens: where a report is cut, which sentence a token belongs to, and a vocabulary that never differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from place.config import RunError, UsageError
from place.data.report import hash_text
from place.data.tokens import ReportTokenizer, train_tokenizer

SENTENCES = ["The heart is normal.", "There is no effusion.", "A nodule is seen in the left lung."]
WORDS = [5, 5, 9]  # pieces of each sentence, full stop included


def build(max_tokens: int = 64, max_sentences: int = 4) -> ReportTokenizer:
    return train_tokenizer(SENTENCES, 500, max_tokens, max_sentences)


def test_every_token_knows_its_sentence_and_special_ones_have_none() -> None:
    report = build().encode(SENTENCES)
    assert report.sentence_of_token == [-1, *[0] * WORDS[0], *[1] * WORDS[1], *[2] * WORDS[2], -1]
    assert report.sentence_hash == [hash_text(text) for text in SENTENCES]


def test_tokens_read_back_as_the_report() -> None:
    tokenizer = build()
    text = tokenizer.hf.decode(tokenizer.encode(SENTENCES).token_ids)
    assert text == "[CLS] " + " ".join(SENTENCES).lower().replace(" .", ".") + " [SEP]"


def test_the_cut_is_at_the_end_of_the_last_sentence_that_fits() -> None:
    both = WORDS[0] + WORDS[1] + 2
    for max_tokens, kept in ((both + WORDS[2], 3), (both + WORDS[2] - 1, 2), (both, 2), (both - 1, 1)):
        report = build(max_tokens).encode(SENTENCES)
        assert len(report.sentence_hash) == kept
        assert len(report.token_ids) == 2 + sum(WORDS[:kept]) <= max_tokens


def test_a_first_sentence_that_is_too_long_is_cut() -> None:
    report = build(max_tokens=8).encode(SENTENCES[::-1])
    assert len(report.token_ids) == 8
    assert report.sentence_of_token == [-1, *[0] * 6, -1]
    assert report.sentence_hash == [hash_text(SENTENCES[2])]


def test_no_more_sentences_than_allowed_are_kept() -> None:
    assert build(max_sentences=2).encode(SENTENCES).sentence_hash == [hash_text(text) for text in SENTENCES[:2]]


def test_a_sentence_without_tokens_takes_no_place() -> None:
    report = build().encode(["", SENTENCES[0]])
    assert report.sentence_hash == [hash_text(SENTENCES[0])]
    assert max(report.sentence_of_token) == 0


def test_a_report_without_sentences_is_two_special_tokens() -> None:
    report = build().encode([])
    assert (len(report.token_ids), report.sentence_of_token, report.sentence_hash) == (2, [-1, -1], [])


def test_padding_is_marked_in_every_column() -> None:
    tokenizer = build()
    reports = [tokenizer.encode(SENTENCES[:1]), tokenizer.encode(SENTENCES)]
    ids_BT, attention_BT, owner_BT, hash_BS = tokenizer.collate(reports)
    short = len(reports[0].token_ids)
    assert ids_BT.shape == attention_BT.shape == owner_BT.shape == (2, len(reports[1].token_ids))
    assert attention_BT.dtype == torch.bool
    assert attention_BT.sum(1).tolist() == [short, len(reports[1].token_ids)]
    assert ids_BT[0, short:].eq(tokenizer.hf.pad_token_id).all()
    assert owner_BT[0, short:].eq(-1).all()
    assert hash_BS.shape == (2, 4)
    assert hash_BS[0].tolist() == [*reports[0].sentence_hash, 0, 0, 0]


def test_the_vocabulary_does_not_depend_on_order_or_process() -> None:
    code = (
        "import json; from place.data.tokens import train_tokenizer\n"
        f"tokenizer = train_tokenizer({SENTENCES[::-1]!r}, 45, 64, 4); print(json.dumps(tokenizer.hf.get_vocab()))"
    )
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    here = train_tokenizer(SENTENCES, 45, 64, 4).hf.get_vocab()
    assert json.loads(there) == here
    assert len(here) == 45


def test_an_unseen_word_is_spelled_out() -> None:
    tokenizer = build()
    pieces = tokenizer.hf.tokenize("heart nodules")
    assert pieces == ["heart", "nodule", "##s"]


def test_a_saved_tokenizer_reads_back_the_same(tmp_path: Path) -> None:
    build().save(tmp_path)
    assert ReportTokenizer.load(tmp_path, 64, 4).encode(SENTENCES) == build().encode(SENTENCES)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match="no tokenizer at") as caught:
            ReportTokenizer.load(folder)
        assert "\n" not in str(caught.value)


def test_a_corpus_without_sentences_is_one_line() -> None:
    with pytest.raises(RunError, match="no report sentence"):
        train_tokenizer([], 100, 64, 4)


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    class Bare:
        cls_token_id = sep_token_id = pad_token_id = None

    with pytest.raises(UsageError, match="BERT-like"):
        ReportTokenizer(Bare(), 64, 4)


def test_who_reads_a_tokenizer_while_it_is_saved_again_sees_the_old_one_whole(tmp_path: Path) -> None:
    build().save(tmp_path / "tokenizer")
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    with (tmp_path / "tokenizer" / "tokenizer.json").open() as reader:
        train_tokenizer(["Other words."], 500, 64, 4).save(tmp_path / "tokenizer")
        assert reader.read() == before
    assert "words" in ReportTokenizer.load(tmp_path / "tokenizer").hf.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
