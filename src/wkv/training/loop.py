"""The training loop: batches in, steps, evaluations and checkpoints, until the budget is used up.

In the run folder:
- recipe.yaml, the complete recipe; tokenizer.json, a vocabulary trained for the run;
- log.csv and loss.png, every step and evaluation, and the curve;
- checkpoints/step-N/, model and training state: a resumed run goes on from here, exactly;
- model.safetensors, the model of the newest checkpoint; best.safetensors, that of the best evaluation;
- result.json, what came out, once the run is finished.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wkv.data import Batch, Sampler, StreamingDocuments
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training.checkpoint import (
    EMA,
    MODEL,
    TRAINING,
    Position,
    load_training,
    pack_state,
    save_checkpoint,
    unpack_state,
    write_training,
)
from wkv.training.display import Display
from wkv.training.ema import Ema
from wkv.training.guard import Best, Guard
from wkv.training.log import RunLog, draw_loss_curve
from wkv.training.objective import GradientStep, Objective, count_tokens, with_shorter_context
from wkv.training.optimizer import create_optimizer, set_learning_rate
from wkv.training.sections import TrainRecipe
from wkv.training.segments import context_length_at, random_state, set_random_state


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
        sampler: where batches come from; with `StreamingDocuments` the state is carried from batch to batch.
        run: the run folder; it must exist when the run is started or saved.
        held_out: texts for evaluations; empty: there are none.
        checkpoint: a checkpoint of this run to go on from.
        accelerator: from `create_accelerator`.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        model: LanguageModel,
        sampler: Sampler,
        run: Path,
        held_out: Sequence[str | bytes] = (),
        checkpoint: Path | None = None,
        accelerator: Any = None,
    ) -> None:
        self.recipe, self.sampler, self.run_folder = recipe, sampler, run
        self.held_out = clip_texts(held_out, recipe.eval_bytes)
        self.accelerator = accelerator or create_accelerator(recipe, run)
        self.precision = resolve_precision(recipe.precision)
        self.budget, self.schedule = recipe.budget(self.accelerator.num_processes), recipe.curve()
        self.position, self.best, self.guard = Position(), Best(), Guard(recipe.guard, recipe.spike)
        model.gradient_checkpointing = recipe.gradient_checkpointing
        self.plain_model = model.to(self.accelerator.device)
        beta1, beta2 = recipe.betas
        optimizer = create_optimizer(model, recipe.learning_rate, recipe.weight_decay, (beta1, beta2), recipe.eps)
        self.plain_optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.ema = None if recipe.ema is None else Ema(model, recipe.ema)
        carries = isinstance(sampler, StreamingDocuments)
        self.carried: State | None = model.init_state(recipe.batch_size) if carries else None
        if checkpoint is not None:
            self._restore(checkpoint)
        plain = Objective(model, recipe.l2wrap, recipe.head_chunk)
        objective, self.optimizer = self.accelerator.prepare(plain, optimizer)
        self.gradients = GradientStep(recipe, objective, plain, self.accelerator)

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

    def run(self, display: Display) -> bool:
        """Train until the run is done (True), or until Ctrl-C or SIGTERM (False); either way saves at the end."""
        recipe, position = self.recipe, self.position
        with RunLog(self.run_folder / "log.csv", position.step) as log, _stop_signals() as stopped:
            while not self.done and not stopped.is_set():
                result = self.step()
                self.report(log, display, result)
                due = self.held_out and (position.step % recipe.eval_every == 0 or self.fraction >= 1)
                found_best = due and self._evaluate(log, display, result.loss)
                if position.step % recipe.checkpoint_every == 0 or (found_best and recipe.keep_best):
                    log.flush()
                    self.save()
        self.save()
        draw_loss_curve(self.run_folder / "log.csv", self.run_folder / "loss.png")
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
        loss, state, targets = self.gradients(batches, self.carried)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # one wait for the device
        result = StepResult(loss_value, learning_rate, norm_value, self._problem(loss_value, norm_value, targets))
        if result.problem is None or not targets:
            self.carried = state
        if result.problem is None:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        position.step += 1
        position.tokens += self.accelerator.num_processes * sum(count_tokens(batch) for batch in batches)
        position.seconds += time.perf_counter() - started
        return result

    def evaluate(self) -> float:
        """Bits per byte of the held-out text, of the averaged parameters if there are any."""
        with self.averaged(), self.accelerator.autocast():
            return bits_per_byte(self.plain_model, self.held_out)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model has its averaged parameters, if there are any."""
        with nullcontext() if self.ema is None else self.ema.applied():
            yield

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        files = {MODEL: self._save_model, TRAINING: write_training(self._training_state())}
        if self.ema is not None:
            files[EMA] = self._save_average
        best_step = self.best.step if self.recipe.keep_best and self.best.step else None
        return save_checkpoint(self.run_folder, self.position.step, files, self.recipe.keep_last, best_step)

    def _draw(self) -> Batch:
        batch = self.sampler.next_batch().to(self.accelerator.device)
        recipe = self.recipe
        if recipe.context_start is None:
            return batch
        growth = recipe.context_start, recipe.context_length, recipe.context_warmup_steps
        return with_shorter_context(batch, context_length_at(self.position.step, *growth))

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

    def report(self, log: RunLog, display: Display, result: StepResult) -> None:
        """Log and show a step."""
        position = self.position
        log.add(**vars(position), **result.row())
        self.accelerator.log({"tokens": position.tokens, **result.row()}, step=position.step)
        display.step(self.fraction, position, position.tokens, result.loss)
        if result.problem is not None:
            display.note(f"step {position.step:,} skipped: {result.problem}")

    def _evaluate(self, log: RunLog, display: Display, loss: float) -> bool:
        """Score the held-out text; True if it was never better."""
        position, score = self.position, self.evaluate()
        log.add(**vars(position), bits_per_byte=score)
        log.flush()
        self.accelerator.log({"bits_per_byte": score}, step=position.step)
        display.evaluation(position, position.tokens, loss, score)
        return self.best.update(score, position.step)

    def _training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.plain_optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "position": vars(self.position).copy(),
            "best": self.best.state_dict(),
            "guard": self.guard.state_dict(),
            "ema_steps": self.ema.steps if self.ema is not None else 0,
            "carried": pack_state(self.carried),
            "rng": random_state(self.accelerator.device),
        }

    def _restore(self, checkpoint: Path) -> None:
        state, device = load_training(checkpoint), self.accelerator.device
        self.plain_optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.position, self.best = state["position"], Best(**state["best"])
        self.guard.load_state_dict(state["guard"])
        self.carried = unpack_state(state["carried"], device)
        if self.ema is not None:
            from wkv import load_model

            self.ema.load(dict(load_model(checkpoint / EMA).named_parameters()), state["ema_steps"])
        set_random_state(state["rng"], device)

    def _save_model(self, path: Path) -> None:
        from wkv import save_model

        save_model(self.plain_model, path)

    def _save_average(self, path: Path) -> None:
        with self.averaged():
            self._save_model(path)


def resolve_precision(precision: str) -> str:
    """ "auto" made concrete: "bf16" on hardware with bfloat16 multiplication, else "fp32"."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def clip_texts(texts: Sequence[str | bytes], limit: int | None) -> list[str | bytes]:
    """The beginnings of all texts, cut alike so that they have about `limit` bytes together; None: all of them."""
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    if limit is None or sum(map(len, raw)) <= limit:
        return list(texts)
    share = limit // len(texts) + 1
    return [text[:share].decode("utf-8", "ignore") for text in raw]


def create_accelerator(recipe: TrainRecipe, run: Path) -> Any:
    """The `accelerate.Accelerator` of a run: precision, devices, trackers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    precision = "bf16" if resolve_precision(recipe.precision) == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=list(recipe.trackers) or None, project_dir=str(run))
    if accelerator.num_processes > 1:
        raise WkvError(f"training runs in one process, found {accelerator.num_processes}; start it without a launcher")
    return accelerator


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event: the step under way is finished. A second one interrupts."""
    stopped = threading.Event()
    before: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
