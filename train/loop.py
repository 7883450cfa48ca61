"""Run the training loop of all stages except ``embed``. Without class weights, the model computes the loss.

The rows and the random numbers of a step depend only on the seed, the step and the process.
A run that resumes from a checkpoint has exactly the result of an uninterrupted run.
"""

import contextlib
import ctypes
import inspect
import json
import logging
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather, send_to_device
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from minibert.evaluation.metrics import SMALLER_IS_BETTER
from minibert.files.disk import read_json, write_json, write_text
from minibert.files.processes import check_workers, processes
from minibert.inference.cpu import bfloat16_is_faster
from minibert.train import checkpoint
from minibert.train.arguments import LoopArguments
from minibert.train.rows import choose_metric
from minibert.train.stage import StageContext

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of malloc.h


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "linear", decay_ratio: float = 0.1
) -> float:
    """Return the learning rate at ``step``.

    The rate rises linearly to ``peak`` in the first ``warmup`` steps. Every schedule except
    ``constant`` reaches 0 at step ``total``. With ``wsd``, the rate stays at ``peak`` and then
    decays as one minus a square root (Hägele et al. 2024, arXiv:2405.18392). ``decay_ratio`` is
    the fraction of all steps in which ``wsd`` decays.

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


def schedule_of(args: LoopArguments, total: int) -> Callable[..., float]:
    """Return :func:`learning_rate` with the schedule of ``args``. The caller gives the step and the peak."""
    warmup = args.warmup_steps or int(args.warmup_ratio * total)
    return partial(learning_rate, warmup=warmup, total=total, schedule=args.schedule, decay_ratio=args.decay_ratio)


def rows_of_step(step: int, *, rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """Return the row numbers of one optimizer step, for all processes together.

    Each epoch is a new random permutation of all rows, which is cut into steps.

    >>> sorted(np.concatenate([rows_of_step(s, rows=5, rows_per_step=2, seed=0) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4]
    """
    epoch, place = divmod(step, math.ceil(rows / rows_per_step))
    order = _permutation(rows, seed, epoch)
    return order[place * rows_per_step : (place + 1) * rows_per_step]


def split_rows(rows: np.ndarray, *, accumulation: int, processes: int) -> list[list[np.ndarray]]:
    """Divide the rows of a step among micro-batches and processes.

    ``result[a][p]`` has the rows of micro-batch a and process p. The last step of an epoch may
    have too few rows for all processes, but every micro-batch has at least one row.

    >>> [[part.tolist() for part in parts] for parts in split_rows(np.arange(3), accumulation=2, processes=2)]
    [[[0], [1]], [[2], []]]
    """
    parts = np.array_split(rows, accumulation * processes)
    groups = [parts[start : start + processes] for start in range(0, len(parts), processes)]
    return [group for group in groups if len(group[0])]


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch with a hash of ``numbers``."""
    state = np.random.SeedSequence(numbers).generate_state(1)[0].item()
    random.seed(state)
    np.random.seed(state)
    if torch.accelerator.is_available():
        torch.manual_seed(state)
    else:  # ``torch.manual_seed`` queues a lazy CUDA seed on every call without a GPU (a leak)
        torch.default_generator.manual_seed(state)


@lru_cache(maxsize=1)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters for AdamW. As in BERT, only matrices have weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class StepBatch(NamedTuple):
    """Store the input of one process for one optimizer step."""

    batches: list[dict[str, Tensor]]
    terms: list[int]  # number of loss terms per micro-batch
    rows: list[int]  # number of rows per micro-batch
    tokens: int  # number of tokens without padding


@dataclass(frozen=True)
class Phase:
    """Describe a part of a run with its own rows, batch size and peak learning rate.

    Attributes:
        rows: training data with ``len()`` and a method ``collate``. ``collate`` takes an array
            of row numbers and returns keyword arguments of the model. It draws random numbers
            only from the global generators of Python, numpy and torch. If ``rows`` has a
            ``fingerprint``, a run resumes only with the same fingerprint.
        batch_size: rows per process and micro-batch.
        learning_rate: peak learning rate.
        share: relative number of optimizer steps. A phase with share 2 has twice as many steps
            as a phase with share 1.
    """

    rows: Any
    batch_size: int
    learning_rate: float
    share: float = 1.0


class Steps(Dataset[StepBatch]):
    """Represent the optimizer steps of a process. ``steps[n]`` is the input of step n."""

    def __init__(self, phases: Sequence[Phase], *, accumulation: int, seed: int, process: int, processes: int):
        self.phases, self.seed = phases, seed
        self.accumulation, self.process, self.processes = accumulation, process, processes
        # A step is 1 / (steps per pass over the rows) of an epoch, weighted by the shares.
        total = sum(phase.share for phase in phases)
        passes = (phase.share / total / math.ceil(len(phase.rows) / self.rows_per_step(phase)) for phase in phases)
        self.per_epoch = max(1, round(1 / sum(passes)))
        self.plan(self.per_epoch)

    def rows_per_step(self, phase: Phase) -> int:
        """Return the number of rows of an optimizer step, for all processes together."""
        return phase.batch_size * self.accumulation * self.processes

    def plan(self, total: int) -> None:
        """Divide ``total`` steps among the phases, in proportion to ``Phase.share``."""
        shares = np.cumsum([phase.share for phase in self.phases])
        self.ends = [round(share * total) for share in shares / shares[-1]]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the number of the phase of ``step``, and its place in the phase."""
        number = next((at for at, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return number, step - (self.ends[number - 1] if number else 0)

    def row_ids(self, step: int) -> np.ndarray:
        """Return the row numbers of ``step``, for all processes together."""
        number, place = self.locate(step)
        phase = self.phases[number]
        return rows_of_step(
            place, rows=len(phase.rows), rows_per_step=self.rows_per_step(phase), seed=self.seed + number * 1_000_003
        )

    def __getitem__(self, step: int) -> StepBatch:
        seed_everything(self.seed, step, self.process, 0)
        batches, terms, counts, tokens = [], [], [], 0
        rows, phase = self.row_ids(step), self.phases[self.locate(step)[0]]
        for parts in split_rows(rows, accumulation=self.accumulation, processes=self.processes):
            mine = parts[self.process]
            # A process without rows takes a row of weight 0, because others wait for gradients.
            batch = phase.rows.collate(mine if len(mine) else rows[:1])
            batches.append(batch)
            # A term of the loss is a label except -100, or a row if there are no labels.
            count = int((batch["labels"] != -100).sum()) if "labels" in batch else len(mine)
            terms.append(count if len(mine) else 0)
            counts.append(len(mine))
            mask = batch.get("attention_mask", torch.ones_like(next(iter(batch.values()))))
            tokens += int(mask.sum()) if len(mine) else 0
        return StepBatch(batches, terms, counts, tokens)


@dataclass
class Progress:
    """Store the counters and metrics that every checkpoint saves."""

    step: int = 0
    seconds: float = 0.0
    logged_step: int = 0
    logged_seconds: float = 0.0
    loss_sum: float = 0.0  # since the last line of the log
    tokens: int = 0  # since the last line of the log
    all_tokens: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict)  # latest metrics


class Log:
    """Write metrics to ``log.jsonl`` and to trackers. A line of the file is a JSON object.

    Delete damaged lines and lines of steps after ``step``, the step of the last checkpoint.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int):
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            with checkpoint.readable_os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))

    def write(self, line: dict[str, Any]) -> None:
        """Write ``line`` to the file and to trackers. ``line`` must contain ``step``."""
        if self.accelerator.is_main_process:
            with checkpoint.readable_os_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
        self.accelerator.log(numbers, step=line["step"])


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class StopRequest:
    """Stop training after the current step if Ctrl-C is pressed or SIGTERM arrives."""

    def __init__(self) -> None:
        self.number, self.asked = 0, 0.0

    def handle(self, number: int, _frame: object) -> None:
        """Record the first signal. Raise KeyboardInterrupt for a later signal."""
        now = time.monotonic()
        if not self.number:
            self.number, self.asked = number, now
            logger.warning("Stopping after this step with a checkpoint; interrupt again to stop at once.")
        elif now - self.asked > 1:  # torchrun repeats the terminal's signal to its children
            raise KeyboardInterrupt

    def agreed(self, logged: bool) -> int:
        """Return the signal that any process received, or 0.

        Several processes only look at logged steps, where they wait for each other anyway.
        """
        if processes().num_processes == 1:
            return self.number
        return int(gather(torch.tensor([self.number], device=processes().device)).max()) if logged else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in the ``with`` block. Outside the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
            yield
            return
        previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def fit(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    args: LoopArguments,
    context: StageContext,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    metric: str | None = None,
    class_weights: list[float] | None = None,
) -> dict[str, Any]:
    """Train ``model``. Save the model, metrics and a log in the output folder of ``context``.

    Training continues from the latest valid checkpoint in the folder. Under torchrun, every
    process must call this function. The result is the content of ``metrics.json``.

    ``rows`` are training data as in :attr:`Phase.rows`, or a list of :class:`Phase`. ``evaluate``
    returns the metrics of the model, and every process calls it. ``metric`` selects the weights
    to keep. If it is None, keep the last weights. ``class_weights`` multiply the losses of labels.
    """
    phases = rows if isinstance(rows, list) else [Phase(rows, args.batch_size, args.learning_rate)]
    if not all(len(phase.rows) for phase in phases):
        raise ValueError("The training data has no rows; check data and limit in the recipe.")
    check_workers(args.num_workers)
    keep_memory()
    run = _Run(model, tokenizer, phases, args, context, metric if evaluate else None, class_weights)
    run.resume()
    try:
        run.train(evaluate)
    except KeyboardInterrupt:
        # The caller knows the command, so it adds how to resume.
        saved = "without a checkpoint" if run.saved_step is None else f"saved up to step {run.saved_step}"
        raise KeyboardInterrupt(f"Stopped at step {run.progress.step} of {run.total}, {saved}.") from None
    return run.finish()


