"""The training objective: the loss of the head or a plugin's loss, with R-Drop, distillation and FGM.

Everything happens inside one forward, so that the loop, DDP and mixed precision see one model. The objective is a sum
over the targets of a micro-batch, like the loss of a head. With dropout 0 it is therefore independent of the sizes of
micro-batches and the number of ranks. The log has this loss; evaluation reports the loss of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from engine.config import ConfigError, DropoutSettings, RegularizeSettings, choose_from
from engine.errors import TrainingError
from engine.regularize import DropoutSchedule
from engine.step_loss import CoupledObjective, StepLoss
from models import Output, TaskModel
from models.heads import Head
from models.ops.layers import upcast
from models.ops.packing import Packing, to_device

# name -> loss(logits, batch): a scalar, the sum of the losses of all targets of a micro-batch, which may be empty.
# logits: in the shape of the head (models/heads.py). Plugins add theirs; train.loss names one.
LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {}
FGM_LOSS_SCALE = 1024.0  # in fp16 small gradients would underflow; the direction of FGM does not depend on it


def training_objective(
    model: TaskModel,
    settings: RegularizeSettings,
    teacher: Tensor | None,
    loss: str = "",
    step_loss: StepLoss | None = None,
) -> nn.Module:
    """Return the module that the loop calls: the model itself if its head's loss is all, else an Objective around it.

    teacher: (N, C) fp32 logits of the training examples, in the order of the training set (data/teacher.py).
    loss: a key of LOSSES; "" is the head's own loss. step_loss: that of a task whose examples depend on each other.
    Raises ConfigError for a setting that this model does not support, or that would have no effect on it.
    """
    if loss and loss not in LOSSES:
        known = choose_from(loss, LOSSES) if LOSSES else "there is none; run.plugins names a file that defines LOSSES"
        raise ConfigError(f"train.loss = {loss!r}: {known}")
    if step_loss is not None:
        _check_coupled(settings, loss)
        return CoupledObjective(model, step_loss)
    _check(model, settings, teacher)
    for head in model.head.heads if model.head is not None else []:
        head.keep_logits = bool(settings.r_drop_weight or loss)  # nothing else reads them in training
    if loss or settings.r_drop_weight or settings.fgm_epsilon or settings.distillation_weight:
        return Objective(model, settings, teacher, LOSSES[loss] if loss else None)
    return model


def check_loss(loss: object, name: str) -> None:
    """Raise TrainingError unless `loss` is a tensor that can be trained on: one number, with a gradient."""
    if not isinstance(loss, Tensor):
        problem = f"{type(loss).__name__}"
    elif loss.ndim:
        problem = f"tensor of shape {[*loss.shape]}"
    elif torch.is_grad_enabled() and not loss.requires_grad:
        problem = "tensor without a gradient"
    else:
        return
    raise TrainingError(
        f"{name} is a {problem}; it should be a scalar tensor with a gradient, the sum over the targets of a "
        "micro-batch"
    )


def named_parameters(objective: nn.Module, model: TaskModel) -> dict[str, nn.Parameter]:
    """Return {name: parameter}: the model's under their own names, then the objective's others as "objective.NAME".

    All that is optimised, clipped, saved and resumed comes from here. A user's module beside the model only has to be a
    submodule of the objective.
    """
    named = dict(model.named_parameters())
    own = set(named.values())
    others = {f"objective.{name}": p for name, p in objective.named_parameters() if p not in own}
    return named | others


def extra_state(objective: nn.Module, model: TaskModel) -> dict[str, Tensor]:
    """Return {"objective.NAME": tensor} of the objective's parameters and buffers that are not the model's."""
    own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    state = objective.state_dict(keep_vars=True)
    return {f"objective.{name}": tensor for name, tensor in state.items() if id(tensor) not in own}


def _check_coupled(settings: RegularizeSettings, loss: str) -> None:
    """Raise ConfigError for a setting that reads the loss of each example alone."""
    given = {f"regularize.{name}": getattr(settings, name) for name in ("r_drop_weight", "fgm_epsilon")}
    given |= {"regularize.distillation_weight": settings.distillation_weight, "train.loss": loss}
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{name} = {value!r} needs the loss of each example alone, and this task has one loss of all examples "
                "of a step: leave it out"
            )


def _check(model: TaskModel, settings: RegularizeSettings, teacher: Tensor | None) -> None:
    if model.head is None:
        raise ConfigError("a model without a head has no loss to train on")
    head, problem = model.head, model.head.shape.problem
    if settings.r_drop_weight and problem == "regression":
        raise ConfigError(
            f"regularize.r_drop_weight = {settings.r_drop_weight:g} compares probabilities, and a regression has none: "
            "leave it out"
        )
    if settings.r_drop_weight and not any(rate for *_, rate in DropoutSchedule(model, DropoutSettings(), 0).rates):
        raise ConfigError(
            f"regularize.r_drop_weight = {settings.r_drop_weight:g} compares two passes, which are equal without "
            "dropout: set model.dropout.all, or leave it out"
        )
    if settings.fgm_epsilon and model.embedding is None:
        raise ConfigError(
            f"regularize.fgm_epsilon = {settings.fgm_epsilon:g} perturbs the embeddings of words, and this model reads "
            "images: leave it out"
        )
    if settings.distillation_weight and (problem == "regression" or not head.supports_distillation):
        kind = "a regression" if problem == "regression" else f"the head {model.head_name}"
        raise ConfigError(
            f"regularize.distillation_weight = {settings.distillation_weight:g}: a teacher has logits for the classes "
            f"of a whole example, which {kind} does not learn: leave it out"
        )
    if settings.distillation_weight and teacher is None:
        raise ConfigError(
            f"regularize.distillation_weight = {settings.distillation_weight:g} needs data.teacher_file, a file of a "
            "teacher's logits as engine.predict writes it"
        )
    if teacher is not None and not settings.distillation_weight:
        raise ConfigError(
            "data.teacher_file has no effect with regularize.distillation_weight = 0: set the teacher's share of the "
            "loss, such as 0.5, or leave the file out"
        )


class Objective(nn.Module):
    """A model whose loss_sum is the training objective; `logits` are those of its first pass.

    One pass: CE is the loss of each target, d = distillation_weight and t = distillation_temperature:

        L = (1 - d) CE + d t^2 KL(teacher || model), both softmax(logits / t)

    (Hinton et al. 2015, "Distilling the knowledge in a neural network"; the KL's gradient is that of the cross entropy,
    and it is 0 where the two agree). With r_drop_weight there are two passes with different dropout:

        R = (L1 + L2) / 2 + r_drop_weight (KL(p1 || p2) + KL(p2 || p1)) / 2

    (Liang et al. 2021, "R-Drop"). With fgm_epsilon, x are the token embeddings of a sequence before any other
    operation. g is the gradient of R (or of L) with respect to x, treated as a constant. The loss is

        R(x) + R(x + fgm_epsilon g / |g|), |g| the L2 norm over the whole sequence

    (Miyato et al. 2017, "Adversarial training methods for semi-supervised text classification"). A sequence without
    gradient is not perturbed. In an encoder-decoder the encoder's input is perturbed. r_drop_weight and fgm_epsilon
    together take four passes.
    """

    def __init__(
        self,
        model: TaskModel,
        settings: RegularizeSettings,
        teacher: Tensor | None,
        loss: Callable[[Tensor, Batch], Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.settings = settings
        self.teacher = teacher  # not a buffer: it stays on the host, and only the rows of a batch go to the device
        self.loss = loss  # None: the head's own

    @property
    def head(self) -> Head:
        """The head of the model; training_objective has checked that there is one."""
        if self.model.head is None:
            raise TypeError("an objective needs a model with a head")
        return self.model.head

    def forward(self, batch: Batch) -> Output:
        """Return the objective of a micro-batch, summed over its targets, and the logits of the first pass."""
        if not self.settings.fgm_epsilon:
            return self._forward_r_drop(batch)
        embedding = self.model.embedding
        if embedding is None:
            raise TypeError("regularize.fgm_epsilon needs a model that reads words")
        # The gradient with respect to zeros that are added to the embeddings, since frozen embeddings have none.
        weight, shape = embedding.weight, (sum(batch.lengths), embedding.embedding_dim)
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        with perturbed(embedding, batch.input_ids, zeros):
            clean = self._forward_r_drop(batch)
        with torch.autocast(zeros.device.type, enabled=False):  # a backward runs in the precision of its forward
            (gradient,) = torch.autograd.grad(FGM_LOSS_SCALE * clean.loss_sum, zeros, retain_graph=True)
        direction = unit_norm_per_sequence(gradient, Packing(batch.lengths, batch.cu_seqlens))
        with perturbed(embedding, batch.input_ids, self.settings.fgm_epsilon * direction):
            adversarial = self._forward_r_drop(batch)
        return Output(clean.loss_sum + adversarial.loss_sum, clean.logits)

    def _forward_r_drop(self, batch: Batch) -> Output:
        """Return R, or L without R-Drop."""
        first = self._forward_once(batch)
        if not self.settings.r_drop_weight:
            return first
        second = self._forward_once(batch)
        p, q = (self.head.log_probabilities(out.logits, batch) for out in (first, second))
        divergence = ((p.exp() - q.exp()) * (p - q)).sum() / 2
        if self.head.divergence_scale != 1.0:
            divergence = divergence * self.head.divergence_scale
        return Output((first.loss_sum + second.loss_sum) / 2 + self.settings.r_drop_weight * divergence, first.logits)

    def _forward_once(self, batch: Batch) -> Output:
        """Return L."""
        out: Output = self.model(batch)
        if self.loss is not None:
            out = Output(self.loss(out.logits, batch), out.logits)
            check_loss(out.loss_sum, "what the function of train.loss returns")
        if self.teacher is None:
            return out
        weight, temperature = self.settings.distillation_weight, self.settings.distillation_temperature
        logits = upcast(out.logits)
        rows = self.teacher[torch.tensor(batch.indices, dtype=torch.int64)].to(logits.dtype)
        teacher_logits = to_device(rows, logits.device)
        student, teacher = (self.head.log_probabilities(x / temperature, batch) for x in (logits, teacher_logits))
        agreement = temperature**2 * F.kl_div(student, teacher.exp(), reduction="sum")
        return Output((1 - weight) * out.loss_sum + weight * agreement, out.logits)


@contextmanager
def perturbed(embedding: nn.Embedding, ids: Tensor | None, perturbation: Tensor) -> Iterator[None]:
    """Add `perturbation`, (T, D), to the embeddings of the tensor `ids`, (T,), inside the block."""
    handle = embedding.register_forward_hook(
        lambda module, inputs, output: output + perturbation if inputs[0] is ids else output
    )
    try:
        yield
    finally:
        handle.remove()


def unit_norm_per_sequence(gradient: Tensor, packing: Packing) -> Tensor:
    """Return (T, D) with the rows of each sequence scaled to L2 norm 1 together; 0 if their norm is 0 or not finite.

    The squares are in fp64, in which the smallest gradients do not underflow.
    """
    squares = gradient.double().square().sum(-1)
    count = len(packing.lengths)
    sequence = torch.arange(count, device=gradient.device)
    sequence = torch.repeat_interleave(sequence, packing.cu_seqlens.diff(), output_size=len(gradient))
    norm = squares.new_zeros(count).index_add(0, sequence, squares).sqrt()[sequence, None]
    return torch.where((norm > 0) & norm.isfinite(), gradient / norm, 0.0).to(gradient.dtype)
