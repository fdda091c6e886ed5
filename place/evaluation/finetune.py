"""Full fine-tune: what the encoder becomes when all of it is trained on few and on many labels.

Peers' protocol (MGCA, BenchX): 1, 10 and 100 % of the training labels. Subsets, figures and choices are those of
`classification`, so that the two differ in one thing: whether the encoder moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from place.config import FinetuneConfig, UsageError
from place.evaluation.classification import Labelled, describe_probe, judge_shares, require_units
from place.evaluation.encoder import get_units
from place.evaluation.findings import build_targets, is_one_of_many
from place.evaluation.frozen import FrozenEncoder
from place.evaluation.heads import Schedule, Training, build_seeded, describe_passes, train_on_tokens
from place.evaluation.metrics import Array, TaskResult
from place.evaluation.probe import Probed, choose_threshold, list_untrained
from place.evaluation.task import Task
from place.model.vision import VisionTokens
from place.training.optim import NO_DECAY

LEAST_LOOK, MOST_LOOK = 25, 250
"""Steps between two looks at validation, where an epoch is shorter or longer."""
VAL_BATCH = 64


class ImageSplit(NamedTuple):
    """Stored images of a split, with labels, patients and ids."""

    jpegs: list[bytes]
    about: Labelled


class Tuned(nn.Module):
    """A copy of the whole encoder, and a head on what it gives: logits, by `forward` of a subclass."""

    pretrained_cfg = {"classifier": "head"}
    """Tells timm which parameters are above the encoder's layers, where the encoder does not know its layers itself."""

    def __init__(self, encoder: FrozenEncoder, build_head: Callable[[VisionTokens], nn.Module]):
        """`build_head` is given the tokens of a blank image."""
        super().__init__()
        self.vision = copy.deepcopy(encoder.vision).requires_grad_(True)
        self.size_px, self.device = encoder.size_px, encoder.device
        with torch.no_grad():
            blank = torch.zeros(1, encoder.channels, self.size_px, self.size_px, device=self.device)
            self.head = build_head(self.vision(blank)).to(self.device)


TunedModel = TypeVar("TunedModel", bound=Tuned)


class Classifier(Tuned):
    """A linear layer on what stands for the image: logits (B,F)."""

    def __init__(self, encoder: FrozenEncoder, num_findings: int):
        super().__init__(encoder, lambda tokens: nn.Linear(tokens.image_BD.shape[1], num_findings))

    def forward(self, image_BCYX: Tensor) -> Tensor:
        return self.head(self.vision(image_BCYX.to(self.device)).image_BD)


def run_finetune(task: Task) -> TaskResult:
    """Fine-tune the encoder at each share of the training labels; the task's own encoder stays as it is.

    Returns: figures by the names of `run_classification`.
    Raises:
        UsageError: the data set lacks a split, or the judged split is the one trained on.
    Source: inferred (MGCA, BenchX: whole encoder, shares of labels, stopped on validation); settings are ours.
    """
    if task.split == task.train_split:
        raise UsageError(f"finetune: split '{task.split}' is what the encoder is trained on; judge another one")
    train, val, test = (read_images(task, name) for name in (task.train_split, task.val_split, task.split))

    def fit(rows: Array, names: list[str]) -> Probed:
        # Of all training images: a few may be of exactly one finding each by chance.
        as_classes = is_one_of_many(build_targets(train.about.labels, names))
        chosen = ImageSplit([train.jpegs[row] for row in rows], _pick(train.about, rows))
        return finetune(task, chosen, val, test.jpegs, names, as_classes)

    judged = judge_shares(task, train.about.unit_B, test.about, fit)
    notes = [note for share, told in judged.shares.items() for note in _add_passes(task, share, told)]
    protocol = describe_probe(task, judged) | {
        "score": f"linear layer on the image encoder, all of it trained, at {task.encoder.size_px} px",
        "trained_on": f"{len(train.jpegs)} images of '{task.train_split}'",
        "chosen_on": f"step by loss, and threshold by F1 of each finding, on '{task.val_split}'",
        "classes": "softmax, the highest wins" if "accuracy" in judged.metrics else None,
        "settings": task.evaluation.finetune.model_dump(),
        **({"notes": notes} if notes else {}),
    }
    return TaskResult("finetune", judged.metrics, protocol, judged.num_images, judged.rows)


def _add_passes(task: Task, share: str, told: dict[str, Any]) -> list[str]:
    """Put the passes of each subset of a share beside its steps. Returns notes on the share."""
    config = task.evaluation.finetune
    runs = zip(told["images"], told["step"], strict=True)
    passes = describe_passes([Training(plan_schedule(config, count), count, step) for count, step in runs], "finetune")
    told["passes"] = passes["passes"]
    return [f"{share} of the labels: {note}" for note in passes.get("notes", [])]


