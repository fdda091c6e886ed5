"""Report tokens that know their sentence, and the small tokenizer that a corpus without one gets."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from place.config import RunError, UsageError
from place.data.report import hash_text
from place.kept import PARTIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_SENTENCES = 1 << 16
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizedReport(NamedTuple):
    """A report of T tokens and S sentences: ids, sentence of each token (-1: special), hash of each sentence."""

    token_ids: list[int]
    sentence_of_token: list[int]
    sentence_hash: list[int]


class ReportTokenizer:
    """A Hugging Face tokenizer that keeps sentences apart. Final; built by `load` or `read_or_train`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_sentences: int):
        self.hf = tokenizer
        self.max_tokens, self.max_sentences = max_tokens, max_sentences
        # Reports repeat their sentences from study to study and from epoch to epoch.
        self._known: dict[str, tuple[list[int], int]] = {}
        # Read once: a Hugging Face tokenizer looks its special tokens up anew at each question.
        self.cls_id, self.sep_id, self.pad_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        if None in (self.cls_id, self.sep_id, self.pad_id):
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
        """Write the tokenizer as a Hugging Face folder, each file by rename."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=PARTIAL, dir=folder) as draft:
            self.hf.save_pretrained(draft)
            for path in Path(draft).iterdir():
                path.replace(folder / path.name)

    def encode(self, sentences: Iterable[str]) -> TokenizedReport:
        """Tokens of [CLS] sentence sentence ... [SEP], cut after the last sentence that fits.

        A first sentence that is too long is cut itself.
        """
        ids, owner = [self.cls_id], [-1]
        hashes: list[int] = []
        for text in sentences:
            pieces, sentence_hash = self._read_sentence(text)
            room = self.max_tokens - 1 - len(ids)
            if len(hashes) == self.max_sentences or (len(pieces) > room and hashes):
                break
            pieces = pieces[:room]
            if pieces:
                owner += [len(hashes)] * len(pieces)
                ids += pieces
                hashes.append(sentence_hash)
        return TokenizedReport([*ids, self.sep_id], [*owner, -1], hashes)

    def _read_sentence(self, text: str) -> tuple[list[int], int]:
        if text not in self._known:
            if len(self._known) >= CACHED_SENTENCES:
                self._known.clear()
            self._known[text] = self.hf.encode(text, add_special_tokens=False, verbose=False), hash_text(text)
        return self._known[text]

    def collate(self, reports: list[TokenizedReport]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pad to the longest report: ids, attention (bool) and sentence of token (each (B,T)), sentence hash (B,S)."""
        length = max(len(report.token_ids) for report in reports)
        ids_BT = torch.full((len(reports), length), self.pad_id, dtype=torch.long)
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
    """Build a lower-case WordPiece tokenizer of the most frequent words; rarer ones are spelled out.

    tokenizers' own trainer breaks ties by the order of a hash map, so that two runs on the same data would differ.

    Raises:
        RunError: there is no sentence.
    Source: ours; normalisation and pieces as in BERT (Devlin et al. 2019).
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    blank = BertWordPieceTokenizer(lowercase=True)
    words: Counter[str] = Counter()
    for text in sentences:
        pieces = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
        words.update(piece for piece, _ in pieces)
    if not words:
        raise RunError("the training split has no report sentence to build a tokenizer on; prepare the data set again")
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))
    entries = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *frequent]
    vocabulary = {entry: number for number, entry in enumerate(list(dict.fromkeys(entries))[:vocab_size])}
    built = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
    return ReportTokenizer(BertTokenizerFast(tokenizer_object=built._tokenizer), max_tokens, max_sentences)
