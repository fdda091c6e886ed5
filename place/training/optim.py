"""AdamW over two groups of parameters."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from place.config import OptimConfig

NO_DECAY = ("queries", "log_scale", "pos_embed", "cls_token", "position_embeddings")


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW; norms, biases, temperatures, position embeddings, class tokens, queries are not decayed. Source: ours."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            (plain if is_plain else decayed).append(parameter)
    on_gpu = all(parameter.is_cuda for parameter in [*decayed, *plain])
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu or None)
