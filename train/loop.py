"""The training loop of every stage that computes its loss in the model: pretrain, classify, tag, answer, distill.

A run is a pure function of its arguments, seed and data. Which rows make step 137, in which order, and the random numbers
that mask or drop there, follow from (seed, step, process) alone, so a checkpoint holds no sampler and no generator:
weights, optimizer state and the number of steps done are enough to continue bit for bit, in the middle of an epoch too.
"""

import contextlib
import copy
import ctypes
import json
import logging
import math
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from minibert.inference.cpu import bfloat16_is_faster
from minibert.train import checkpoint
from minibert.train.arguments import LoopArguments

logger = logging.getLogger(__name__)

# Changing these between two runs does not change the weights, so a resumed run may.
_FREE = {
    "log_steps",
    "save_steps",
    "save_total_limit",
    "eval_batch_size",
    "num_workers",
    "trackers",
    "preprocessing_num_workers",
    "cache_dir",
    "max_skipped_steps",  # a run that this limit stopped may go on with a higher one
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


# ------------------------------------------------------------------------------------------------------- pure functions


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "linear", decay_ratio: float = 0.1
) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then ``schedule``: linear or cosine to zero, constant, or wsd.

    wsd, warm-up, stable, decay, stays at ``peak`` up to the last ``decay_ratio`` of all steps and falls there as one minus
    a square root (Hägele et al. 2024, arXiv:2405.18392).

    >>> [learning_rate(s, peak=1.0, warmup=2, total=6) for s in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    >>> [round(learning_rate(s, peak=1.0, warmup=0, total=4, schedule="cosine"), 3) for s in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    >>> [round(learning_rate(s, peak=1.0, warmup=0, total=8, schedule="wsd", decay_ratio=0.5), 3) for s in (0, 4, 5, 7, 8)]
    [1.0, 1.0, 0.5, 0.134, 0.0]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "wsd":
        stable = total - max(1, round(decay_ratio * total))
        return peak * (1.0 - math.sqrt(min(1.0, max(0, step - stable) / (total - stable))))
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "constant": 1.0}[schedule]


def rows_of_step(step: int, *, rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """The rows of one optimizer step, over all processes: every epoch is a fresh permutation, cut into steps.

    >>> sorted(np.concatenate([rows_of_step(s, rows=5, rows_per_step=2, seed=0) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4]
    """
    epoch, place = divmod(step, math.ceil(rows / rows_per_step))
    order = _permutation(rows, seed, epoch)
    return order[place * rows_per_step : (place + 1) * rows_per_step]


def split_rows(rows: np.ndarray, *, accumulation: int, processes: int) -> list[list[np.ndarray]]:
    """Cut the rows of a step into micro-batches: ``result[a][p]`` is process p's part of the a-th one.

    Only the last step of an epoch is uneven. There parts may be empty, but never for all processes at once.

    >>> [[part.tolist() for part in parts] for parts in split_rows(np.arange(3), accumulation=2, processes=2)]
    [[[0], [1]], [[2], []]]
    """
    parts = np.array_split(rows, accumulation * processes)
    groups = [parts[start : start + processes] for start in range(0, len(parts), processes)]
    return [group for group in groups if len(group[0])]


def count_labels(batch: dict[str, Any]) -> int:
    """How many terms a model averages in its loss over ``batch``: labels that are not -100, or rows where labels have
    another name."""
    labels = batch.get("labels")
    return len(next(iter(batch.values()))) if labels is None else int((labels != -100).sum())


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch with a mixture of ``numbers``."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0].item()
    random.seed(state)
    np.random.seed(state)
    if torch.accelerator.is_available():
        torch.manual_seed(state)
    else:  # here it would note the seed for a GPU that never comes, at every step, in a list that only grows
        torch.default_generator.manual_seed(state)


_last_permutation: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (rows, seed, epoch)
    if key not in _last_permutation:
        _last_permutation.clear()
        _last_permutation[key] = np.random.default_rng([seed, epoch]).permutation(rows)
    return _last_permutation[key]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norm scales) do not, as in BERT."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


# --------------------------------------------------------------------------------------------------------------- data


class StepBatch(NamedTuple):
    """What one process computes in one optimizer step."""

    batches: list[dict[str, Tensor]]
    terms: list[int]  # of the loss, per micro-batch
    rows: list[int]  # per micro-batch
    tokens: int  # real ones


@dataclass(frozen=True)
class Phase:
    """A part of a run that has its own rows, batch size and peak learning rate.

    Attributes:
        rows: has a length and rows by number; a ``__getitems__`` is given many numbers at once.
        collate: makes the keyword arguments of the model from rows.
        batch_size: rows per process and batch.
        share: of the optimizer steps of the run.
    """

    rows: Any
    collate: Callable[[Any], dict[str, Tensor]]
    batch_size: int
    learning_rate: float
    share: float = 1.0


class Steps(Dataset[StepBatch]):
    """Item ``step`` is this process's :class:`StepBatch` of that optimizer step; any worker can make it, in any order."""

    def __init__(self, phases: Sequence[Phase], *, accumulation: int, seed: int, process: int, processes: int):
        self.phases, self.seed = phases, seed
        self.accumulation, self.process, self.processes = accumulation, process, processes
        # Steps that one pass over the data takes: phases share them out, each pass being its part of its phase's rows.
        whole = [math.ceil(len(phase.rows) / self.rows_per_step(phase)) for phase in phases]
        total = sum(phase.share for phase in phases)
        passes = sum(phase.share / total / steps for phase, steps in zip(phases, whole, strict=True))
        self.per_epoch = max(1, round(1 / passes))
        self.plan(self.per_epoch)

    def rows_per_step(self, phase: Phase) -> int:
        return phase.batch_size * self.accumulation * self.processes

    def plan(self, total: int) -> None:
        """Share out ``total`` steps among the phases."""
        shares = np.cumsum([phase.share for phase in self.phases])
        self.ends = [round(share * total) for share in shares / shares[-1]]

    def locate(self, step: int) -> tuple[int, int]:
        """Number of the phase that ``step`` belongs to, and the steps done in it before. Later steps are the last phase's."""
        number = next((at for at, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return number, step - (self.ends[number - 1] if number else 0)

    def row_ids(self, step: int) -> np.ndarray:
        number, place = self.locate(step)
        phase = self.phases[number]
        return rows_of_step(
            place, rows=len(phase.rows), rows_per_step=self.rows_per_step(phase), seed=self.seed + number * 1_000_003
        )

    def __getitem__(self, step: int) -> StepBatch:
        seed_everything(self.seed, step, self.process, 0)
        batches, terms, counts, tokens = [], [], [], 0
        rows = self.row_ids(step)
        phase = self.phases[self.locate(step)[0]]
        for parts in split_rows(rows, accumulation=self.accumulation, processes=self.processes):
            mine = parts[self.process]
            batch = phase.collate(_fetch(phase.rows, mine if len(mine) else rows[:1]))
            batches.append(batch)
            # A process without rows still takes part, as the others wait for its gradients; they count nothing.
            terms.append(count_labels(batch) if len(mine) else 0)
            counts.append(len(mine))
            tokens += _count_tokens(batch) if len(mine) else 0
        return StepBatch(batches, terms, counts, tokens)


def _fetch(rows: Any, ids: np.ndarray) -> Any:
    if hasattr(rows, "__getitems__"):
        return rows.__getitems__(ids.tolist())
    return [rows[row] for row in ids.tolist()]


def _count_tokens(batch: dict[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else next(iter(batch.values())).numel()


# ------------------------------------------------------------------------------------------------------ running figures


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    logged_step: int = 0
    logged_seconds: float = 0.0
    loss_sum: float = 0.0
    tokens: int = 0  # since the last line of the log
    all_tokens: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite
    logged_skipped: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one


class Meter:
    """Sums that stay on the device between two lines of the log, and notice a loss or gradient that is not finite."""

    def __init__(self, accelerator: Accelerator, progress: Progress):
        self.accelerator, self.progress = accelerator, progress
        self.loss_sum = torch.tensor(progress.loss_sum, device=accelerator.device)
        self.grad_norm = torch.zeros((), device=accelerator.device)
        self.first_bad = torch.tensor(-1, device=accelerator.device)
        self.start = time.perf_counter() - progress.seconds
        self.first_seconds = progress.seconds
        self.busy = self.paused = 0.0

    def add(self, loss: Tensor, grad_norm: Tensor, tokens: int, skipped: bool = False) -> None:
        """Count a step, and its loss unless the step was skipped."""
        if skipped:
            self.progress.skipped += 1
        else:
            self.loss_sum += loss
            self.grad_norm = grad_norm
            self.first_bad = torch.where(self.bad(loss, grad_norm) & (self.first_bad < 0), self.progress.step, self.first_bad)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.all_tokens += tokens * self.accelerator.num_processes

    def bad(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step went wrong, left on the device."""
        # With float16, gradients overflow now and then: the scaler skips that step and lowers its scale.
        return torch.isfinite(loss if self.accelerator.scaler else loss + grad_norm).logical_not_()

    @property
    def taken(self) -> int:
        """Steps since the last line that were not skipped."""
        progress = self.progress
        return progress.step - progress.logged_step - (progress.skipped - progress.logged_skipped)

    def read(self) -> tuple[float, int]:
        """Sum of the losses since the last line, and the step that went wrong (or -1): the only wait for the device."""
        with self.working():  # what the device still computes is part of the steps
            figures = torch.stack([self.loss_sum.double(), self.first_bad.double()])
            if self.accelerator.num_processes > 1:
                figures = self.accelerator.gather(figures[None])
                return figures[:, 0].mean().item(), int(figures[:, 1].max())
            loss, bad = figures.tolist()
            return loss, int(bad)

    def seconds(self) -> float:
        """Seconds of training, over all the runs that led here; evaluation does not count."""
        return time.perf_counter() - self.start - self.paused

    def share_outside(self) -> float:
        """Share of this run's training time spent outside forward, backward and step: waiting for data, logging, saving."""
        return max(0.0, 1 - self.busy / max(1e-9, self.seconds() - self.first_seconds)) if self.busy else 0.0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """What happens here is forward, backward and step."""
        start = time.perf_counter()
        yield
        self.busy += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def line(self, loss_sum: float, rate: float, per_epoch: int) -> dict[str, float]:
        """One line of the log, after which the sums start anew."""
        progress, now = self.progress, self.seconds()
        line = {
            "step": progress.step,
            "epoch": round(progress.step / per_epoch, 4),
            "loss": loss_sum / self.taken,
            "learning_rate": rate,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": round(
                progress.tokens * self.accelerator.num_processes / max(1e-9, now - progress.logged_seconds), 1
            ),
            "seconds": round(now, 3),
        }
        progress.logged_step, progress.logged_seconds, progress.tokens = progress.step, now, 0
        progress.logged_skipped = progress.skipped
        self.loss_sum.zero_()
        return line


class Log:
    """``log.jsonl``: one JSON object per line. A resumed run drops the lines after its checkpoint and goes on."""

    def __init__(self, accelerator: Accelerator, path: Path, step: int):
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process:
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
            with checkpoint.readable_os_errors(path):
                part = path.with_name(f"{path.name}.part")
                part.write_text("".join(kept), encoding="utf-8")
                part.replace(path)

    def write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with checkpoint.readable_os_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        self.accelerator.log(numbers, step=line["step"])


def _whole_lines(path: Path) -> list[str]:
    """Lines of the log but for damaged ones; the last one of a killed process may be torn, which is nothing to speak of."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and _has_step(line)]
    if damaged := sum(line.endswith("\n") for line in lines) - len(whole):
        logger.warning("%s: %d damaged line%s left out.", path, damaged, " was" if damaged == 1 else "s were")
    return whole


def _has_step(line: str) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


class StopRequest:
    """Set by Ctrl-C (or a scheduler's SIGTERM), which ask the loop to stop after its step; the second one interrupts."""

    def __init__(self) -> None:
        self.number, self.asked = 0, 0.0

    def handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.asked = number, now
            logger.warning("Stopping after this step and saving a checkpoint; interrupt again to stop at once.")
        elif now - self.asked > 1:  # torchrun repeats to its children at once what the terminal has already sent them
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
            yield
            return
        previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------------- the loop


def fit(
    model: nn.Module,
    *,
    arguments: LoopArguments,
    output_dir: Path,
    seed: int,
    train_dataset: Any = None,
    collate: Callable[[Any], dict[str, Tensor]] | None = None,
    phases: Sequence[Phase] = (),
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    metric_for_best: str | None = None,
    greater_is_better: bool = True,
) -> dict[str, Any]:
    """Train ``model``, and leave it in ``output_dir`` with ``metrics.json``, ``log.jsonl`` and ``checkpoints/``.

    Run again after any interruption, it continues from the newest checkpoint that is whole. Under torchrun every process
    calls it; ``batch_size`` rows go to each, and only the main process writes.

    Args:
        model: a transformers model whose output has a ``loss``; trained in place, on Accelerate's device.
        train_dataset: has a length and rows by number; a ``__getitems__`` is given many numbers at once.
        collate: makes the keyword arguments of ``model`` from rows; its random numbers come from the seeded generators
            of Python, numpy and torch. ``attention_mask``, if any, counts tokens, and ``labels`` the terms of the loss.
        phases: parts of the run, one after the other, in place of ``train_dataset`` and ``collate``.
        evaluate: figures of the model (in evaluation mode, without gradients); called in every process.
        metric_for_best: the figure of ``evaluate`` that picks the weights kept in the end; None keeps the last ones.

    Returns:
        The figures of ``metrics.json``.

    Raises:
        ValueError: nothing to train on, arguments that cannot be met here, checkpoints of a different run, or another
            process that trains in the same folder.
        FloatingPointError: the loss or gradient is not finite in more steps than may be skipped; says where. Nothing good is
            overwritten.
        OSError: a checkpoint cannot be written; earlier ones are untouched.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved; says how to resume.
    """
    if not phases:
        assert collate is not None
        phases = [Phase(train_dataset, collate, arguments.batch_size, arguments.learning_rate)]
    if not all(len(phase.rows) for phase in phases):
        raise ValueError("There are no rows to train on; check the data and its limit.")
    keep_memory()
    run = _Run(model, phases, arguments, output_dir, seed, metric_for_best, greater_is_better)
    with checkpoint.exclusive_lock(run.output_dir) if run.accelerator.is_main_process else contextlib.nullcontext():
        run.resume()
        run.train(evaluate)
        return run.finish()


class _Run:
    """The objects of one call of :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        arguments: LoopArguments,
        output_dir: Path | str,
        seed: int,
        metric_for_best: str | None,
        greater_is_better: bool,
    ):
        self.arguments, self.seed, self.output_dir = arguments, seed, Path(output_dir)
        self.metric_for_best, self.sign = metric_for_best, 1 if greater_is_better else -1
        self.root = self.output_dir / "checkpoints"
        self.accelerator = accelerator = _accelerator(arguments, self.output_dir)
        self.steps = Steps(
            phases,
            accumulation=arguments.gradient_accumulation_steps,
            seed=seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.total = arguments.max_steps or max(1, round(arguments.epochs * self.steps.per_epoch))
        self.steps.plan(self.total)
        self.warmup = arguments.warmup_steps or int(arguments.warmup_ratio * self.total)
        self.identity = {
            **{key: value for key, value in arguments.model_dump(mode="json").items() if key not in _FREE},
            "seed": seed,
            "rows": [len(phase.rows) for phase in phases],
            "data": [getattr(phase.rows, "fingerprint", None) for phase in phases],
            "rows_per_step": [self.steps.rows_per_step(phase) for phase in phases],
            "shares": [phase.share for phase in phases],
        }
        model.to(accelerator.device)
        self.whole: nn.Module | None = None
        if arguments.fsdp:
            self.whole = _copy_and_shard(model, accelerator)
        if arguments.gradient_checkpointing:
            # transformers renamed it; older versions know only the second name.
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if arguments.compile:
            model.compile(dynamic=True)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, arguments.weight_decay),
            lr=arguments.learning_rate,
            betas=arguments.adam_betas,
            eps=arguments.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda", "mps", "xpu"),  # one pass over the weights instead of a dozen
        )
        # What is sharded needs no DistributedDataParallel around it, only the precision of "evaluation mode".
        self.model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=arguments.fsdp)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.progress = Progress()
        self.best: dict[str, Any] | None = None
        self.saved_step: int | None = None

    def train(self, evaluate: Callable[[nn.Module], dict[str, float]] | None) -> None:
        arguments, progress, accelerator = self.arguments, self.progress, self.accelerator
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(progress.step, self.total),
            num_workers=arguments.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.meter, self.log = Meter(accelerator, progress), Log(accelerator, self.output_dir / "log.jsonl", progress.step)
        self.model.train()
        with self._stoppable() as stop, self._progress_bar() as bar:
            for batch in loader:
                rate = self.rate(progress.step)
                with self.meter.working():
                    loss, grad_norm, skipped = self.optimizer_step(batch, rate)
                self.meter.add(loss, grad_norm, batch.tokens, skipped)
                if skipped:
                    self.log_skipped(rate)
                bar.update()
                if (logging_now := self._due(arguments.log_steps)) and self.meter.taken:
                    self.log.write(line := self.meter.line(self.checked_loss(), rate, self.steps.per_epoch))
                    bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                if evaluate and self._due(arguments.eval_steps or self.steps.per_epoch):
                    self.evaluate(evaluate)
                # Several processes agree on stopping only where they meet anyway.
                stopping = self._agreed(stop.number) if logging_now or accelerator.num_processes == 1 else 0
                if stopping or self._due(arguments.save_steps or self.steps.per_epoch):
                    self.save()
                if stopping and progress.step < self.total:
                    raise KeyboardInterrupt if stopping == signal.SIGINT else SystemExit(128 + stopping)
        self.share_outside = self.meter.share_outside()

    def optimizer_step(self, batch: StepBatch, rate: float) -> tuple[Tensor, Tensor, bool]:
        """Forward and backward over the micro-batches, clip, step.

        Returns:
            the loss, the norm before clipping, and whether the step was skipped because they are not finite.
        """
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        seed_everything(self.seed, self.progress.step, accelerator.process_index, 1)
        sums = torch.tensor([float(sum(batch.terms)), float(sum(batch.rows))], device=accelerator.device)
        if processes > 1:
            sums = accelerator.reduce(sums)
        all_terms, all_rows = sums
        total = torch.zeros((), device=accelerator.device)
        parts = zip(batch.batches, batch.terms, batch.rows, strict=True)
        for number, (inputs, terms, rows) in enumerate(parts, start=1):
            with contextlib.nullcontext() if number == len(batch.batches) else accelerator.no_sync(self.model):
                inputs = send_to_device(inputs, accelerator.device, non_blocking=True)
                output = self.model(**inputs)
                # The step's loss is the mean over all its terms; processes average their gradients, hence the factor.
                weight = terms * processes / all_terms
                loss = output.loss * weight
                if "next_sentence_label" in inputs:  # this part of the loss is a mean over rows, not over labelled words
                    follows = F.cross_entropy(output.seq_relationship_logits, inputs["next_sentence_label"])
                    loss = loss + follows * (rows * processes / all_rows - weight)
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm or math.inf)
        grad_norm = _full(grad_norm.detach())
        # One process may see what another does not, and all of them must agree, so this waits for the device.
        skipped = self.arguments.max_skipped_steps > 0 and self._agreed(int(self.meter.bad(total, grad_norm))) > 0
        if skipped and self.progress.skipped >= self.arguments.max_skipped_steps:
            raise FloatingPointError(self._not_finite(self.progress.step))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        elif accelerator.scaler:
            accelerator.scaler.update()  # it insists on one after each clipping
        self.optimizer.zero_grad()
        return total, grad_norm, skipped

    def rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.steps.phases[self.steps.locate(step)[0]].learning_rate,
            warmup=self.warmup,
            total=self.total,
            schedule=self.arguments.schedule,
            decay_ratio=self.arguments.decay_ratio,
        )

    def checked_loss(self) -> float:
        """Sum of the losses since the last line of the log; called before anything is written."""
        loss_sum, bad = self.meter.read()
        if bad >= 0:
            raise FloatingPointError(self._not_finite(bad))
        return loss_sum

    def _not_finite(self, step: int) -> str:
        rows = self.steps.row_ids(step).tolist()
        shown = ", ".join(map(str, rows[:64])) + (", …" if len(rows) > 64 else "")
        skipped = self.progress.skipped
        before = f", after {skipped} such steps were skipped (max_skipped_steps)" if skipped else ""
        return (
            f"The loss or its gradient is not finite at step {step + 1} of {self.total}{before}, "
            f"learning rate {self.rate(step):.3g}, rows {shown}. Nothing was saved since; "
            "look at these rows, lower learning_rate, use precision: fp32, or allow more max_skipped_steps. "
            f"{self._how_to_resume()}"
        )

    def log_skipped(self, rate: float) -> None:
        step = self.progress.step - 1
        rows = self.steps.row_ids(step).tolist()
        self.log.write({"step": step + 1, "skipped": self.progress.skipped, "learning_rate": rate, "rows": rows})
        if self.accelerator.is_main_process:
            logger.warning(
                "Skipped step %d, whose loss or gradient is not finite (%d of at most %d); its rows are in %s.",
                step + 1,
                self.progress.skipped,
                self.arguments.max_skipped_steps,
                self.log.path,
            )

    def evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        self.checked_loss()
        self.model.eval()
        with self.meter.pause(), torch.no_grad():
            model = self.gathered()
            if self.whole is not None:
                model.to(self.accelerator.device)
            figures = evaluate(model.eval())
            if self.whole is not None:
                model.cpu()  # the copy takes memory of the device only meanwhile
        self.model.train()
        progress = self.progress
        progress.evaluation = figures
        epoch = round(progress.step / self.steps.per_epoch, 4)
        self.log.write({"step": progress.step, "epoch": epoch, **{f"eval_{key}": value for key, value in figures.items()}})
        if self.metric_for_best is None:
            return
        if self.metric_for_best not in figures:
            raise ValueError(
                f"There is no figure {self.metric_for_best!r} to pick the best model by; use {', '.join(figures)}."
            )
        if (
            self.best is None
            or self.sign * figures[self.metric_for_best] > self.sign * self.best["figures"][self.metric_for_best]
        ):
            self.best = {"identity": self.identity, "step": progress.step, "figures": figures}
            self._write(self.root / f"best-{progress.step:08d}", self.best, with_optimizer=False)

    def save(self) -> None:
        self.progress.loss_sum, self.progress.seconds = self.checked_loss(), self.meter.seconds()
        self.meter.loss_sum.fill_(self.progress.loss_sum)  # a mean over processes: a resumed run goes on from that, too
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        folder = checkpoint.step_folder(self.root, self.progress.step)
        self._write(
            folder, {"identity": self.identity, "progress": asdict(self.progress), "scaler": scaler}, with_optimizer=True
        )
        if self.accelerator.is_main_process:
            checkpoint.rotate(self.root, self.arguments.save_total_limit, newest=folder)
        self.saved_step = self.progress.step

    def _write(self, folder: Path, state: dict[str, Any], with_optimizer: bool) -> None:
        """A checkpoint: ``model.safetensors``, ``state.json``, and the optimizer's tensors, numbered by parameter."""
        # Every process takes part in gathering what is sharded.
        model, tensors, main = self.gathered(), {}, self.accelerator.is_main_process
        for number, entry in self.optimizer.state_dict()["state"].items() if with_optimizer else ():
            for key, value in entry.items():
                value = _full(value)
                if main:
                    tensors[f"{number}.{key}"] = value.cpu()
        if not main:
            return

        def fill(temporary: Path) -> None:
            save_model(model, str(temporary / "model.safetensors"))
            if with_optimizer:
                save_file(tensors, temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

        checkpoint.write_folder(folder, fill)
        if folder.name.startswith("best-"):
            for other in self.root.glob("best-????????"):
                if other != folder:
                    shutil.rmtree(other)

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole, naming the damaged ones; begin anew if there is none."""
        if self.accelerator.is_main_process and self.root.exists():
            checkpoint.clear_leftovers(self.root)
        (folder, problems), (best, best_problems) = self._agreed_on_folders()
        if self.accelerator.is_main_process:
            for problem in (*problems, *best_problems):
                logger.warning("%s It is not used.", problem)
        if best:
            self.best = self._state(best)
        if not folder:
            if problems and self.accelerator.is_main_process:
                logger.warning("No checkpoint in %s is whole, so the run begins anew.", self.root)
            return
        state = self._state(folder)
        bare = self.accelerator.unwrap_model(self.model)
        load_model(bare if self.whole is None else self.whole, folder / "model.safetensors")
        if self.whole is not None:
            for shard, full in zip(bare.parameters(), self.whole.parameters(), strict=True):
                shard.detach().copy_(_shard(full.detach(), shard))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        optimizer_state = self.optimizer.state_dict()
        optimizer_state["state"] = {}
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            number, _, name = key.partition(".")
            optimizer_state["state"].setdefault(int(number), {})[name] = _shard(tensor, parameters[int(number)])
        self.optimizer.load_state_dict(optimizer_state)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.saved_step = self.progress.step
        if self.accelerator.is_main_process:
            logger.warning("Resuming at step %d of %d from %s.", self.progress.step, self.total, folder)

    def _agreed_on_folders(self) -> Any:
        """Every process resumes from what the main one found: one of them might see a file that another does not."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [(checkpoint.newest_good(self.root), checkpoint.newest_good(self.root, kind="best"))]
        return broadcast_object_list(found)[0]

    def _state(self, folder: Path) -> dict[str, Any]:
        """``state.json`` of a checkpoint.

        Raises:
            ValueError: it belongs to a run with other arguments or data; says which.
        """
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        # A field that this version added was at its default in an older run.
        defaults = {name: declared.default for name, declared in type(self.arguments).model_fields.items()}
        theirs = {**defaults, **state["identity"]}
        changed = [
            f"{key} (was {theirs.get(key)!r}, now {value!r})"
            for key, value in self.identity.items()
            if theirs.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self.root} holds checkpoints of a different run; changed: {', '.join(changed)}. "
                "Undo the change to resume, or delete that folder or choose another output directory to start anew."
            )
        return state

    def finish(self) -> dict[str, Any]:
        """Put the best model, or the last one, into the output directory as a complete folder; write ``metrics.json``."""
        progress, accelerator = self.progress, self.accelerator
        bare = accelerator.unwrap_model(self.gathered(), keep_fp32_wrapper=False)
        bare.eval()
        figures = progress.evaluation
        if self.best:
            folder = self.root / f"best-{self.best['step']:08d}"
            load_model(bare, folder / "model.safetensors")
            figures = self.best["figures"]
        metrics = {
            "steps": progress.step,
            "epochs": round(progress.step / self.steps.per_epoch, 4),
            "best_step": self.best["step"] if self.best else None,
            **{f"eval_{key}": value for key, value in figures.items()},
            "train_seconds": round(progress.seconds, 3),
            "train_tokens": progress.all_tokens,
            "tokens_per_second": round(progress.all_tokens / max(1e-9, progress.seconds), 1),
            "share_outside_step": round(self.share_outside, 4),
            "skipped_steps": progress.skipped,
            "parameters": sum(parameter.numel() for parameter in bare.parameters()),
        }
        if accelerator.is_main_process:

            def fill(temporary: Path) -> None:
                bare.save_pretrained(temporary)
                (temporary / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")

            whole = self.root / "final"
            checkpoint.write_folder(whole, fill)
            checkpoint.move_files(whole, self.output_dir)
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.wait_for_everyone()
        return metrics

    def gathered(self) -> nn.Module:
        """The model with all its weights; where they are sharded, a copy that every process must ask for at once."""
        bare: nn.Module = self.accelerator.unwrap_model(self.model)
        if self.whole is None:
            return bare
        for full, shard in zip(self.whole.parameters(), bare.parameters(), strict=True):
            full.detach().copy_(_full(shard.detach()))
        return self.whole

    # -- small helpers of the loop

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.total

    def _agreed(self, number: int) -> int:
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[StopRequest]:
        stop = StopRequest()
        with stop.listening():
            try:
                yield stop
            except KeyboardInterrupt:
                # How to resume is for the caller to say: it knows the command.
                saved = "with no checkpoint yet" if self.saved_step is None else f"saved up to step {self.saved_step}"
                raise KeyboardInterrupt(f"Stopped at step {self.progress.step} of {self.total}, {saved}.") from None

    def _how_to_resume(self) -> str:
        if self.saved_step is None:
            return "There is no checkpoint yet; the same command starts from the beginning."
        return f"Run the same command again to resume from step {self.saved_step} ({self.root})."

    def _progress_bar(self) -> "tqdm[Any]":
        return tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=self.output_dir.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 15,  # a log file is not flooded
        )


def _copy_and_shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard ``model`` over the processes in place, block by block; returns a whole copy of it, on the CPU.

    Accelerate's own FSDP turns into DistributedDataParallel where there is no accelerator, without a word; this does the
    same everywhere. Embeddings and heads stay together in the root, because their weights may be tied.
    """
    if accelerator.num_processes == 1:
        raise ValueError(
            "fsdp: true shards the model over several processes, and there is one; start with torchrun "
            "--nproc_per_node N -m minibert train RECIPE, or leave fsdp out."
        )
    for tensor in chain(model.parameters(), model.buffers()):
        torch.distributed.broadcast(tensor.detach(), src=0)
    whole: nn.Module = accelerator.prepare_model(copy.deepcopy(model).cpu(), device_placement=False, evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a block: MiniBertLayer, BertLayer, …
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return whole


def _full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, if ``like`` is sharded and of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def processes() -> PartialState:
    """Which process this is, and of how many. Without ``cpu``, Accelerate would take torchrun's processes on a machine
    without accelerator for unrelated ones."""
    return PartialState(cpu=not torch.accelerator.is_available())


def keep_memory() -> None:
    """Keep what this process frees, on a CPU with glibc, until it ends or is asked to give it back (mallopt(3)).

    By itself glibc returns blocks above 32 MiB at once, and the system clears and maps the next such activation page by page;
    the modeling file, a guest in others' processes, only sees to it that smaller ones are kept.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def in_precision(arguments: LoopArguments) -> torch.autocast:
    """The arithmetic of training, for a model that only helps: in half precision, too, it is exact enough to learn from."""
    dtype = torch.float16 if arguments.precision == "fp16" else torch.bfloat16
    return torch.autocast(processes().device.type, dtype=dtype, enabled=arguments.precision != "fp32")


def check_precision(arguments: LoopArguments) -> None:
    """Refuse half precision that this machine cannot train in.

    Raises:
        ValueError: for float16 on a CPU.
    """
    if arguments.precision == "fp16" and processes().device.type == "cpu":
        raise ValueError("precision: fp16 needs a GPU; use bf16 or fp32 on this machine.")


def warn_of_precision(arguments: LoopArguments) -> None:
    """Say so where half precision only takes longer."""
    asked = arguments.precision == "bf16" and processes().device.type == "cpu" and processes().is_main_process
    if asked and not bfloat16_is_faster():
        logger.warning(
            "precision: bf16 does not pay on this processor, which multiplies faster in float32; use precision: fp32."
        )


def _accelerator(arguments: LoopArguments, output_dir: Path) -> Accelerator:
    available = {tracker.name for tracker in get_available_trackers()}
    if unknown := sorted(set(arguments.trackers) - available):
        here = ", ".join(sorted(available)) or "none"
        raise ValueError(f"trackers: {', '.join(unknown)} is not installed or unknown; here there is {here}.")
    # One Accelerator per stage, and the next stage may want another precision: forget the settings, keep the processes.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    check_precision(arguments)
    warn_of_precision(arguments)
    accelerator = Accelerator(
        cpu=processes().device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(arguments.precision, arguments.precision),
        log_with=arguments.trackers or None,
        project_dir=str(output_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients, not two
    )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {output_dir} cannot be made: {error.strerror}. Choose another output directory.") from error
    if arguments.trackers:
        accelerator.init_trackers(output_dir.name, config={"seed": arguments.seed or 0})
    return accelerator