def finetune(
    task: Task, train: ImageSplit, val: ImageSplit, jpegs: list[bytes], names: list[str], as_classes: bool
) -> Probed:
    """Train a copy of the encoder on some images, stop it on validation, score other images.

    A finding without a positive or a negative cannot be trained alone: its logit is 0, no image is labelled with it,
    and it is named.

    Args:
        jpegs: images that are judged; their labels are not an argument, so nothing can be chosen on them.
        as_classes: each image is of exactly one finding: cross-entropy trains them together.
    Source: ours.
    """
    encoder, config = task.encoder, task.evaluation.finetune
    train_BF, val_BF = (build_targets(split.about.labels, names) for split in (train, val))
    model = build_seeded(lambda: Classifier(encoder, len(names)), config.seed)
    rng = np.random.default_rng(config.seed)
    target_BF = torch.from_numpy(train_BF).float()

    def compute_train_loss(rows: Tensor) -> Tensor:
        images = encoder.draw_images([train.jpegs[row] for row in rows.tolist()], config.augment, rng)
        return compute_loss(model(images).cpu(), target_BF[rows], as_classes)

    def compute_val_loss() -> float:
        return float(compute_loss(predict(model, encoder, val.jpegs), torch.from_numpy(val_BF).float(), as_classes))

    model, step = train_tuned(task, model, compute_train_loss, compute_val_loss, len(train.jpegs))
    val_score_BF, score_BF = (score(predict(model, encoder, images), as_classes) for images in (val.jpegs, jpegs))
    untrained = [] if as_classes else list_untrained(train_BF, names)
    is_trained_F = np.array([name not in untrained for name in names])
    threshold_F = [choose_threshold(score_B, target_B) for score_B, target_B in zip(val_score_BF.T, val_BF.T)]
    predicted_BF = (score_BF >= np.array(threshold_F)) & is_trained_F
    return Probed(score_BF * is_trained_F, predicted_BF, [], threshold_F, untrained, step)


def train_tuned(
    task: Task,
    model: TunedModel,
    compute_train_loss: Callable[[Tensor], Tensor],
    compute_val_loss: Callable[[], float],
    num_images: int,
) -> tuple[TunedModel, int]:
    """Train encoder and head as `evaluation.finetune` says. Returns: the model, the step that its weights are of."""
    config = task.evaluation.finetune
    schedule = plan_schedule(config, num_images)
    return train_on_tokens(
        model,
        compute_train_loss,
        compute_val_loss,
        num_images,
        schedule,
        config.seed,
        lambda at: task.report("fine-tune", at, schedule.max_steps),
        group_parameters(model, config),
    )


def compute_loss(logit_BF: Tensor, target_BF: Tensor, as_classes: bool) -> Tensor:
    """Binary cross-entropy, mean over known labels (NaN counts nowhere), or cross-entropy over classes, mean over the
    images of which all labels are known."""
    known_BF = ~target_BF.isnan()
    if as_classes:
        known_B = known_BF.all(1)
        if not known_B.any():
            return logit_BF.new_zeros(())
        return nn.functional.cross_entropy(logit_BF[known_B], target_BF[known_B])
    entropy_BF = nn.functional.binary_cross_entropy_with_logits(logit_BF, target_BF.nan_to_num(), reduction="none")
    return (entropy_BF * known_BF).sum() / known_BF.sum().clamp(min=1)


def score(logit_BF: Tensor, as_classes: bool) -> Array:
    """Log odds (B,F) of each finding, alone or against the other classes."""
    logit_BF = logit_BF.double()
    if as_classes:
        logit_BF = logit_BF.log_softmax(1).exp().logit(eps=1e-12)
    return logit_BF.numpy()


def plan_schedule(config: FinetuneConfig, num_images: int) -> Schedule:
    """A look at validation after each epoch, within `LEAST_LOOK` and `MOST_LOOK` steps, once at least."""
    epoch = -(-num_images // config.batch_size)
    every = min(max(epoch, LEAST_LOOK), MOST_LOOK, config.max_steps)
    return Schedule(config.max_steps, every, config.patience, config.batch_size, config.lr, config.weight_decay)


def group_parameters(model: Tuned, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameters layer by layer, each with a learning rate below that of the layer above it.

    timm models know their layers; of others timm takes twelve parameters in the order of definition for one.
    Source: quoted (Bao et al. 2022, BEiT, as timm has it).
    """
    from timm.optim import param_groups_layer_decay

    trunk = getattr(model.vision, "vit", getattr(model.vision, "model", model.vision))
    knows_layers = hasattr(trunk, "group_matcher")
    plain = [f"*{part}*" for part in NO_DECAY]
    groups = param_groups_layer_decay(
        trunk if knows_layers else model, config.weight_decay, plain, layer_decay=config.layer_decay
    )
    if knows_layers:
        # The last layer of what timm was shown is one below ours.
        groups = [group | {"lr_scale": config.layer_decay * group["lr_scale"]} for group in groups]
        for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            own = [weight for weight in model.head.parameters() if (weight.ndim > 1) == is_matrix]
            groups.append({"params": own, "weight_decay": decay, "lr_scale": 1.0})
    return [group | {"lr": config.lr * group["lr_scale"]} for group in groups]


def read_images(task: Task, split: str) -> ImageSplit:
    """Every stored image of a split, compressed, in memory."""
    units = require_units(task, "finetune", split)
    samples = [
        (sample["image"], sample["labels"], sample["sample_id"])
        for batch in task.read_batches(split, f"read {split} images")
        for sample in batch
    ]
    jpegs, labels, ids = (list(column) for column in zip(*samples, strict=True))
    return ImageSplit(jpegs, Labelled(labels, get_units(units, ids), ids))


@torch.no_grad()
def predict(model: Tuned, encoder: FrozenEncoder, jpegs: list[bytes]) -> Tensor:
    """Logits (B,...) of images without augmentation, on the CPU; no image's depends on another's."""
    model.eval()
    starts = range(0, len(jpegs), VAL_BATCH)
    return torch.cat([model(encoder.read_images(jpegs[at : at + VAL_BATCH])).cpu() for at in starts])


def _pick(about: Labelled, rows: Array) -> Labelled:
    labels, ids = ([part[row] for row in rows] for part in (about.labels, about.sample_ids))
    return Labelled(labels, about.unit_B[rows], ids)
