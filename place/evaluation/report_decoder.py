"""Writes reports: an autoregressive decoder of transformers that attends to a frozen encoder's visual tokens."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from place.config import GenerationConfig, UsageError
from place.evaluation.heads import CPU, check_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_COUNT = 3
DROPOUT, WEIGHT_DECAY, CLIP_NORM, WARMUP = 0.1, 0.01, 1.0, 0.1
LOOKS = 4
IGNORED = -100
_PAD, _BEGIN, _END, _UNKNOWN = "[PAD]", "[BOS]", "[EOS]", "[UNK]"
_SPACE_AT_STOP = re.compile(r"\s+(?=[.,;:!?)])|(?<=\()\s+")
_SENTENCE_START = re.compile(r"(^|[.!?] +)([a-z])")


class Visual(NamedTuple):
    """What is written from: patch tokens (B,N,D) and V-PORs (B,K,E) of images."""

    patches_BND: Tensor
    observations_BKE: Tensor

    def take(self, rows: Tensor) -> Visual:
        """Some of the images."""
        return Visual(*(part[rows] for part in self))

    def to(self, device: torch.device) -> Visual:
        """The same on a device."""
        return Visual(*(part.to(device) for part in self))


class Pairs(NamedTuple):
    """Images and their reports."""

    visual: Visual
    reports: list[str]


class Language(NamedTuple):
    """A causal language model with cross-attention, its tokenizer, and where it comes from."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    origin: str


class ReportDecoder(nn.Module):
    """The language model, and a projection of each kind of visual token into its width."""

    def __init__(self, language: Language, patch_width: int, observation_width: int, max_words: int):
        super().__init__()
        self.model, self.tokenizer, self.max_words = language.model, language.tokenizer, max_words
        width = self.model.config.hidden_size
        self.read_patches = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.read_observations = nn.Sequential(nn.LayerNorm(observation_width), nn.Linear(observation_width, width))
        self.begin_id, self.end_id, self.pad_id = find_special(language.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where it is; images and words come from anywhere."""
        return next(self.read_patches.parameters()).device

    def forward(self, visual: Visual, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Mean cross-entropy of the next token."""
        hidden, ids_BT, attention_BT = self._attend(visual), ids_BT.to(self.device), attention_BT.to(self.device)
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=attention_BT.long(), **hidden).logits
        target_BT = ids_BT.masked_fill(~attention_BT, IGNORED)
        return nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=IGNORED
        )

    def tokenize(self, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B,T) with begin and end, cut at `max_words`, and attention (B,T) bool."""
        encoded = self.tokenizer(list(reports), add_special_tokens=False, verbose=False)["input_ids"]
        rows = [[self.begin_id, *ids[: self.max_words], self.end_id] for ids in encoded]
        ids_BT = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        attention_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            attention_BT[row, : len(ids)] = True
        return ids_BT, attention_BT

    @torch.no_grad()
    def write(self, visual: Visual, beams: int) -> list[str]:
        """Reports by beam search."""
        start_B1 = torch.full((len(visual.patches_BND), 1), self.begin_id, device=self.device)
        ids_BT = self.model.generate(
            start_B1,
            attention_mask=torch.ones_like(start_B1),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=self.max_words + 1,
            bos_token_id=self.begin_id,
            eos_token_id=self.end_id,
            pad_token_id=self.pad_id,
            **self._attend(visual),
        )
        written_BT = ids_BT[:, 1 : 1 + self.max_words]
        ends_BT = (written_BT == self.end_id).long().cumsum(1) > 0
        rows = [row[~end].tolist() for row, end in zip(written_BT, ends_BT, strict=True)]
        return [tidy(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def _attend(self, visual: Visual) -> dict[str, Tensor]:
        patches_BND, observations_BKE = visual.to(self.device)
        hidden_BMH = torch.cat([self.read_patches(patches_BND), self.read_observations(observations_BKE)], 1)
        attention_BM = torch.ones(hidden_BMH.shape[:2], dtype=torch.long, device=self.device)
        return {"encoder_hidden_states": hidden_BMH, "encoder_attention_mask": attention_BM}


def tidy(text: str) -> str:
    """Words as a report: no space before a stop or in a bracket, a capital after a stop."""
    text = _SPACE_AT_STOP.sub("", " ".join(text.split()))
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def build_language(config: GenerationConfig, reports: Sequence[str]) -> Language:
    """A small GPT-2 with words of the training reports, or the model of a local folder.

    Raises:
        UsageError: a folder that holds no causal language model with tokenizer and cross-attention.
    Source: inferred (R2Gen, words that occur three times; transformers' GPT-2 with cross-attention); sizes are ours.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.decoder is not None:
        language = read_language(config.decoder)
        positions = getattr(language.model.config, "max_position_embeddings", config.max_words + 2)
        if positions < config.max_words + 2:
            raise UsageError(
                f"evaluation.generation.max_words={config.max_words}: {config.decoder} has {positions} positions; "
                "it takes two more than words"
            )
        return language
    tokenizer = build_words(reports)
    begin, end, pad = find_special(tokenizer)
    definition = GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.max_words + 2, n_embd=config.width, n_layer=config.depth,
        n_head=config.num_heads, add_cross_attention=True, bos_token_id=begin, eos_token_id=end, pad_token_id=pad,
        resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=0.0,
        # GPT-2's own function, as one operator instead of eight: a tenth of a step on a CPU.
        activation_function="gelu_pytorch_tanh",
        # GPT-2's 0.02 is for a width of 768: here it would leave cross-attention silent for most of so few steps.
        initializer_range=config.width**-0.5,
    )  # fmt: skip
    return Language(GPT2LMHeadModel(definition), tokenizer, "random weights, words of the training reports")


