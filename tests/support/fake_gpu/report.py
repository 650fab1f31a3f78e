"""What a rehearsal records: waits of the host, copies to the device, and kernels, by phase of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

# Ops without a kernel: views, allocations and questions.
WITHOUT_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select", "slice"),
    *("split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "device", "diagonal", "unfold", "_reshape_alias", "narrow", "lift_fresh"),
    *("is_same_size", "_has_same_storage_numel", "stride", "size", "sym_size", "sym_stride", "numel", "is_pinned"),
}
# Ops that launch several kernels; the numbers are lower bounds, read from PyTorch's CUDA sources.
KERNELS = {
    **dict.fromkeys(("native_layer_norm_backward", "_fused_rms_norm_backward", "repeat_interleave"), 2),
    **dict.fromkeys(("nonzero", "nonzero_static", "argsort", "sort"), 4),
    "embedding_dense_backward": 8,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_flash_attention_backward": 3,
}
# Ops that torch.use_deterministic_algorithms refuses on a GPU (torch's documentation of it), so that no run with
# run.deterministic may need them.
NOT_DETERMINISTIC = {
    *("nll_loss2d_forward", "nll_loss2d_backward", "put_", "histc", "median", "kthvalue", "_ctc_loss_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "grid_sampler_2d_backward"),
    *("avg_pool3d_backward", "max_pool3d_with_indices_backward", "reflection_pad2d_backward", "cumsum_"),
}
SORTED_INDEX_PUT = 10  # adding where indices may repeat sorts them first
TENSORS_PER_LAUNCH = 40  # of the _foreach functions, which take lists of tensors

SETUP, FORWARD, BACKWARD, STEP, LOG = "setup", "forward", "backward", "step", "log"
EVALUATION, GENERATION, SAMPLES, SAVE, LOOP = "evaluation", "generation", "samples", "save", "loop"
TRAINING = (FORWARD, BACKWARD, STEP, LOG, LOOP)


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    phase: str
    step: int  # of the run, from 0
    what: str
    where: tuple[str, ...]  # lines of the project, the innermost first

    def __str__(self) -> str:
        return f"[{self.phase}, step {self.step}] {self.what} at {' <- '.join(self.where[:3]) or 'torch'}"


@dataclass(frozen=True)
class Copy:
    """A copy from the host to the device."""

    phase: str
    step: int
    kind: str  # "pinned", "pageable" or "blocking"
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"[{self.phase}, step {self.step}] {self.kind} copy at {' <- '.join(self.where[:3]) or 'torch'}"


@dataclass(frozen=True)
class Update:
    """The launch of the optimizer's kernels."""

    step: int


@dataclass
class Report:
    """Everything that a rehearsal saw. `events` has waits, copies and updates in their order."""

    events: list[Wait | Copy | Update] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)  # by phase, lower bounds
    ops: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    steps: int = 0
    micro_batches: int = 0
    passes: int = 0  # evaluations
    batches: int = 0  # of all evaluations
    reads: int = 0  # forwards of generation, each a token of every unfinished text

    def waits(self, *phases: str) -> list[Wait]:
        """Return the waits, of all phases or some."""
        return [e for e in self.events if isinstance(e, Wait) and (not phases or e.phase in phases)]

    def copies(self, *phases: str) -> list[Copy]:
        """Return the copies to the device, of all phases or some."""
        return [e for e in self.events if isinstance(e, Copy) and (not phases or e.phase in phases)]

    def count_kernels(self, phase: str, name: str, args: Sequence[object] = ()) -> None:
        """Add the kernels of an op."""
        self.ops[phase][name] += 1
        if name.startswith("_fused_adam"):
            self.events.append(Update(self.steps))
        if name in WITHOUT_KERNEL:
            return
        launches = KERNELS.get(name, 1)
        if name.startswith(("_foreach_", "_fused_adam", "_amp_foreach")):
            tensors = next((x for x in args if isinstance(x, list | tuple) and x), [None])
            launches = -(-len(tensors) // TENSORS_PER_LAUNCH)
        elif "index_put" in name and len(args) > 3 and args[3]:
            launches = SORTED_INDEX_PUT
        self.kernels[phase] += launches
