"""The losses of the heads: sums over the targets of a micro-batch, which never wait for the device."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.inputs import IGNORE_INDEX
from models.ops.layers import upcast

if TYPE_CHECKING:
    from models.heads import HeadShape


def find_supervised_positions(labels: Tensor, num_targets: int | None) -> Tensor | None:
    """Return the ascending positions of the labels that are targets; None where all are.

    num_targets: their number, so that the host need not wait for the device; None: not known.
    """
    is_target = labels != IGNORE_INDEX
    if num_targets is None:
        return is_target.nonzero().squeeze(1)
    if num_targets == len(is_target):
        return None
    return torch.nonzero_static(is_target, size=num_targets).squeeze(1)


def classification_loss(logits: Tensor, labels: Tensor | None, shape: HeadShape, training: bool) -> Tensor:
    """Return the sum of the losses of all targets, 0 without labels; in fp32, or fp64 for fp64 logits.

    - Single labels are classes, or soft labels: (B, C) floats, the share of each class, as mixup and cutmix make them.
    - Label smoothing (Szegedy et al. 2016) and class weights are applied in training only.
    - A class weight multiplies the loss of its class. The loop divides by the number of targets; torch's mean divides
      by the sum of their weights. So here the loss of a step does not depend on its micro-batches.
    - In a multi-label problem pos_weight multiplies the loss of a label where it applies, in training only.

    Raises ModelError for labels whose shape is not that of the logits, and for integer labels of a regression.
    """
    logits = upcast(logits)
    if labels is None:
        return logits.new_zeros(())
    is_soft = shape.problem == "single-label" and labels.is_floating_point()
    if labels.shape != logits.shape and (is_soft or shape.problem != "single-label"):
        raise ModelError(
            f"{shape.problem} labels of shape {[*labels.shape]} should have the shape of the logits, {[*logits.shape]}"
        )
    if shape.problem == "single-label":
        smoothing = shape.label_smoothing if training else 0.0
        weight = _weights_on_device(shape.class_weights, logits.dtype, logits.device) if training else None
        if not is_soft:
            return F.cross_entropy(
                logits, labels, weight, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
            )
        soft_labels = labels.nan_to_num().to(logits.dtype)
        losses = F.cross_entropy(logits, soft_labels, weight, reduction="none", label_smoothing=smoothing)
        return losses.where(~labels.isnan().any(-1), 0.0).sum()
    is_target = ~labels.isnan()
    if shape.problem == "multi-label":
        is_target &= labels != IGNORE_INDEX
    elif not labels.is_floating_point():
        raise ModelError("regression labels should be floats, with NaN where there is no target; these are integers")
    # Not selected by the mask: the number of targets is known to the device alone.
    labels, logits = labels.to(logits.dtype).where(is_target, 0.0), logits.where(is_target, 0.0)
    if shape.problem == "multi-label":
        factors = _weights_on_device(shape.pos_weight, logits.dtype, logits.device) if training else None
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=factors)
    else:
        losses = F.mse_loss(logits, labels, reduction="none")
    return losses.where(is_target, 0.0).sum()


@lru_cache(maxsize=4)  # copied to the device once and not in each micro-batch, which would wait for it
def _weights_on_device(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the weights as a tensor; None for none."""
    return torch.tensor(weights, dtype=dtype, device=device) if weights else None
