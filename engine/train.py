"""Fine-tune a pretrained model. This file is the loop; copy it and change what you like, nothing imports it.

    torchrun -m engine.train [RECIPE] [--section.key=value ...] [--resume] [--dry-run] [--help]
    torchrun --nproc-per-node 2 -m engine.train [RECIPE] ...

The recipe defines the mathematics; the machine only defines the speed: a step of the optimizer is `train.global_batch_size`
examples, however many ranks and micro-batches it takes, and its loss is the sum over all its targets divided by their
number. Everything random is a pure function of the seed and of where the run stands, so no random state is ever saved.
On a CPU an interrupted run that is resumed is the uninterrupted one bit for bit; on a GPU, where nothing here asks for
deterministic kernels, it is so but for the order in which they add.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import models
from data import MicroBatching, sample_rows, steps_per_epoch, totals, training_steps
from data.teacher import read_teacher
from engine import checkpoint, cli, config, diagnose, distributed, validate
from engine import summary as describe
from engine.cli import StopRequest
from engine.config import Config
from engine.distributed import Ranks
from engine.ema import Ema
from engine.evaluate import measure
from engine.log import RunLog, require_tensorboard
from engine.memory import halve_micro_batches, largest_micro_batching
from engine.model import build_model, spare_memory_or_time
from engine.objective import training_objective
from engine.optim import build_optimizer, check_schedule, count_steps, learning_rate, set_learning_rate
from engine.precision import Precision
from engine.regularize import DropoutSchedule, Penalties, Unfreezing, seed_dropout, weigh_classes_
from engine.state import TrainState, mode_of
from engine.tasks import find_task, read_training_data

USAGE = "torchrun -m engine.train [RECIPE] [--section.key=value ...] [--resume] [--dry-run] [--help]"


def train(cfg: Config, ranks: Ranks, stop: StopRequest, resumed: Path | None = None) -> dict[str, float] | None:
    """Run a recipe to its end or the end of its patience; returns the metrics, or None when `stop` ended it early.

    resumed: the checkpoint of an earlier part of this run to go on from (checkpoint.claim finds it).
    """
    # Initialisation, in this order because each part needs the ones before it.
    # 1. The task, and data as rows: every mistake in a file is found here, before anything is loaded.
    task, watched = find_task(cfg.run.task, cfg.eval.metric)
    mode = mode_of(cfg.eval, watched)
    require_tensorboard(cfg.log.tensorboard)
    data = cfg.data
    settings = validate.task_settings(cfg, task)
    train_rows, validation_rows, test_rows, labels = read_training_data(task, settings, cfg.run.seed)

    # 2. The model. It decides the order of the labels, since a head found in a checkpoint has its own.
    smoothing = cfg.regularize.label_smoothing
    model, folder_in = build_model(cfg.model, task, labels, smoothing, cfg.run.seed, resumed)
    model.to(ranks.device)

    # 3. Data as examples, encoded once; the training ones may be augmented, anew in each epoch. How a step is cut for
    # this machine is no part of the recipe.
    processor = task.load_processor(folder_in)
    validate.check_fit(cfg, model, processor)
    encode = task.encoder(processor, settings, model.labels)
    train_set, validation_set, test_set = encode(train_rows), encode(validation_rows), encode(test_rows)
    weigh_classes_(model, cfg.regularize, train_set.label_counts(len(model.labels)))
    teacher = read_teacher(data.teacher_file, train_set.ids, model.labels) if data.teacher_file else None
    seen_set = encode(sample_rows(train_rows, cfg.eval.train_subset_size, cfg.run.seed)[: cfg.eval.train_subset_size])
    train_set = task.augment(train_set, train_rows, encode, cfg.augment, cfg.run.seed)
    fixed = cfg.train.micro_batch_size if isinstance(cfg.train.micro_batch_size, int) else 0
    cut = MicroBatching(fixed, cfg.train.micro_batch_tokens, ranks.rank, ranks.world_size)
    epoch_steps = steps_per_epoch(len(train_set), cfg.train.global_batch_size)
    total_steps = count_steps(cfg.train, epoch_steps)
    check_schedule(cfg.optim, total_steps)
    evaluate_every = cfg.eval.every_steps or epoch_steps

    # 4. What steps: precision, optimizer, and what regularises. After this every mistake in the recipe is known.
    amp = Precision(cfg.train.precision, ranks.device)
    objective = training_objective(model, cfg.regularize, teacher)
    optimizer = build_optimizer(model, cfg.optim, cfg.optim.weight_decay)
    start = build_model(cfg.model, task, labels, smoothing, cfg.run.seed, None)[0] if cfg.regularize.l2_sp else None
    penalties = Penalties(model, cfg.regularize, start)
    unfreezing = Unfreezing(model, cfg.model.gradual_unfreezing, total_steps)
    dropout = DropoutSchedule(model, cfg.model.dropout, total_steps)
    ema = Ema(optimizer, cfg.regularize.ema_decay)
    spare_memory_or_time(model, cfg.train)
    if cfg.train.micro_batch_size == "auto":
        cut = largest_micro_batching(cut, objective, train_set, cfg.train.global_batch_size, amp, ranks)
    if ranks.is_main:
        print(describe.run(cfg, model, processor, train_set, validation_set, test_set, total_steps, cut), flush=True)
    if cfg.run.dry_run:
        return {}

    # 5. The state of the run, the model as all ranks share it, where it is written, and where the data begins.
    contents = checkpoint.Contents(cfg, model, optimizer, amp, folder_in, (train_set, validation_set), teacher)
    state = checkpoint.restore(resumed, contents, ranks) if resumed else TrainState()
    unfreezing.set_(state.step)
    parallel = distributed.wrap(objective, ranks, nothing := train_set.batch([])).train()
    folder = Path(cfg.run.folder)
    log = RunLog(folder, ranks, start=state.step, total=total_steps, tensorboard=cfg.log.tensorboard)
    pin = ranks.device.type == "cuda"
    draw = partial(
        training_steps, train_set, cfg.train.global_batch_size, cfg.run.seed, num_workers=cfg.data.num_workers, pin_memory=pin
    )
    steps = draw(cut, start=state.position)

    # 6. The loop. `state.position` counts steps of data, `state.step` those the optimizer took. From here on a signal
    # leaves a checkpoint; before there is nothing to save, and it ends the run at once.
    stop.listen(announce=ranks.is_main)
    while not (done := state.reason_to_stop(total_steps, cfg.eval, mode)):
        clock = time.perf_counter()
        group = next(steps)
        waited = time.perf_counter() - clock
        targets, samples, tokens, stopping = distributed.all_sum(*totals(group), bool(stop))
        if stopping:
            break

        lr = learning_rate(state.step, total_steps, cfg.optim)
        set_learning_rate(optimizer, lr)
        dropout.set_(state.step)
        if unfreezing.set_(state.step):  # DDP is told anew what it reduces
            parallel = distributed.wrap(objective, ranks, nothing, instead_of=parallel)
        losses = []
        try:
            for i, batch in enumerate(group):
                distributed.set_gradient_sync(parallel, last=i == len(group) - 1)
                seed_dropout(cfg.run.seed, state.position, i, ranks.rank, ranks.device)
                with amp.autocast():
                    out = parallel(batch.to(ranks.device))
                # DDP averages over the ranks; times world_size it is their sum.
                amp.backward(out.loss_sum * (ranks.world_size / max(targets, 1)))
                losses.append(out.loss_sum.detach())
        except RuntimeError as error:  # of memory: the same step again, in smaller parts
            out, cut = None, halve_micro_batches(cut, group, error, state.step, ranks)
            optimizer.zero_grad()
            log.say(f"step {state.step + 1}: out of memory; from here on {cut.max_tokens:,} tokens at a time")
            steps = draw(cut, start=state.position)
            continue
        amp.unscale_(optimizer)
        penalties.add_gradients_()
        grad_norm = amp.clip_(model.parameters(), cfg.train.max_grad_norm)
        stepped = amp.step(optimizer, grad_norm)
        state.advance(stepped, int(samples))
        if stepped:
            ema.update_(state.step)
        else:  # raises, unless the policy is to leave such a step out
            log.say(diagnose.left_out(cfg.train, cfg.run.seed, state, model, group, amp, ranks))
        optimizer.zero_grad()

        log.count(state.step, samples, tokens, waited)
        if stepped and (state.step % cfg.log.every_steps == 0 or state.step == total_steps):
            (loss,) = distributed.all_sum(sum(loss.item() for loss in losses))
            log.train(state.step, loss / max(targets, 1), lr, grad_norm, penalties.log())
        if stepped and (state.step % evaluate_every == 0 or state.step == total_steps):
            clock = time.perf_counter()
            with ema.in_place_of_weights():
                metrics = measure(model, validation_set, task, amp, ranks, cfg.eval.batch_tokens, cfg.generate)
                is_best = state.record(metrics[watched], mode, cfg.eval.min_delta)
                seen = measure(model, seen_set, task, amp, ranks, cfg.eval.batch_tokens, cfg.generate)
                log.evaluation(state.step, metrics, seen, is_best, time.perf_counter() - clock)
                if ranks.is_main and (
                    texts := task.show_generations(model, validation_set, cfg.generate, cfg.eval.num_shown_generations)
                ):
                    log.say(texts)
                if is_best:
                    checkpoint.save(folder / checkpoint.BEST, contents, state, ranks)
            checkpoint.save(folder / checkpoint.LAST, contents, state, ranks)
            log.restart_clock()

    # 7. The end: of the steps, of the patience, or by a signal, which leaves a checkpoint to go on from.
    if not done:
        checkpoint.save(folder / checkpoint.LAST, contents, state, ranks)
        log.say(f"stopped at step {state.step} by a signal; the same command with --resume goes on")
        log.close()
        return None
    stop.unlisten()
    result = {f"best_{watched}": math.nan if state.best is None else state.best, "best_step": float(state.best_step)}
    if test_rows and state.best is not None:
        best = models.from_pretrained(checkpoint.open_run(str(folder)), head=task.head).to(ranks.device)
        metrics = measure(best, test_set, task, amp, ranks, cfg.eval.batch_tokens, cfg.generate)
        result |= {f"test_{name}": value for name, value in metrics.items()}
    log.final(state.step, result, done)
    return result


def main(argv: Sequence[str]) -> int:
    cfg = config.parse(list(argv), USAGE)
    stop = StopRequest()
    ranks = distributed.setup(cfg.run.device)
    with checkpoint.claim(cfg, ranks) as resumed:
        result = train(cfg, ranks, stop, resumed)
    return stop.exit_code if result is None else 0


if __name__ == "__main__":
    cli.run_command(main)
