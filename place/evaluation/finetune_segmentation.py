"""Segmentation with the encoder trained as well: what its weights are worth as a start.

Masks, figures and head are those of `segmentation`, settings those of `finetune`, so that the tasks differ in one
thing: whether the encoder moves.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from place.config import UsageError
from place.evaluation.finetune import Tuned, plan_schedule, predict, train_tuned
from place.evaluation.frozen import FrozenEncoder
from place.evaluation.heads import Training, build_seeded
from place.evaluation.metrics import TaskResult
from place.evaluation.segmentation import Read, Way, judge_way
from place.evaluation.setr import HEADS, compute_loss
from place.evaluation.task import Task
from place.model.vision import VisionTokens


class Segmenter(Tuned):
    """A head on the patches: logits (B,F,size_px,size_px)."""

    def __init__(self, encoder: FrozenEncoder, num_findings: int, kind: str):
        def build_head(tokens: VisionTokens) -> nn.Module:
            _, num_patches, width = tokens.patches_BND.shape
            return HEADS[kind](width, num_patches, num_findings, encoder.patch_px)

        super().__init__(encoder, build_head)

    def forward(self, image_BCYX: Tensor) -> Tensor:
        return self.head(self.vision(image_BCYX.to(self.device)).patches_BND, self.size_px)


def run_finetune_segmentation(task: Task) -> TaskResult:
    """Fine-tune encoder and head on the training masks; the task's own encoder stays as it is.

    Raises:
        UsageError: as `run_segmentation`, or the judged split is the one trained on.
    Source: inferred (BenchX: UperNet, all of it trained; MGCA: SETR-PUP); settings are ours.
    """
    if task.split == task.train_split and not task.evaluation.folds:
        raise UsageError(f"finetune_segmentation: split '{task.split}' is trained on; judge another one")
    config = task.evaluation.finetune
    stopped = f"at the least validation loss of at most {config.max_steps} steps, patience of {config.patience} looks"
    what = "the encoder's patch tokens, all of it trained"
    way = Way("finetune_segmentation", what, stopped, config.model_dump(), "finetune", False, _fit_all)
    return judge_way(task, way)


def _fit_all(task: Task, train: Read, val: Read, test: Read) -> tuple[Tensor, Training]:
    encoder, config = task.encoder, task.evaluation.finetune
    kind, num_findings = task.evaluation.segmentation_head, train.split.mask_BFYX.shape[1]
    model = build_seeded(lambda: Segmenter(encoder, num_findings, kind), config.seed)
    rng = np.random.default_rng(config.seed)

    def compute_train_loss(rows: Tensor) -> Tensor:
        jpegs, masks = [train.jpegs[row] for row in rows], [train.stored[row] for row in rows]
        images, mask_BFYX = encoder.draw_masked(jpegs, masks, config.augment, rng)
        return compute_loss(model(images).cpu(), mask_BFYX, train.split.known_BF[rows])

    def compute_val_loss() -> float:
        return float(compute_loss(predict(model, encoder, val.jpegs), val.split.mask_BFYX, val.split.known_BF))

    model, step = train_tuned(task, model, compute_train_loss, compute_val_loss, len(train.jpegs))
    training = Training(plan_schedule(config, len(train.jpegs)), len(train.jpegs), step)
    return predict(model, encoder, test.jpegs) > 0, training
