"""The training loop: batches in, steps, evaluations and checkpoints, until the budget is used up.

In the run folder:
- recipe.yaml, the complete recipe; tokenizer.json, a vocabulary trained for the run;
- log.csv and loss.png, every step and evaluation, and the curve;
- checkpoints/step-N/, model and training state: a resumed run goes on from here, exactly;
- model.safetensors, the model of the newest checkpoint (adapter.safetensors where an adapter is trained);
  best.safetensors, that of the best evaluation;
- result.json, what came out, once the run is finished.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wkv.data import Batch, Document, Sampler, StreamingDocuments
from wkv.errors import CheckpointError, WkvError
from wkv.evaluation import bits_per_byte
from wkv.evaluation.bits_per_byte import Text, scored_bytes
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training.checkpoint import (
    ADAPTER,
    EMA,
    MODEL,
    TRAINING,
    Position,
    Writer,
    load_training,
    pack_state,
    save_checkpoint,
    unpack_state,
    write_training,
)
from wkv.training.display import Display
from wkv.training.distributed import Team, create_team, resolve_precision
from wkv.training.ema import Ema
from wkv.training.guard import Best, Guard
from wkv.training.log import RunLog, SilentLog, draw_loss_curve
from wkv.training.objective import GradientStep, Objective, sums_gradients, unused_parameters, with_shorter_context
from wkv.training.optimizer import create_optimizer, set_learning_rate
from wkv.training.randomness import random_state, set_random_state
from wkv.training.sections import TrainRecipe
from wkv.training.segments import context_length_at
from wkv.training.sharding import load_optimizer_state, settle, shard, whole, whole_model, whole_optimizer_state
from wkv.tuning import Adapter
from wkv.tuning.files import read_adapter


@dataclass
class StepResult:
    """What one step reports.

    Args:
        loss: mean over the targets that count, in nats per token.
        learning_rate: of the groups with factor 1.
        gradient_norm: before clipping.
        problem: why the step left the model as it was; None if it did not.
    """

    loss: float
    learning_rate: float
    gradient_norm: float
    problem: str | None = None

    def row(self) -> dict[str, float]:
        """Columns of the log."""
        values = {"loss": self.loss, "learning_rate": self.learning_rate, "gradient_norm": self.gradient_norm}
        return values if self.problem is None else {**values, "skipped": 1}


class Trainer:
    """One training run: model, optimizer, batches and the position in the run.

    Args:
        recipe: how to train.
        model: trained in place; on the device that accelerate chooses.
        sampler: where this process's batches come from; with `StreamingDocuments` the state is carried from batch to
            batch.
        run: the run folder; it must exist when the run is started or saved.
        held_out: texts for evaluations; empty: there are none.
        checkpoint: a checkpoint of this run to go on from.
        team: the processes of the run, from `create_team`.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        model: LanguageModel,
        sampler: Sampler,
        run: Path,
        held_out: Sequence[Text] = (),
        checkpoint: Path | None = None,
        team: Team | None = None,
    ) -> None:
        self.recipe, self.sampler, self.run_folder = recipe, sampler, run
        self.held_out = clip_texts(held_out, recipe.eval_bytes)
        self.team = team or create_team(recipe, run)
        self.accelerator = self.team.accelerator
        self.precision = resolve_precision(recipe.precision)
        self.budget, self.schedule = recipe.budget(), recipe.curve()
        self.position, self.best, self.guard = Position(), Best(), Guard(recipe.guard, recipe.spike)
        self.stop_signal, self._stop_agreed, self._unpaid = threading.Event(), False, 0.0
        model.gradient_checkpointing = recipe.gradient_checkpointing
        self.plain_model = model.to(self.accelerator.device)
        self.adapter: Adapter | None = next(iter(model.adapters.values()), None)
        self.artifact = MODEL if self.adapter is None else ADAPTER
        if self.adapter is not None and (self.team.sharded or self.team.deepspeed):
            raise WkvError("an adapter is trained in one process or under DDP; use recipes/accelerate/ddp.yaml")
        if self.team.sharded:
            shard(model, self.team.sharding)
        beta1, beta2 = recipe.betas
        optimizer = create_optimizer(model, recipe.learning_rate, recipe.weight_decay, (beta1, beta2), recipe.eps)
        self.plain_optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.ema = None if recipe.ema is None else Ema(model, recipe.ema)
        carries = isinstance(sampler, StreamingDocuments)
        rows = self.team.rows(recipe.batch_size)
        self.carried: State | None = model.init_state(rows) if carries else None
        if checkpoint is not None:
            self._restore(checkpoint)
        plain = Objective(model, recipe.l2wrap, recipe.head_chunk)
        objective, self.optimizer = self._prepare(plain, optimizer)
        self.gradients = GradientStep(recipe, objective, plain, self.accelerator, self.team)

    @property
    def num_parameters(self) -> int:
        """Size of what is trained: the model, or its adapter."""
        return (self.adapter or self.plain_model).num_parameters

    @property
    def fraction(self) -> float:
        """Part of the budget that is used up, in [0, 1]."""
        return self.budget.fraction(self.position.step, self.position.seconds, self.position.tokens)

    @property
    def stopped_early(self) -> bool:
        """Whether evaluations have not improved for as long as the recipe allows."""
        return self.recipe.stop_after is not None and self.best.waited >= self.recipe.stop_after

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.fraction >= 1 or self.stopped_early

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C or SIGTERM ends the run here; several processes have agreed on it in their last step."""
        return self.stop_signal.is_set() if self.team.alone else self._stop_agreed

    def run(self, display: Display) -> bool:
        """Train until the run is done (True), or until Ctrl-C or SIGTERM (False); either way saves at the end."""
        recipe, position = self.recipe, self.position
        with self.team.everyone(self._open_log) as log, _stop_signals(self.stop_signal):
            while not self.done and not self.stopping:
                result = self.step()
                self.report(log, display, result)
                due = self.held_out and (position.step % recipe.eval_every == 0 or self.fraction >= 1)
                found_best = due and self._evaluate(log, display, result.loss)
                if position.step % recipe.checkpoint_every == 0 or (found_best and recipe.keep_best):
                    log.flush()
                    self.save()
        self.save()
        self.team.main_alone(lambda: draw_loss_curve(self.run_folder / "log.csv", self.run_folder / "loss.png"))
        return self.done

    def step(self) -> StepResult:
        """Batches of one step: forward, backward, clip, update.

        Raises:
            WkvError: if too many steps in a row were bad; the model is then as it was before them.
        """
        started = time.perf_counter()
        position = self.position
        progress = self.budget.progress(position.step, position.seconds, self.schedule, position.tokens)
        learning_rate = self.schedule.learning_rate(position.step, progress)
        set_learning_rate(self.optimizer, learning_rate)
        batches = [self._draw() for _ in range(self.recipe.accumulate)]
        self.optimizer.zero_grad()
        loss, state, targets, tokens = self.gradients(batches, self.carried)
        norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)))
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # one wait for the device
        measured = time.perf_counter()
        seconds = position.seconds + self._unpaid + measured - started
        (loss_value, stops), (norm_value, seconds) = self.team.agree(
            (loss_value, self.stop_signal.is_set()), (norm_value, seconds)
        )
        self._stop_agreed = stops > 0
        result = StepResult(loss_value, learning_rate, norm_value, self._problem(loss_value, norm_value, targets))
        if result.problem is None or not targets:
            self.carried = state
        if result.problem is None:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        position.step += 1
        position.tokens += tokens
        position.seconds, self._unpaid = seconds, time.perf_counter() - measured
        if self.team.alone:  # several processes agree on the rest in their next step
            position.seconds, self._unpaid = position.seconds + self._unpaid, 0.0
        return result

    def evaluate(self) -> float:
        """Bits per byte of the held-out text, of the averaged parameters if there are any."""
        with self.averaged(), self.accelerator.autocast():
            return self.team.score(partial(bits_per_byte, self.plain_model), self.held_out)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model has its averaged parameters, if there are any."""
        with nullcontext() if self.ema is None else self.ema.applied():
            try:
                yield
            finally:
                if self.team.sharded:
                    settle(self.plain_model)

    def save(self) -> Path:
        """Write a checkpoint of this moment; the main process does."""
        files = self._files()
        best_step = self.best.step if self.recipe.keep_best and self.best.step else None
        state = self.run_folder, self.position.step, files, self.recipe.keep_last, best_step
        return self.team.main_alone(lambda: save_checkpoint(*state))

    def _files(self) -> dict[str, Writer]:
        """What writes each file of a checkpoint; processes have brought their parts together before that."""
        model, average = self._save_model, self._save_average
        if self.team.sharded:
            model = partial(_save, whole_model(self.plain_model))
        files = {self.artifact: model, TRAINING: write_training(self._training_state())}
        if self.ema is None:
            return files
        if self.team.sharded:
            with self.averaged():
                average = partial(_save, whole_model(self.plain_model))
        return {**files, EMA: average}

    def _prepare(self, plain: Objective, optimizer: torch.optim.Optimizer) -> Any:
        """The objective and the optimizer as accelerate wants them."""
        if sums_gradients(self.recipe, self.team):
            self.team.spread(plain)
            return plain, self.accelerator.prepare_optimizer(optimizer)
        if self.team.sharded:
            return plain, self.accelerator.prepare_optimizer(optimizer)
        if not self.team.alone:  # DDP would wait for gradients that never come
            plain.__dict__["_ddp_params_and_buffers_to_ignore"] = unused_parameters(plain)
        prepared = self.accelerator.prepare(plain, optimizer)
        if self.team.deepspeed and self.carried is not None:  # the model may have another type now
            self.carried = self.carried.to(dtype=plain.model.ln_out.weight.dtype)
        return prepared

    def _open_log(self) -> RunLog | SilentLog:
        return RunLog(self.run_folder / "log.csv", self.position.step) if self.team.main else SilentLog()

    def _draw(self) -> Batch:
        batch = self.sampler.next_batch().to(self.accelerator.device)
        recipe = self.recipe
        if recipe.context_start is not None:
            growth = recipe.context_start, recipe.context_length, recipe.context_warmup_steps
            batch = with_shorter_context(batch, context_length_at(self.position.step, *growth))
        return self.team.columns(batch)

    def _problem(self, loss: float, norm: float, targets: int) -> str | None:
        """Why a step must not change the model."""
        if not targets:
            return "no target of its batches counts"
        problem = self.guard.problem(loss, norm)
        if problem is not None and self.guard.exhausted:
            hint = f"lower train.learning_rate (now {self.recipe.learning_rate:g}) or train longer with a warm-up"
            often = f" after {self.guard.limit} skipped steps" if self.guard.limit else ""
            found = f"training diverged at step {self.position.step}{often}: {problem}"
            raise WkvError(f"{found}. The last checkpoint is intact; {hint}")
        return problem

    def report(self, log: RunLog | SilentLog, display: Display, result: StepResult) -> None:
        """Log and show a step."""
        position = self.position
        log.add(**vars(position), **result.row())
        self.accelerator.log({"tokens": position.tokens, **result.row()}, step=position.step)
        display.step(self.fraction, position, position.tokens, result.loss)
        if result.problem is not None:
            display.note(f"step {position.step:,} skipped: {result.problem}")

    def _evaluate(self, log: RunLog | SilentLog, display: Display, loss: float) -> bool:
        """Score the held-out text; True if it was never better."""
        position, score = self.position, self.evaluate()
        log.add(**vars(position), bits_per_byte=score)
        log.flush()
        self.accelerator.log({"bits_per_byte": score}, step=position.step)
        display.evaluation(position, position.tokens, loss, score)
        return self.best.update(score, position.step)

    def _training_state(self) -> dict[str, Any]:
        return {
            "optimizer": None if self.team.deepspeed else whole_optimizer_state(self.plain_optimizer),
            "sampler": self.sampler.state_dict(),
            "position": vars(self.position).copy(),
            "best": self.best.state_dict(),
            "guard": self.guard.state_dict(),
            "ema_steps": self.ema.steps if self.ema is not None else 0,
            "carried": pack_state(self.team.all_rows(self.carried)),
            "rng": random_state(self.accelerator.device),
        }

    def _restore(self, checkpoint: Path) -> None:
        state, device = load_training(checkpoint), self.accelerator.device
        if self.team.deepspeed or state["optimizer"] is None:
            raise CheckpointError(
                f"{checkpoint}: a run under DeepSpeed cannot be resumed, nor a run be resumed under it; continue its "
                "model in a new run with train.start_from"
            )
        load_optimizer_state(self.plain_optimizer, state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.position, self.best = state["position"], Best(**state["best"])
        self.guard.load_state_dict(state["guard"])
        self.carried = self.team.own_rows(unpack_state(state["carried"], device))
        if self.ema is not None:
            self._restore_average(self.ema, checkpoint / EMA, state["ema_steps"])
        set_random_state(state["rng"], device)

    def _restore_average(self, ema: Ema, path: Path, steps: int) -> None:
        if self.adapter is None:
            from wkv import load_model

            return ema.load(dict(load_model(path).named_parameters()), steps)
        ema.steps = steps
        with ema.applied():  # what is read into the parameters becomes the average
            return self.adapter.load_tensors(read_adapter(path).tensors)

    def _save_model(self, path: Path) -> None:
        if self.adapter is not None:
            self.adapter.save(path)
        else:
            _save(self.plain_model, path)

    def _save_average(self, path: Path) -> None:
        with self.averaged():
            self._save_model(path)


def _save(model: LanguageModel, path: Path) -> None:
    from wkv import save_model

    save_model(model, path)


def clip_texts(texts: Sequence[Text], limit: int | None) -> list[Text]:
    """The beginnings of all texts, cut alike so that they have about `limit` bytes together; None: all of them.

    Where there are conversations, which cannot be cut, the first ones that have so many bytes.
    """
    if limit is None or sum(map(scored_bytes, texts)) <= limit:
        return list(texts)
    if any(isinstance(text, Document) for text in texts):
        ends = list(itertools.accumulate(map(scored_bytes, texts)))
        return list(texts[: 1 + sum(end <= limit for end in ends)])
    share = limit // len(texts) + 1
    raw = [text.encode() if isinstance(text, str) else text for text in texts if not isinstance(text, Document)]
    return [text[:share].decode("utf-8", "ignore") for text in raw]


@contextmanager
def _stop_signals(stopped: threading.Event) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into an event: the step under way is finished. A second one interrupts."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