class _Run:
    """Store the model, the optimizer and the progress of one call of :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        phases: Sequence[Phase],
        arguments: LoopArguments,
        context: StageContext,
        metric: str | None,
        class_weights: list[float] | None,
    ):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.seed, self.output_dir = context.seed, context.output_dir
        self.metric_for_best, self.sign = metric, -1 if metric in SMALLER_IS_BETTER else 1
        self.root = self.output_dir / "checkpoints"
        self.accelerator = accelerator = _accelerator(arguments, self.output_dir)
        self.steps = Steps(
            phases,
            accumulation=arguments.gradient_accumulation_steps,
            seed=self.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.total = arguments.max_steps or max(1, round(arguments.epochs * self.steps.per_epoch))
        self.steps.plan(self.total)
        self.schedule = schedule_of(arguments, self.total)
        self.identity = {
            **arguments.model_dump(mode="json", exclude=arguments.free_fields()),
            "seed": self.seed,
            "rows": [len(phase.rows) for phase in phases],
            "data": [getattr(phase.rows, "fingerprint", None) for phase in phases],
            "rows_per_step": [self.steps.rows_per_step(phase) for phase in phases],
            "shares": [phase.share for phase in phases],
        }
        self.class_weights = torch.tensor(class_weights, device=accelerator.device) if class_weights else None
        model.to(accelerator.device)
        if arguments.gradient_checkpointing:
            checkpoint_activations(model)
        if arguments.compile:
            model.compile(dynamic=True)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, arguments.weight_decay),
            lr=arguments.learning_rate,
            betas=arguments.adam_betas,
            eps=arguments.adam_epsilon,
            # A fused optimizer reads the weights once instead of a dozen times.
            fused=accelerator.device.type in ("cpu", "cuda", "mps", "xpu"),
        )
        # Logits are the largest tensor of a step. The masked-word loss does not need logits.
        named = "return_logits" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"return_logits": False} if named else {}
        self.model = accelerator.prepare_model(model, device_placement=False)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.progress = Progress()
        self.best: dict[str, Any] | None = None
        self.saved_step: int | None = None

    def train(self, evaluate: Callable[[nn.Module], dict[str, Any]] | None) -> None:
        arguments, progress, accelerator = self.arguments, self.progress, self.accelerator
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(progress.step, progress.step if self.stopped_early() else self.total),
            num_workers=arguments.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.log = Log(accelerator, self.output_dir / "log.jsonl", progress.step)
        self.loss_sum = torch.tensor(progress.loss_sum, device=accelerator.device)
        self.first_bad = torch.tensor(-1, device=accelerator.device)  # first step whose loss or gradient is not finite
        self.start = time.perf_counter() - progress.seconds
        self.model.train()
        bar = tqdm(
            total=self.total,
            initial=progress.step,
            desc=self.output_dir.name,
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 15,  # avoids many lines in a log file
        )
        stop = StopRequest()
        with stop.listening(), bar:
            for batch in loader:
                rate = self.rate(progress.step)
                loss, grad_norm = self.optimizer_step(batch, rate)
                # With float16, the scaler skips a step whose gradients overflow.
                finite = torch.isfinite(loss if accelerator.scaler else loss + grad_norm)
                self.first_bad = torch.where(finite | (self.first_bad >= 0), self.first_bad, progress.step)
                self.loss_sum += loss
                progress.step += 1
                progress.tokens += batch.tokens
                progress.all_tokens += batch.tokens * accelerator.num_processes
                bar.update()
                if logging_now := self._due(arguments.log_steps):
                    bar.set_postfix(loss=f"{self.write_line(rate, grad_norm):.4f}", refresh=False)
                if evaluate and self._due(arguments.eval_steps):
                    self.evaluate(evaluate)
                if (stopping := stop.agreed(logging_now)) or self.stopped_early() or self._due(arguments.save_steps):
                    self.save()
                if self.stopped_early():
                    return
                if stopping and progress.step < self.total:
                    raise KeyboardInterrupt if stopping == signal.SIGINT else SystemExit(128 + stopping)

    def optimizer_step(self, batch: StepBatch, rate: float) -> tuple[Tensor, Tensor]:
        """Update the weights, and return the loss and the gradient norm before clipping."""
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        seed_everything(self.seed, self.progress.step, accelerator.process_index, 1)
        sums = torch.tensor([float(sum(batch.terms)), float(sum(batch.rows))], device=accelerator.device)
        all_terms, all_rows = accelerator.reduce(sums)
        total = torch.zeros((), device=accelerator.device)
        parts = zip(batch.batches, batch.terms, batch.rows, strict=True)
        for number, (inputs, terms, rows) in enumerate(parts, start=1):
            with contextlib.nullcontext() if number == len(batch.batches) else accelerator.no_sync(self.model):
                inputs = send_to_device(inputs, accelerator.device, non_blocking=True)
                output = self.model(**inputs, **self.options)
                # The loss is the mean over all terms; processes average their gradients.
                weight = terms * processes / all_terms
                loss = output.loss * weight
                if self.class_weights is not None:
                    logits, labels = output.logits.flatten(0, -2).float(), inputs["labels"].flatten()
                    loss = F.cross_entropy(logits, labels, self.class_weights, reduction="sum") * (weight / max(1, terms))
                if "next_sentence_label" in inputs:  # the sentence loss is a mean over rows
                    follows = F.cross_entropy(output.seq_relationship_logits, inputs["next_sentence_label"])
                    loss = loss + follows * (rows * processes / all_rows - weight)
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm.detach()

    def rate(self, step: int) -> float:
        return self.schedule(step, peak=self.steps.phases[self.steps.locate(step)[0]].learning_rate)

    def seconds(self) -> float:
        """Return the seconds of training without evaluation, also of earlier runs."""
        return time.perf_counter() - self.start

    def write_line(self, rate: float, grad_norm: Tensor) -> float:
        """Write a line of the log, and return the mean loss since the last line."""
        progress, now = self.progress, self.seconds()
        tokens = progress.tokens * self.accelerator.num_processes
        loss = self.checked_loss() / (progress.step - progress.logged_step)
        line = {
            "step": progress.step,
            "epoch": round(progress.step / self.steps.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "tokens_per_second": round(tokens / max(1e-9, now - progress.logged_seconds), 1),
            "seconds": round(now, 3),
        }
        self.log.write(line)
        progress.logged_step, progress.logged_seconds, progress.tokens = progress.step, now, 0
        self.loss_sum.zero_()
        return loss

    def checked_loss(self) -> float:
        """Return the sum of losses, or raise FloatingPointError if a loss is not finite."""
        sums = self.accelerator.gather(torch.stack([self.loss_sum.double(), self.first_bad.double()])[None])
        loss_sum, bad = float(sums[:, 0].mean()), int(sums[:, 1].max())
        if bad < 0:
            return loss_sum
        rows = self.steps.row_ids(bad).tolist()
        shown = ", ".join(map(str, rows[:64])) + (", …" if len(rows) > 64 else "")
        saved = "No checkpoint was written yet; the same command starts from the beginning."
        if self.saved_step is not None:
            saved = f"Run the same command again to resume from step {self.saved_step} ({self.root})."
        raise FloatingPointError(
            f"The loss or its gradient is not finite at step {bad + 1} of {self.total}, "
            f"learning rate {self.rate(bad):.3g}, rows {shown}. Nothing was saved after this "
            f"step. Check these rows, lower learning_rate, or use precision: fp32. {saved}"
        )

    def evaluate(self, evaluate: Callable[[nn.Module], dict[str, Any]]) -> None:
        """Evaluate the model, and save the weights if they are the best so far."""
        self.checked_loss()
        start = time.perf_counter()
        with torch.no_grad():
            metrics = evaluate(self.accelerator.unwrap_model(self.model).eval())
        self.start += time.perf_counter() - start  # does not count as training
        self.model.train()
        step, name = self.progress.step, self.metric_for_best
        self.progress.evaluation = metrics
        epoch = round(step / self.steps.per_epoch, 4)
        self.log.write({"step": step, "epoch": epoch, **{f"eval_{key}": value for key, value in metrics.items()}})
        value = metrics[choose_metric(name, list(metrics))] if name else None  # an undefined correlation is None
        if value is not None and (self.best is None or self.sign * value > self.sign * self.best["metrics"][name]):
            self.best = {"identity": self.identity, "step": step, "metrics": metrics}
            checkpoint.save(self.root, step, self.accelerator.unwrap_model(self.model), {"state.json": self.best})

    def stopped_early(self) -> bool:
        """Return True if ``patience`` evaluations have followed the best one."""
        patience, every = self.arguments.patience, self.arguments.eval_steps or self.steps.per_epoch
        step = self.progress.step
        return bool(patience and self.best and self.best["step"] + patience * every <= step < self.total)

    def save(self) -> None:
        """Save a checkpoint of the current step, and delete old checkpoints."""
        self.progress.loss_sum, self.progress.seconds = self.checked_loss(), self.seconds()
        self.loss_sum.fill_(self.progress.loss_sum)  # so that a resumed run logs the same loss
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        state = {"identity": self.identity, "progress": asdict(self.progress), "scaler": scaler}
        model, step, keep = self.accelerator.unwrap_model(self.model), self.progress.step, self.arguments.save_total_limit
        checkpoint.save(self.root, step, model, {"state.json": state}, optimizer=self.optimizer, keep=keep)
        self.saved_step = self.progress.step

    def resume(self) -> None:
        """Load the latest valid checkpoint, if any."""
        folder, best = checkpoint.newest(self.root, self.arguments.save_total_limit)
        if best:
            self.best = self._state(best)
        if not folder:
            return
        state = self._state(folder)
        load_model(self.accelerator.unwrap_model(self.model), folder / "model.safetensors")
        checkpoint.load_optimizer(folder, self.optimizer)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.saved_step = self.progress.step

    def _state(self, folder: Path) -> dict[str, Any]:
        """Read the state of a checkpoint. Raise ValueError if arguments or data changed."""
        state: dict[str, Any] = read_json(folder / "state.json")
        before = state["identity"]
        changed = [
            f"{key} (was {before[key]!r}, now {value!r})"
            for key, value in self.identity.items()
            if key in before and before[key] != value
        ]
        if changed:
            raise ValueError(
                f"{self.root} has checkpoints of a different run; changed: {', '.join(changed)}. To resume, "
                "undo the changes. To start from the beginning, delete this folder or choose another "
                "output directory."
            )
        return state

    def finish(self) -> dict[str, Any]:
        """Save the best model, or else the last model, and return the metrics of the run."""
        progress, accelerator = self.progress, self.accelerator
        bare = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()
        evaluation = progress.evaluation
        if self.best:
            load_model(bare, self.root / f"best-{self.best['step']:08d}" / "model.safetensors")
            evaluation = self.best["metrics"]
        metrics = {
            "steps": progress.step,
            "epochs": round(progress.step / self.steps.per_epoch, 4),
            "best_step": self.best["step"] if self.best else None,
            "stopped_early_at": progress.step if self.stopped_early() else None,
            **{f"eval_{key}": value for key, value in evaluation.items()},
            "train_seconds": round(progress.seconds, 3),
            "train_tokens": progress.all_tokens,
            "tokens_per_second": round(progress.all_tokens / max(1e-9, progress.seconds), 1),
            "parameters": sum(parameter.numel() for parameter in bare.parameters()),
        }
        if accelerator.is_main_process:

            def fill(temporary: Path) -> None:
                self.tokenizer.save_pretrained(temporary)
                bare.save_pretrained(temporary)
                write_json(temporary / "metrics.json", metrics)

            checkpoint.write_folder(self.root / "final", fill)
            checkpoint.move_files(self.root / "final", self.output_dir)
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.wait_for_everyone()
        return metrics

    def _due(self, every: int | None) -> bool:
        return self.progress.step % (every or self.steps.per_epoch) == 0 or self.progress.step == self.total


def keep_memory() -> None:
    """Make glibc keep freed memory for reuse. Without glibc, do nothing."""
    # By default, glibc unmaps freed blocks above 32 MiB. Each layer would map memory again.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def in_precision(arguments: LoopArguments) -> torch.autocast:
    """Return an autocast context with the precision that ``arguments`` sets."""
    dtype = torch.float16 if arguments.precision == "fp16" else torch.bfloat16
    return torch.autocast(processes().device.type, dtype=dtype, enabled=arguments.precision != "fp32")


def check_precision(precision: str) -> None:
    """Raise ValueError for fp16 on a CPU. Log a warning if bf16 is slower than fp32."""
    if processes().device.type != "cpu":
        return
    if precision == "fp16":
        raise ValueError("precision: fp16 needs a GPU; use bf16 or fp32 on this machine.")
    if precision == "bf16" and not bfloat16_is_faster():
        logger.warning("precision: bf16 is slower than float32 on this processor; use precision: fp32.")


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass."""
    # transformers renamed this method. Older versions have only the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _accelerator(arguments: LoopArguments, output_dir: Path) -> Accelerator:
    available = {str(tracker.value) for tracker in get_available_trackers()}
    if unknown := sorted(set(arguments.trackers) - available):
        here = ", ".join(sorted(available)) or "none"
        raise ValueError(
            f"trackers: {', '.join(unknown)} is unknown or not installed; installed: {here}. Install or remove it."
        )
    # The next stage may need another precision. Reset the settings, but keep the processes.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=processes().device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(arguments.precision, arguments.precision),
        log_with=arguments.trackers or None,
        project_dir=str(output_dir),
        # Avoid a second copy of the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if arguments.trackers:
        accelerator.init_trackers(output_dir.name, config={"seed": arguments.seed or 0})
    return accelerator
