"""Attention of packed sequences on the device, compared with the CPU in fp64; called by part 2.

On a GPU in bf16 and fp16 it is a flash kernel for packed sequences, in fp32 and with a bias another kernel on padded
ones (models/ops/attention.py). The cases have lengths on both sides of the kernels' blocks of 64 and 128 keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_check.check import Check, first_line
from engine.precision import DTYPES
from engine.regularize import seed_dropout
from models.ops.attention import has_flash, packed_attention, pad_bias
from models.ops.packing import Packing, cumulative_lengths

HEADS = 3
WIDTHS = (32, 64, 80, 12)  # of a head; 12 is no multiple of 8, which flash needs
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}  # relative errors of outputs and of gradients
RAGGED = (129, 64, 64, 17, 1, 200)
RATE = 0.1


@dataclass(frozen=True)
class Case:
    """Lengths of the queries and, unless they are the same, of the keys."""

    name: str
    lengths: tuple[int, ...] = RAGGED
    key_lengths: tuple[int, ...] = ()
    causal: bool = False
    biased: bool = False


CASES = (
    Case("ragged"),
    Case("equal", lengths=(96,) * 4),
    Case("causal", causal=True),
    Case("cross-attention", key_lengths=(30, 257, 5, 5, 130, 64)),
    Case("first tokens", lengths=(1,) * len(RAGGED), key_lengths=RAGGED),
    Case("with a bias", biased=True),
)


def check_attention(check: Check) -> None:
    """Write a row for each case and precision, the worst of all widths of a head; then check dropout."""
    if check.device.type == "cuda":
        answer = "is used in bf16 and fp16" if has_flash(check.device) else "is missing here: sequences are padded"
        check.note("attention", f"the flash kernel for packed sequences {answer}")
    for case in CASES:
        for precision in check.precisions:
            try:
                widths = WIDTHS[:2] if check.shrink else WIDTHS
                errors = {compare(check, case, width, precision): width for width in widths}
                worst = max(errors, key=max)
                ok = max(worst) <= LIMITS[precision]
                figures = dict(zip(("loss_error", "gradient_error"), worst, strict=True))
                where = "" if ok else f"heads of {errors[worst]}"
                check.add(f"attention, {case.name}", precision, ok=ok, where=where, **figures)
            except RuntimeError as error:
                check.add(f"attention, {case.name}", precision, ok=False, where=first_line(error))
    for precision in check.precisions:
        check_dropout(check, precision)


def compare(check: Check, case: Case, width: int, precision: str) -> tuple[float, float]:
    """Return the relative errors of the output and of the gradients of one case."""
    generator = torch.Generator().manual_seed(0)
    if check.shrink:
        case = replace(case, lengths=shrunk(case.lengths), key_lengths=shrunk(case.key_lengths))
    lengths, key_lengths = case.lengths, case.key_lengths or case.lengths
    shapes = [(sum(n), HEADS, width) for n in (lengths, key_lengths, key_lengths)]
    shapes += [(HEADS, max(lengths), max(key_lengths))] if case.biased else []
    dtype = DTYPES[precision]
    # Rounded first, so that both sides have the same inputs.
    inputs = [torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes]
    weights = torch.randn(sum(lengths), HEADS * width, generator=generator).to(dtype).double()
    expected = attend(case, inputs, weights, torch.device("cpu"))
    on_device = [x.to(check.device, dtype) for x in inputs]
    found = attend(case, on_device, weights.to(check.device, dtype), check.device)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    return errors[0], max(errors[1:])


def shrunk(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return lengths for a CPU."""
    return tuple(-(-length // 16) for length in lengths)


def attend(case: Case, inputs: list[Tensor], weights: Tensor, device: torch.device) -> list[Tensor]:
    """Return the output and the gradients of its weighted sum; inputs: query, key, value and perhaps a bias."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    query, key, value, *table = leaves
    packing, keys = (
        Packing(n, cumulative_lengths(n, device)) for n in (case.lengths, case.key_lengths or case.lengths)
    )
    bias = pad_bias(table[0], keys.max_length, keys, query.dtype) if table else None
    out = packed_attention(query, key, value, packing, key_packing=keys, causal=case.causal, bias=bias)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def check_dropout(check: Check, precision: str) -> None:
    """Check that dropout keeps the mean, repeats with its seed, and drops the same weights in the backward."""
    lengths, dtype = (5, 9, 9, 3) * 64, DTYPES[precision]  # 64 groups of sequences
    packing = Packing(lengths, cumulative_lengths(lengths, check.device))
    values = torch.ones(sum(lengths), 2, 64, device=check.device, dtype=dtype).requires_grad_()
    queries = (0.1 * torch.randn(values.shape, device=check.device)).to(dtype)
    outputs = []
    for position in (0, 0, 1):
        seed_dropout(7, position, 0, 0, check.device)
        outputs.append(packed_attention(queries, queries, values, packing, dropout=RATE))
    (gradient,) = torch.autograd.grad(outputs[2].sum(), values)
    # All columns of a head are equal, and so are the mean and the sum of one.
    first, again, other = (x.detach()[:, ::64].double() for x in outputs)
    # The output is linear in the values: within its sequences its sum is that of the gradient, if the same weights were
    # dropped in the backward.
    sums, of_gradient = (x.unflatten(0, (64, -1)).sum(1) for x in (other, gradient.double().mean(2)))
    difference = float((of_gradient / sums - 1).abs().max())
    spread = float(first.std()) / first.numel() ** 0.5
    off = abs(float(first.mean()) - 1)
    repeats, differs = bool(torch.equal(first, again)), not torch.equal(first, other)
    rounding = LIMITS[precision] / 4
    ok = repeats and differs and off <= 6 * spread + rounding and difference <= rounding
    text = f"mean off by {off:.1e}, the backward by {difference:.1e}, "
    text += f"same seed repeats: {repeats}, another differs: {differs}"
    check.add("dropout of attention", precision, ok=ok, where=text)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, computed in fp64 on the CPU."""
    return float((found.double().cpu() - expected).norm() / expected.norm())
