"""Fine-tune a pretrained model. This file is the training loop: read it from top to bottom, copy it, change it.

    torchrun -m engine.train [RECIPE] [--section.key=value ...] [--resume] [--dry-run] [--help]
    torchrun --nproc-per-node 2 -m engine.train [RECIPE] ...

The recipe defines the mathematics; the machine only defines the speed. An optimizer step takes
`train.global_batch_size` examples, whatever the number of ranks and micro-batches. Its loss is the sum over all its
targets divided by their number. All randomness is a pure function of the seed and the position in the run, so no random
state is saved. A resumed run equals the uninterrupted one bit for bit on a CPU, on a GPU up to the order of additions.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data import sample_rows, steps_per_epoch, totals, training_steps
from data.teacher import read_teacher
from engine import checkpoint, cli, diagnose, disk, distributed, first_screen, machines, summary, validate
from engine.cli import StopRequest
from engine.config import Config
from engine.coupling import couple_micro_batches
from engine.distributed import Ranks
from engine.ema import Ema
from engine.errors import TrainingError
from engine.evaluate import evaluate, show_generations
from engine.evaluation_batches import EvaluationContext
from engine.imbalance import apply_class_weights, apply_pos_weight, classes_to_balance, describe_sampler
from engine.judging import calibrate, describe_judging, evaluate_at_start, forget_calibration
from engine.kept_limit import KeptLimit
from engine.kernels import describe_kernels
from engine.log import RunLog, check_log, read_numbers
from engine.memory import (
    any_out_of_memory,
    catch_out_of_memory,
    check_can_repeat,
    halve_micro_batches,
    micro_batch_limits,
)
from engine.model import apply_machine_settings, build_model, load_best
from engine.model_card import write_card
from engine.mps import move
from engine.multi_task import open_task
from engine.objective import named_parameters, training_objective
from engine.optim import (
    build_optimizer,
    check_compiled_gradients,
    check_names,
    check_parameters,
    check_schedule,
    count_steps,
    learning_rate,
    set_learning_rate,
)
from engine.optimizer_state import state_bytes
from engine.optimizers import describe_optimizer
from engine.plugins import load_plugins, try_own_metrics
from engine.precision import Precision
from engine.prefetch import StepFetcher
from engine.regularize import (
    DropoutSchedule,
    GradualUnfreezing,
    Penalties,
    seed_dropout,
    seed_everything,
)
from engine.report import write_page
from engine.save_schedule import SaveSchedule
from engine.screen import Screen
from engine.sharding import describe_sharding, gathered, plan_sharding
from engine.spikes import SpikeWatch
from engine.state import TrainState, metric_direction
from engine.tasks import read_training_data
from engine.watch import explain_best

USAGE = "python -m engine.train [RECIPE] [--section.key=value ...] [--resume] [--dry-run]"


def train(cfg: Config, ranks: Ranks, stop: StopRequest, resumed: Path | None = None) -> dict[str, float] | None:
    """Run a recipe to the end of its steps or its patience; return the metrics, or None if `stop` ended the run.

    resumed: the checkpoint of this run to continue from (checkpoint.claim finds it).
    """
    # 1. The task, and the data as rows. All errors in the files are found here, before the model is loaded.
    screen = Screen(cfg.log, ranks.is_main)
    seed, batch_size = cfg.run.seed, cfg.train.global_batch_size
    task, watched = open_task(cfg)
    direction = metric_direction(cfg.eval, watched)
    check_log(cfg.log)
    check_names(cfg.optim)
    settings = validate.task_settings(cfg, task)
    train_rows, validation_rows, test_rows, labels, notes = read_training_data(task, settings, seed)

    # 2. The model. It determines the order of the labels, since the head of a checkpoint has its own.
    seed_everything(seed)
    smoothing = cfg.regularize.label_smoothing
    shard = plan_sharding(cfg.distributed.strategy, cfg.train.precision, cfg.optim.offload, ranks)
    model, pretrained_folder = build_model(cfg.model, task, labels, smoothing, seed, resumed, shard)
    move(model, ranks.device)

    # 3. The data as examples. They are encoded once; augmentation changes the training examples in each epoch.
    processor = task.load_processor(pretrained_folder)
    validate.check_metric(task, watched, model.labels)
    validate.check_thresholds(cfg, task, model.labels)
    validate.check_fit(cfg, model, processor)
    encode = task.encoder(processor, settings, model.labels)
    train_set = encode(train_rows)
    validation_set = encode(validation_rows)
    test_set = encode(test_rows)
    validate.check_encoded(cfg, model, train_set, validation_set, test_set)
    try_own_metrics(task, validation_set, model.labels)
    counts = train_set.label_counts(len(model.labels))
    apply_class_weights(model, cfg.regularize, counts)
    notes += apply_pos_weight(model, cfg.regularize, counts, len(train_set))
    classes = classes_to_balance(cfg.train.sampler, train_set)
    notes += describe_sampler(classes, model.labels, cfg.regularize)
    teacher = read_teacher(cfg.data.teacher_file, train_set.ids, model.labels) if cfg.data.teacher_file else None
    subset_size = cfg.eval.train_subset_size
    train_subset = encode(sample_rows(train_rows, subset_size, seed)[:subset_size])
    train_set = task.augment(train_set, train_rows, encode, cfg.augment, seed)
    epoch_steps = steps_per_epoch(len(train_set), batch_size)
    total_steps = count_steps(cfg.train, epoch_steps)
    check_schedule(cfg.optim, total_steps)
    evaluate_every = cfg.eval.every_steps or epoch_steps

    # 4. The objective (the model and what else its loss needs), the optimizer and the regularisers. All errors in the
    # recipe have been found after this part.
    amp = Precision(cfg.train.precision, ranks.device)
    objective = training_objective(model, cfg.regularize, teacher, cfg.train.loss, task.step_loss(settings))
    optimizer = build_optimizer(named_parameters(objective, model), cfg.optim)
    check_parameters(objective, optimizer)
    l2_sp = cfg.regularize.l2_sp
    pretrained = build_model(cfg.model, task, labels, smoothing, seed, None, shard)[0] if l2_sp else None
    penalties = Penalties(model, cfg.regularize, pretrained)
    unfreezing = GradualUnfreezing(model, cfg.model.gradual_unfreezing, total_steps)
    dropout = DropoutSchedule(model, cfg.model.dropout, total_steps)
    ema = Ema(optimizer, cfg.regularize.ema_decay)
    apply_machine_settings(model, cfg.train, cfg.run.deterministic)
    notes += describe_kernels(ranks.device, cfg.train, cfg.run)
    notes += describe_sharding(cfg.distributed.strategy, shard, model)
    kept_limit = KeptLimit(Path(cfg.run.folder), cfg.train)
    has_average = cfg.regularize.ema_decay > 0
    states = state_bytes(optimizer, has_average)
    limits = micro_batch_limits(cfg.train, objective, states, train_set, amp, kept_limit, ranks)
    notes += kept_limit.describe(limits)
    weights = named_parameters(objective, model).values()
    notes += disk.describe_disk(cfg.run, cfg.checkpoint.keep, weights, optimizer, has_average, model)
    notes += describe_optimizer(cfg.optim)
    notes += describe_judging(cfg.eval, cfg.data.group_column)
    sets = (train_set, validation_set, test_set)
    facts = (model, processor, sets, notes, total_steps, limits, ranks.device)
    described = summary.describe_run(cfg, *facts) if ranks.is_main else None
    first_screen.show(described, screen, cfg.run.dry_run)
    if cfg.run.dry_run:
        return {}

    # 5. The state of the run, the model on all ranks, the log, the micro-batches from where the run starts or resumes.
    contents = checkpoint.Contents(
        cfg, objective, model, optimizer, amp, pretrained_folder, (train_set, validation_set), teacher
    )
    state = checkpoint.restore(resumed, contents, ranks) if resumed else TrainState()
    distributed.check_agreement(
        {"the checksum of the data": f"{contents.fingerprint}-{test_set.fingerprint()}", "the state": state}
        | machines.describe_checkpoint(pretrained_folder)
    )
    unfreezing.set_(state.step)
    empty_batch = train_set.batch([])
    parallel = distributed.wrap(objective, ranks, empty_batch, amp).train()
    folder = Path(cfg.run.folder)
    log = RunLog(folder, ranks, cfg.log, screen, described, start=state.step, total=total_steps)
    spikes = SpikeWatch(cfg.log.spike_deviations, log.losses)
    saves = SaveSchedule(cfg.checkpoint, ranks, state if resumed else None)
    context = EvaluationContext(
        task, amp, ranks, cfg.eval.batch_tokens, cfg.generate, stop.is_seen, cfg.eval.confidence, screen.has_bar
    )
    step_loader = partial(
        training_steps,
        train_set,
        batch_size,
        seed,
        num_workers=cfg.data.num_workers,
        pin_memory=ranks.device.type == "cuda",
        classes=classes,
        timeout_seconds=cfg.distributed.timeout_seconds,
    )
    steps = StepFetcher(stop.guard(step_loader, limits, start=state.position), ranks.device)

    # 6. The loop. `state.position` counts all steps of data, `state.step` those that the optimizer took. From here on a
    # signal stops the run after a checkpoint; until here there is nothing to save, and it ends the process.
    stop.listen(announce=ranks.is_main)
    done = state.reason_to_stop(total_steps, cfg.eval, direction)
    if cfg.eval.at_start and not state.step:
        evaluate_at_start(model, validation_set, train_subset, context, log)
    while not done:
        # Evaluate, if this is due. It comes first, since a resumed run may have been stopped in an evaluation.
        if state.is_evaluation_due(evaluate_every, total_steps):
            clock = time.perf_counter()
            with ema.in_place_of_weights(), gathered(model):
                metrics = evaluate(model, validation_set, context)
                train_metrics = evaluate(model, train_subset, context)
                seconds = time.perf_counter() - clock
                generations = show_generations(model, validation_set, context, cfg.eval.num_shown_generations)
            if context.was_stopped:
                break
            is_best = state.record(metrics[watched], metrics.get("loss", math.nan), direction, cfg.eval.min_delta)
            log.log_evaluation(state.step, metrics, train_metrics, is_best, seconds)
            log.say(generations)
            if is_best:
                log.say(calibrate(model, validation_set, context, cfg.eval, ema))
                saves.save_best(folder, contents, state, ema)
                forget_calibration(model)
            log.restart_clock()
            done = state.reason_to_stop(total_steps, cfg.eval, direction)
            continue

        # Fetch all micro-batches of the step, whose loss is divided by the number of targets in all of them. The ranks
        # agree on that number, on stopping, and by the clock of rank 0 on saving.
        micro_batches = next(steps)  # none where the data could not be read, which stops the run
        waited = steps.seconds
        num_targets, num_examples, num_tokens, stopping, elapsed = distributed.all_sum(
            *totals(micro_batches), bool(stop), saves.elapsed()
        )
        if stopping:
            break
        if saves.is_due(state, elapsed):
            with log.paused():
                saves.save(folder, contents, state)

        # Schedules.
        log.begin_step(state.step + 1)
        lr = learning_rate(state.step, total_steps, cfg.optim)
        set_learning_rate(optimizer, lr)
        dropout.set_(state.step)
        if unfreezing.set_(state.step):  # DDP reduces the parameters that were trained when it was created
            parallel = distributed.wrap(objective, ranks, empty_batch, amp)

        # Forward and backward.
        loss_sums = []
        with catch_out_of_memory() as out_of_memory:
            micro_batches = couple_micro_batches(objective, parallel, micro_batches, amp, seed, state.position, ranks)
            for i, batch in enumerate(micro_batches):
                distributed.set_gradient_sync(parallel, last=i == len(micro_batches) - 1)
                seed_dropout(seed, state.position, i, ranks.rank, ranks.device)
                out = amp.forward(parallel, batch.to(ranks.device))
                loss_sums.append(out.loss_sum.detach())
                # DDP and FSDP average over the ranks; times world_size that is their sum.
                amp.backward(out.loss_sum * (ranks.world_size / max(num_targets, 1)))
            steps.fetch()  # the next step, while a GPU computes this one
        out = None  # frees the graph of the last forward
        has_begun = len(loss_sums) == len(micro_batches)  # the last backward, in which DDP exchanges gradients
        check_can_repeat(out_of_memory, parallel, micro_batches, has_begun, kept_limit, state.step, ranks)
        if any_out_of_memory(out_of_memory, parallel, empty_batch, ranks):
            optimizer.zero_grad()  # the same step again, in smaller micro-batches; what was fetched ahead is read again
            limits = halve_micro_batches(limits, micro_batches, out_of_memory, state.step, ranks)
            log.warn(f"step {state.step + 1}: out of memory; from here on {limits.max_tokens:,} tokens at a time")
            steps = StepFetcher(stop.guard(step_loader, limits, start=state.position), ranks.device)
            continue

        # Clip and step.
        if cfg.train.compile:
            check_compiled_gradients(optimizer, objective, state.step)
        amp.unscale_(optimizer)
        penalties.add_gradients_()
        norm = amp.clip_(objective.parameters(), cfg.train.max_grad_norm)
        stepped, grad_norm = amp.step(optimizer, norm)  # the only wait for a GPU in a step that is not logged
        state.advance(stepped, int(num_examples))
        if stepped:
            ema.update_(state.step)
            if state.step == 1:  # not first at a save, perhaps hours later
                checkpoint.check_optimizer(contents)
        else:  # raises, unless the policy is to skip such a step
            log.warn(diagnose.explain_skipped_step(contents, state, micro_batches, loss_sums, ranks))
        optimizer.zero_grad()
        distributed.share_buffers(objective)  # of rank 0 to all, such as the running statistics of a BatchNorm

        # Log, if this is due.
        log.count_step(state.step, num_examples, num_tokens, waited)
        is_last = state.step == total_steps
        if stepped and (state.step % cfg.log.every_steps == 0 or is_last):
            penalty, *losses = read_numbers(penalties.value, *loss_sums)
            (loss_sum,) = distributed.all_sum(sum(losses))
            loss = loss_sum / max(num_targets, 1)
            more = penalties.log(penalty) | spikes.check(loss, micro_batches)
            log.log_step(state.step, loss, lr, grad_norm, more)

    # 7. The end. The last state is saved. Then the best weights are tested, unless a signal or an error in reading the
    # data, which is raised here, has ended the loop.
    if not done and not state.step:
        stop.raise_error()  # there is nothing to save yet
    saves.finish(folder, contents, state)
    if not done:
        log.warn(f"stopped at step {state.step}; {saves.explain_resume()}")
        log.close()
        stop.raise_error()
        return None
    stop.restore_handlers()
    result = {f"best_{watched}": math.nan if state.best is None else state.best, "best_step": float(state.best_step)}
    has_test = bool(test_rows and state.best_step)
    problem = contents.verify_best(folder) if has_test else None
    if has_test and not problem:
        best = load_best(folder / checkpoint.BEST, task, shard)
        move(best, ranks.device)
        with gathered(best):
            test_metrics = evaluate(best, test_set, context)
        result |= {f"test_{name}": value for name, value in test_metrics.with_bounds().items()}
    log.final(state.step, result, done, cfg.train.max_grad_norm)
    log.say(explain_best(state, watched, log.values_of(watched)))
    if problem:
        raise TrainingError(f"{problem}; so data.test was not evaluated. {checkpoint.LAST}/ has the weights of the end")
    if ranks.is_main:
        log.say(write_card(folder / checkpoint.BEST, cfg, model, sets, pretrained_folder, result))
        write_page(folder)
    log.show_next(cfg.data.test or cfg.data.validation, cfg.run.plugins)
    return result


def main(argv: Sequence[str]) -> int:
    cfg = cli.parse(argv, USAGE)
    load_plugins(cfg.run.plugins)
    stop = StopRequest()
    ranks = distributed.setup(cfg.run.device, cfg.distributed.timeout_seconds)
    Screen(cfg.log, ranks.is_main).show(first_screen.name_default_recipe(argv))
    distributed.check_agreement(validate.shared_settings(cfg))
    with checkpoint.claim(cfg, ranks) as resumed:
        result = train(cfg, ranks, stop, resumed)
    return stop.exit_code if result is None else 0


if __name__ == "__main__":
    cli.run_command(main)
