"""Report tokens that know their sentence, and the small tokenizer that a corpus without one gets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from place.config import RunError, UsageError
from place.data.report import hash_text


class TokenizedReport(NamedTuple):
    """A report of T tokens and S sentences: ids, the sentence of each token (-1: special), the hash of each sentence."""

    token_ids: list[int]
    sentence_of_token: list[int]
    sentence_hash: list[int]


class ReportTokenizer:
    """A Hugging Face tokenizer that keeps sentences apart. Final; built by `load` or `read_or_train`."""

    def __init__(self, tokenizer, max_tokens: int, max_sentences: int):
        self.hf = tokenizer
        self.max_tokens, self.max_sentences = max_tokens, max_sentences
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
            raise UsageError("the tokenizer has no [CLS], [SEP] and [PAD] tokens; take the one of a BERT-like encoder")

    @classmethod
    def load(cls, folder: str | Path, max_tokens: int = 160, max_sentences: int = 16) -> ReportTokenizer:
        """Read a tokenizer from a local folder (or a hub name). Raises UsageError where there is none."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(folder)), max_tokens, max_sentences)
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise UsageError(f"no tokenizer at {folder}: {line}; give a folder with tokenizer.json") from None

    @property
    def vocab_size(self) -> int:
        """Entries, added ones included."""
        return len(self.hf)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face folder."""
        self.hf.save_pretrained(str(folder))

    def encode(self, sentences: Iterable[str]) -> TokenizedReport:
        """Tokens of [CLS] sentence sentence ... [SEP], cut after the last sentence that fits; a first one that is too long is cut."""
        ids, owner, hashes = [self.hf.cls_token_id], [-1], []
        for text in sentences:
            pieces = self.hf.encode(text, add_special_tokens=False, verbose=False)
            room = self.max_tokens - 1 - len(ids)
            if len(hashes) == self.max_sentences or (len(pieces) > room and hashes):
                break
            pieces = pieces[:room]
            if pieces:
                owner += [len(hashes)] * len(pieces)
                ids += pieces
                hashes.append(hash_text(text))
        return TokenizedReport([*ids, self.hf.sep_token_id], [*owner, -1], hashes)

    def collate(self, reports: list[TokenizedReport]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pad to the longest report: token ids, attention (bool), sentence of token (each (B,T)) and sentence hash (B,S)."""
        length = max(len(report.token_ids) for report in reports)
        ids_BT = torch.full((len(reports), length), self.hf.pad_token_id, dtype=torch.long)
        owner_BT = torch.full((len(reports), length), -1, dtype=torch.long)
        attention_BT = torch.zeros(len(reports), length, dtype=torch.bool)
        hash_BS = torch.zeros(len(reports), self.max_sentences, dtype=torch.long)
        for row, report in enumerate(reports):
            count = len(report.token_ids)
            ids_BT[row, :count] = torch.tensor(report.token_ids)
            owner_BT[row, :count] = torch.tensor(report.sentence_of_token)
            attention_BT[row, :count] = True
            hash_BS[row, : len(report.sentence_hash)] = torch.tensor(report.sentence_hash, dtype=torch.long)
        return ids_BT, attention_BT, owner_BT, hash_BS


def train_tokenizer(sentences: Iterable[str], vocab_size: int, max_tokens: int, max_sentences: int) -> ReportTokenizer:
    """Train a lower-case WordPiece tokenizer on report sentences.

    Raises:
        RunError: there is no sentence.
    Source: quoted (Devlin et al. 2019, BERT's WordPiece); the library is tokenizers.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    corpus = sorted(set(sentences))
    if not corpus:
        raise RunError("the training split has no report sentence to train a tokenizer on; prepare the data set again")
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(corpus, vocab_size=vocab_size, min_frequency=2, show_progress=False)
    return ReportTokenizer(BertTokenizerFast(tokenizer_object=trained._tokenizer), max_tokens, max_sentences)