def read_language(folder: str) -> Language:
    """Read a causal language model; cross-attention that it lacks starts from random weights. Raises UsageError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, is_decoder=True, add_cross_attention=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        raise UsageError(
            f"evaluation.generation.decoder={folder}: {line}; give a folder with config, safetensors and tokenizer"
        ) from None
    if "encoder_hidden_states" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"evaluation.generation.decoder={folder}: {type(model).__name__} has no cross-attention; take GPT-2 or BERT"
        )
    return Language(model, tokenizer, f"weights of {folder}")


def find_special(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Ids that begin, end and pad a report; a BERT-like tokenizer's [CLS] and [SEP] serve. Raises UsageError."""
    begin = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if begin is None or end is None:
        raise UsageError("evaluation.generation.decoder: its tokenizer has no begin and end tokens; add them to it")
    return begin, end, end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def build_words(reports: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of lower-case words, numbers and stops that occur three times, the most frequent first."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(r"[.,;:!?)]+$"), "isolated"),
        pre_tokenizers.Split(Regex(r"^\("), "isolated"),
    ]
    normalize, cut = normalizers.Lowercase(), pre_tokenizers.Sequence(pieces)
    counts = Counter(word for report in reports for word, _ in cut.pre_tokenize_str(normalize.normalize_str(report)))
    words = sorted((word for word in counts if counts[word] >= MIN_COUNT), key=lambda word: (-counts[word], word))
    vocabulary = {word: number for number, word in enumerate([_PAD, _BEGIN, _END, _UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalize, cut
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BEGIN, eos_token=_END, unk_token=_UNKNOWN
    )


def train_decoder(
    config: GenerationConfig,
    train: Pairs,
    val: Pairs,
    on_progress: Callable[[int], None] | None = None,
    device: torch.device = CPU,
) -> tuple[ReportDecoder, str, int]:
    """Train a decoder for `config.steps`; the weights with the least validation loss are kept.

    Args:
        device: of the decoder; the pairs stay where they are.
    Returns:
        The decoder in eval mode, where its language model comes from, and the step that its weights are of.
    Raises:
        UsageError: see `build_language`. RunError: see `check_trained`.
    Source: ours; AdamW, warm-up and cosine as in pretraining.
    """
    rng, size = np.random.default_rng(config.seed), min(config.batch_size, len(train.reports))
    every = max(1, config.steps // LOOKS)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        language = build_language(config, train.reports)
        patch_width, observation_width = (part.shape[-1] for part in train.visual)
        decoder = ReportDecoder(language, patch_width, observation_width, config.max_words).to(device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: compute_rate(step, config.steps))
        best, best_step, kept = math.inf, 0, decoder.state_dict()
        for step in range(1, config.steps + 1):
            decoder.train()
            rows = torch.from_numpy(rng.choice(len(train.reports), size, replace=False))
            loss = decoder(train.visual.take(rows), *decoder.tokenize([train.reports[row] for row in rows]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == config.steps:
                val_loss = compute_loss(decoder, val, config.batch_size)
                if val_loss < best:
                    best, best_step, kept = val_loss, step, {k: v.clone() for k, v in decoder.state_dict().items()}
            if on_progress:
                on_progress(step)
    check_trained(best, config.steps, "the report decoder")
    decoder.load_state_dict(kept)
    return decoder.eval(), language.origin, best_step


def compute_rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, cosine to zero."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def compute_loss(decoder: ReportDecoder, pairs: Pairs, batch_size: int) -> float:
    """Cross-entropy over all pairs, mean over their batches weighted by size."""
    decoder.eval()
    total = 0.0
    for rows in torch.arange(len(pairs.reports)).split(batch_size):
        ids_BT, attention_BT = decoder.tokenize([pairs.reports[row] for row in rows])
        total += float(decoder(pairs.visual.take(rows), ids_BT, attention_BT)) * len(rows)
    return total / len(pairs.reports)
