"""CheXbert: what a report says of 14 findings, by a BERT whose weights the user has."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from place.config import UsageError
from place.distributed import choose_device
from place.evaluation.labeler import NEGATIVE, OBSERVATIONS, POSITIVE, UNCERTAIN
from place.evaluation.metrics import Array

WEIGHTS = "chexbert.pth"
HEADS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
CLASSES = (None, POSITIVE, NEGATIVE, UNCERTAIN)
"""What the classes of a head mean; No Finding has the first two."""
MAX_TOKENS, BATCH = 512, 16


class CheXbert(nn.Module):
    """A BERT with a head for each finding on its first token.

    Source: quoted (stanfordmlgroup/CheXbert: order and classes of the heads, the cut at 512 tokens).
    """

    def __init__(self, folder: str):
        """Load folder/chexbert.pth, beside it `config.json` and tokenizer of bert-base-uncased. Raises UsageError."""
        from transformers import AutoConfig, AutoTokenizer, BertModel

        super().__init__()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.bert = BertModel(AutoConfig.from_pretrained(folder, local_files_only=True))
            width = self.bert.config.hidden_size
            self.linear_heads = nn.ModuleList([
                *(nn.Linear(width, len(CLASSES)) for _ in HEADS[:-1]), nn.Linear(width, 2)
            ])  # fmt: skip
            known = torch.load(Path(folder) / WEIGHTS, map_location="cpu", weights_only=True)["model_state_dict"]
            state = {name.removeprefix("module."): value for name, value in known.items()}
            # A buffer that older releases of transformers saved.
            state.pop("bert.embeddings.position_ids", None)
            self.load_state_dict(state)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"evaluation.generation.chexbert={folder}: {' '.join(str(error).split())[:200]}; give a folder with "
                f"{WEIGHTS} and the config.json and tokenizer of bert-base-uncased"
            ) from None
        self.device = choose_device()
        self.eval().to(self.device)
        self._known: dict[str, list[bool]] = {}

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> list[Tensor]:
        """Logits of each head: 13 of (B,4), one of (B,2)."""
        first_BD = self.bert(ids_BT, attention_mask=attention_BT).last_hidden_state[:, 0]
        return [head(first_BD) for head in self.linear_heads]

    @torch.no_grad()
    def label_reports(self, reports: Sequence[str]) -> list[dict[str, int | None]]:
        """For each report and each of `OBSERVATIONS` 1 positive, 0 negative, -1 uncertain, None not mentioned."""
        found = []
        for start in range(0, len(reports), BATCH):
            texts = [" ".join(text.split()) for text in reports[start : start + BATCH]]
            read = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            logits = self(read["input_ids"].to(self.device), read["attention_mask"].to(self.device))
            best_BF = torch.stack([head.argmax(1) for head in logits], 1).tolist()
            found += [dict(zip(HEADS, (CLASSES[best] for best in row), strict=True)) for row in best_BF]
        return found

    def find_positive(self, reports: Sequence[str]) -> Array:
        """Which of `OBSERVATIONS` each report has (B,14); a report is read once.

        Source: quoted (f1chexbert: an uncertain finding counts).
        """
        new = list(dict.fromkeys(report for report in reports if report not in self._known))
        for report, label in zip(new, self.label_reports(new), strict=True):
            self._known[report] = [label[name] in (POSITIVE, UNCERTAIN) for name in OBSERVATIONS]
        return np.array([self._known[report] for report in reports])
