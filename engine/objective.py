"""What training minimises where that is more than the loss of the head: R-Drop, a teacher, FGM.

All of it happens within one forward, so that the loop, DDP and the precision see a model like any other; and all of it
is a sum over the targets of a micro-batch, as the loss of a head is. So with dropout 0 the way a step is cut changes
nothing here either. The loss that is logged is this one; evaluation has that of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from engine.config import ConfigError, DropoutSettings, RegularizeSettings
from engine.regularize import DropoutSchedule
from models import Output, TaskModel
from models.heads import IGNORE, widened
from models.ops.layers import Packing, padded

WITHOUT_CLASSES = ("token-classification", "question-answering")  # of an example, which is what a teacher judges
SCALE = 1024.0  # of the loss whose gradient is the direction of FGM: fp16 would lose small ones


def training_objective(model: TaskModel, settings: RegularizeSettings, teacher: Tensor | None) -> nn.Module:
    """What the loop calls in the place of the model: the model itself where none of this is on, else an Objective.

    teacher: (N, C) fp32 logits of the training examples, by their place in the training set (data/teacher.py).
    ConfigError for a setting that this model cannot follow, or that would have no effect on it.
    """
    _check(model, settings, teacher)
    if (model.origin.head or "").endswith("-lm"):
        model.head.keep_logits = bool(settings.r_drop_weight)  # nothing else reads them in training
    if settings.r_drop_weight or settings.fgm_epsilon or settings.distillation_weight:
        return Objective(model, settings, teacher)
    return model


def _check(model: TaskModel, settings: RegularizeSettings, teacher: Tensor | None) -> None:
    head, problem = model.origin.head or "", model.head.shape.problem
    kind = "a regression" if problem == "regression" else f"the head {head}"
    if settings.r_drop_weight and problem == "regression":
        raise ConfigError(
            f"regularize.r_drop_weight = {settings.r_drop_weight:g} compares probabilities, which a regression has none of; "
            "leave it out"
        )
    if settings.r_drop_weight and not any(rate for *_, rate in DropoutSchedule(model, DropoutSettings(), 0).rates):
        raise ConfigError(
            f"regularize.r_drop_weight = {settings.r_drop_weight:g} compares two passes, which are the same without dropout; "
            "set model.dropout.all, or leave it out"
        )
    if settings.fgm_epsilon and not hasattr(model.backbone, "embedding"):
        raise ConfigError(
            f"regularize.fgm_epsilon = {settings.fgm_epsilon:g} moves the embeddings of words, and this model reads images; "
            "leave it out"
        )
    if settings.distillation_weight and (problem == "regression" or head in WITHOUT_CLASSES or head.endswith("-lm")):
        raise ConfigError(
            f"regularize.distillation_weight = {settings.distillation_weight:g}: a teacher has logits for the classes of a whole example, "
            f"which {kind} does not learn; leave it out"
        )
    if settings.distillation_weight and teacher is None:
        raise ConfigError(
            f"regularize.distillation_weight = {settings.distillation_weight:g} needs data.teacher_file, a file of a teacher's logits as "
            "engine.predict writes it"
        )
    if teacher is not None and not settings.distillation_weight:
        raise ConfigError(
            "data.teacher_file has no effect with regularize.distillation_weight = 0; set its share of the loss, as 0.5, or leave it out"
        )


class Objective(nn.Module):
    """A model whose loss_sum is that of its training; `logits` are those of its first pass.

    One pass, CE being the loss of the head, of each target, d = distill and t = distill_temperature:

        L = (1 - d) CE + d t^2 KL(teacher || model), both softmax(logits / t)

    (Hinton et al. 2015, "Distilling the knowledge in a neural network"; the KL's gradient is that of the cross entropy,
    and it is 0 where they agree). With r_drop there are two passes, which drop otherwise:

        R = (L1 + L2) / 2 + r_drop (KL(p1 || p2) + KL(p2 || p1)) / 2

    (Liang et al. 2021, "R-Drop"). With fgm, x being the embeddings of a sequence's words as the matrix has them, and g
    the gradient of R (or of L) with respect to x, the loss is

        R(x) + R(x + fgm g / |g|), |g| the L2 norm over all of the sequence

    (Miyato et al. 2017, "Adversarial training methods for semi-supervised text classification"), g taken as constant. A
    sequence without gradient stays where it is. Of an encoder-decoder, what the encoder reads is moved. Both r_drop and
    fgm: so four passes.
    """

    def __init__(self, model: TaskModel, settings: RegularizeSettings, teacher: Tensor | None):
        super().__init__()
        self.model = model
        self.settings = settings
        self.teacher = teacher  # no buffer: it stays on the host, and only a batch's rows go to the device

    def forward(self, batch: Batch) -> Output:
        if not self.settings.fgm_epsilon:
            return self._passes(batch)
        embedding: nn.Embedding = self.model.backbone.embedding
        # The gradient with respect to something added, since a frozen embedding has none.
        added = embedding.weight.new_zeros(sum(batch.lengths), embedding.embedding_dim, requires_grad=True)
        with moved(embedding, batch.input_ids, added):
            clean = self._passes(batch)
        with torch.autocast(added.device.type, enabled=False):  # a backward is in the precision of its forward
            (gradient,) = torch.autograd.grad(SCALE * clean.loss_sum, added, retain_graph=True)
        worse = self.settings.fgm_epsilon * by_sequence(gradient, Packing(batch.lengths, batch.cu_seqlens))
        with moved(embedding, batch.input_ids, worse):
            return Output(clean.loss_sum + self._passes(batch).loss_sum, clean.logits)

    def _passes(self, batch: Batch) -> Output:
        """R, or L where there is no R-Drop."""
        first = self._pass(batch)
        if not self.settings.r_drop_weight:
            return first
        second = self._pass(batch)
        p, q = (log_probabilities(self.model, out.logits, batch) for out in (first, second))
        divergence = ((p.exp() - q.exp()) * (p - q)).sum() / 2
        if self.model.origin.head == "question-answering":
            divergence = divergence / 2  # its loss is the mean of those of the first and the last token
        return Output((first.loss_sum + second.loss_sum) / 2 + self.settings.r_drop_weight * divergence, first.logits)

    def _pass(self, batch: Batch) -> Output:
        """L"""
        out: Output = self.model(batch)
        if self.teacher is None:
            return out
        share, temperature = self.settings.distillation_weight, self.settings.distillation_temperature
        logits = widened(out.logits)
        taught = self.teacher[torch.tensor(batch.indices, dtype=torch.int64)].to(logits)
        student, teacher = (log_probabilities(self.model, x / temperature, batch) for x in (logits, taught))
        agreement = temperature**2 * F.kl_div(student, teacher.exp(), reduction="sum")
        return Output((1 - share) * out.loss_sum + share * agreement, out.logits)


def log_probabilities(model: TaskModel, logits: Tensor, batch: Batch) -> Tensor:
    """The log-probabilities of all outcomes at each target; whatever is no target is left out.

    logits: in the shape of the model's head (models/heads.py), (n, C), or (n, V) at the supervised tokens of a language
    model, and so is the result. Several labels: (n, 2) of each label and of its absence. Question answering: (n,), of
    each token being the first, or the last, of its sequence's answer. In fp32 or wider.
    """
    wide, labels = widened(logits), batch.labels
    if labels is None:
        raise TypeError("only labelled examples can be trained on")
    head = model.origin.head or ""
    if head.endswith("-lm"):
        if len(wide) != batch.num_targets:
            raise TypeError("a language model that has not kept its logits cannot be compared")
        return wide.log_softmax(-1)
    if head == "question-answering":
        packing = Packing(batch.lengths, batch.cu_seqlens)
        spans = padded(wide, packing, float("-inf")).log_softmax(1)  # (B, L, 2)
        real = torch.arange(spans.shape[1], device=wide.device) < packing.cu_seqlens.diff()[:, None]
        return spans[real[:, :, None] & (labels != IGNORE)[:, None]]
    if model.head.shape.problem == "multi-label":
        chosen = wide[~labels.isnan() & (labels != IGNORE)]
        return torch.stack([F.logsigmoid(chosen), F.logsigmoid(-chosen)], -1)
    target = ~labels.isnan().any(-1) if labels.is_floating_point() else labels != IGNORE
    return wide[target].log_softmax(-1)


@contextmanager
def moved(embedding: nn.Embedding, ids: Tensor | None, by: Tensor) -> Iterator[None]:
    """While it lasts, `by`, (T, D), is added to the embeddings of `ids`, (T,); of that tensor alone, no other ids."""
    hook = embedding.register_forward_hook(lambda module, inputs, output: output + by if inputs[0] is ids else output)
    try:
        yield
    finally:
        hook.remove()


def by_sequence(gradient: Tensor, packing: Packing) -> Tensor:
    """(T, D) -> each sequence's part at length 1 (L2, over its tokens and D); 0 where it is 0 or not finite.

    Squared in fp64, where the smallest gradients do not vanish.
    """
    squares = gradient.double().square().sum(-1)
    count = len(packing.lengths)
    sequence = torch.arange(count, device=gradient.device)
    sequence = torch.repeat_interleave(sequence, packing.cu_seqlens.diff(), output_size=len(gradient))
    norm = squares.new_zeros(count).index_add(0, sequence, squares).sqrt()[sequence, None]
    return torch.where((norm > 0) & norm.isfinite(), gradient / norm, 0.0).to(gradient.dtype)
