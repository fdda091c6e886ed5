"""Steps of others, for the benchmark: open_clip's own model and loss, and a plain loop of MGCA's structure.

No code of theirs is copied. MGCA's structure: inferred (Wang et al. 2022, 'Multi-Granularity Cross-modal Alignment';
its public repository for the loop over word pieces, the head sizes and the precision).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from place.batch import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Step = Callable[[], Tensor]
"""One optimiser step; gives the loss, on the device."""


def build_open_clip(batch: Batch, mode: str | None) -> Step:
    """ViT-B-16 with its text tower, its loss, and the optimiser and autocast of its training script.

    Images get three equal channels. Its vocabulary is at least that of the batch.

    Args:
        mode: of torch.compile for the model; None leaves it eager.
    """
    import open_clip

    device = batch.image_BCYX.device
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16", precision="amp_bf16", device=device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)
    scale, loss_of = model.logit_scale, open_clip.ClipLoss()
    image_BCYX, token_ids_BT = batch.image_BCYX.expand(-1, 3, -1, -1).contiguous(), batch.token_ids_BT
    forward = torch.compile(model, mode=mode) if mode else model

    def take_step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(*forward(image_BCYX, token_ids_BT))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
        return loss.detach()

    return take_step


class MgcaStructure(nn.Module):
    """Instance alignment, words and patches that attend to each other with a contrast each, prototypes by Sinkhorn."""

    def __init__(self, definition: PretrainedConfig, size_px: int, loops: bool):
        width, prototypes = 128, 500
        super().__init__()
        import timm
        from transformers import AutoModel

        self.loops = loops
        self.vision = timm.create_model("vit_base_patch16_224", num_classes=0, in_chans=3, img_size=size_px)
        self.text = AutoModel.from_config(definition, attn_implementation="eager")
        hidden = definition.hidden_size

        def head(inner: int, norm: bool) -> nn.Sequential:
            middle = [nn.BatchNorm1d(inner)] if norm else []
            return nn.Sequential(nn.Linear(hidden, inner), *middle, nn.ReLU(), nn.Linear(inner, width))

        self.image_head, self.report_head = head(2048, True), head(2048, True)
        self.patch_head, self.word_head = head(2048, False), head(2048, False)
        self.read_patches = nn.MultiheadAttention(width, 1, batch_first=True)
        self.read_words = nn.MultiheadAttention(width, 1, batch_first=True)
        self.prototypes = nn.Linear(width, prototypes, bias=False)

    def forward(self, image_BCYX: Tensor, token_ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """The loss of a batch."""
        tokens_BND = self.vision.forward_features(image_BCYX)
        told = self.text(token_ids_BT, attention_BT.long(), output_attentions=True, return_dict=True)
        words_BTD = self._join_pieces(token_ids_BT, told.last_hidden_state, told.attentions[-1].mean(1)[:, 0])
        image_BE = F.normalize(self.image_head(tokens_BND[:, 0]), dim=-1)
        report_BE = F.normalize(self.report_head(told.last_hidden_state[:, 0]), dim=-1)
        patches_BNE = F.normalize(self.patch_head(tokens_BND[:, 1:]), dim=-1)
        words_BTE = F.normalize(self.word_head(words_BTD), dim=-1)
        found_BTE, _ = self.read_patches(words_BTE, patches_BNE, patches_BNE)
        told_BNE, _ = self.read_words(patches_BNE, words_BTE, words_BTE, key_padding_mask=~attention_BT)
        return (
            _contrast((image_BE @ report_BE.T)[None], 0.1)
            + _contrast(words_BTE @ F.normalize(found_BTE, dim=-1).transpose(1, 2), 0.1)
            + _contrast(patches_BNE @ F.normalize(told_BNE, dim=-1).transpose(1, 2), 0.1)
            + self._swap_prototypes(image_BE, report_BE)
        )

    def _join_pieces(self, token_ids_BT: Tensor, states_BTD: Tensor, weight_BT: Tensor) -> Tensor:
        """States of whole words: a Python loop that asks the device for each id, as published; or no work at all."""
        if not self.loops:
            return states_BTD
        reports = []
        for states_TD, ids_T, weight_T in zip(states_BTD, token_ids_BT, weight_BT, strict=True):
            words: list[list[Tensor]] = []
            for state_D, token, weight in zip(states_TD, ids_T, weight_T, strict=True):
                # Every fourth piece goes on with the word before it.
                if token.item() % 4 or not words:
                    words.append([])
                words[-1].append(state_D * weight)
            rows = torch.stack([torch.stack(pieces).sum(0) for pieces in words])
            reports.append(F.pad(rows, (0, 0, 0, len(ids_T) - len(rows))))
        return torch.stack(reports)

    def _swap_prototypes(self, image_BE: Tensor, report_BE: Tensor) -> Tensor:
        image_BP, report_BP = self.prototypes(image_BE), self.prototypes(report_BE)
        swapped = ((image_BP, report_BP), (report_BP, image_BP))
        terms = [-(_sinkhorn(told) * F.log_softmax(seen / 0.2, -1)).sum(-1).mean() for seen, told in swapped]
        return torch.stack(terms).sum() / 2


def _contrast(score_XMM: Tensor, temperature: float) -> Tensor:
    logits = (score_XMM / temperature).flatten(0, 1), (score_XMM / temperature).transpose(1, 2).flatten(0, 1)
    own = torch.arange(score_XMM.shape[1], device=score_XMM.device).repeat(len(score_XMM))
    return torch.stack([F.cross_entropy(rows, own) for rows in logits]).sum()


@torch.no_grad()
def _sinkhorn(score_BP: Tensor, rounds: int = 3) -> Tensor:
    share_PB = (score_BP.float() / 0.05).exp().T
    share_PB = share_PB / share_PB.sum()
    for _ in range(rounds):
        share_PB = share_PB / share_PB.sum(1, keepdim=True) / share_PB.shape[0]
        share_PB = share_PB / share_PB.sum(0, keepdim=True) / share_PB.shape[1]
    return (share_PB * share_PB.shape[1]).T


def build_mgca(batch: Batch, definition: Any, loops: bool) -> Step:
    """A plain step of MGCA's structure: fp16 autocast with a loss scale, AdamW, clipping.

    Args:
        loops: join word pieces as published, one by one in Python; else leave that out, which flatters it.
    """
    device = batch.image_BCYX.device
    torch.manual_seed(0)
    model = MgcaStructure(definition, batch.image_BCYX.shape[-1], loops).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.05)
    image_BCYX = batch.image_BCYX.expand(-1, 3, -1, -1).contiguous()
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def take_step() -> Tensor:
        with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16):
            loss = model(image_BCYX, batch.token_ids_BT, batch.attention_BT)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return take_step
