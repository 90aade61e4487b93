"""The training loop: batches in, steps, evaluations and checkpoints, until the budget is used up.

In the run folder:
- recipe.yaml, the complete recipe; tokenizer.json, a vocabulary trained for the run;
- log.csv and loss.png, every step and evaluation, and the curve;
- checkpoints/step-N/, model and training state: a resumed run goes on from here, exactly;
- model.safetensors, the model of the newest checkpoint;
- result.json, what came out, once the run is finished.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wkv.data import RandomWindows
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.training.checkpoint import Position, load_training, save_checkpoint
from wkv.training.display import Display
from wkv.training.log import RunLog, draw_loss_curve
from wkv.training.losses import next_token_loss
from wkv.training.optimizer import create_optimizer, set_learning_rate
from wkv.training.recipe import TrainRecipe


@dataclass
class StepResult:
    """What one step reports: mean loss in nats per token, learning rate, gradient norm before clipping."""

    loss: float
    learning_rate: float
    gradient_norm: float


class Trainer:
    """One training run in one process: model, optimizer, batches and the position in the run.

    Args:
        recipe: how to train.
        model: trained in place; on the device that accelerate chooses.
        sampler: where batches come from.
        run: the run folder; it must exist.
        held_out: texts for evaluations.
        checkpoint: a checkpoint of this run to go on from.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        model: LanguageModel,
        sampler: RandomWindows,
        run: Path,
        held_out: list[str],
        checkpoint: Path | None = None,
    ) -> None:
        self.recipe, self.sampler, self.run_folder = recipe, sampler, run
        self.held_out = clip_texts(held_out, recipe.eval_bytes)
        self.budget, self.schedule = recipe.budget(), recipe.curve()
        self.position = Position()
        self.precision = resolve_precision(recipe.precision)
        self.accelerator = _accelerator(self.precision)
        model.gradient_checkpointing = recipe.gradient_checkpointing
        self.plain_model = model.to(self.accelerator.device)
        beta1, beta2 = recipe.betas
        optimizer = create_optimizer(model, recipe.learning_rate, recipe.weight_decay, (beta1, beta2), recipe.eps)
        self.plain_optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if checkpoint is not None:
            self._restore(checkpoint)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def fraction(self) -> float:
        """Part of the budget that is used up, in [0, 1]."""
        return self.budget.fraction(self.position.step, self.position.seconds)

    def run(self, display: Display) -> bool:
        """Train until the budget is used up (True), or until Ctrl-C or SIGTERM (False); either way saves at the end."""
        recipe, position = self.recipe, self.position
        with RunLog(self.run_folder / "log.csv", position.step) as log, _stop_signals() as stopped:
            while self.fraction < 1 and not stopped.is_set():
                result = self.step()
                tokens = position.step * self.budget.tokens_per_step
                now = {"step": position.step, "tokens": tokens, "seconds": position.seconds}
                log.add(**now, **vars(result))
                display.step(self.fraction, position, tokens, result.loss)
                if position.step % recipe.eval_every == 0 or self.fraction >= 1:
                    score = bits_per_byte(self.plain_model, self.held_out)
                    log.add(**now, bits_per_byte=score)
                    log.flush()
                    display.evaluation(position, tokens, result.loss, score)
                if position.step % recipe.checkpoint_every == 0:
                    log.flush()
                    self.save()
        self.save()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # from now on without autocast
        draw_loss_curve(self.run_folder / "log.csv", self.run_folder / "loss.png")
        return self.fraction >= 1

    def step(self) -> StepResult:
        """One batch: forward, backward, clip, update.

        Raises:
            WkvError: if loss or gradients are not finite; the model is then as it was before the step.
        """
        started = time.perf_counter()
        position, accelerator = self.position, self.accelerator
        progress = self.budget.progress(position.step, position.seconds, self.schedule)
        learning_rate = self.schedule.learning_rate(position.step, progress)
        set_learning_rate(self.optimizer, learning_rate)
        batch = self.sampler.next_batch().to(accelerator.device)
        loss = next_token_loss(self.model(batch[:, :-1]).logits, batch[:, 1:], l2wrap=self.recipe.l2wrap)
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()  # one wait for the device
        result = StepResult(loss_value, learning_rate, norm_value)
        if not math.isfinite(result.loss + result.gradient_norm):
            raise WkvError(self._divergence(result))
        self.optimizer.step()
        position.step += 1
        position.seconds += time.perf_counter() - started
        return result

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(
            self.run_folder, self.plain_model, self.plain_optimizer, self.sampler.state_dict(), self.position
        )

    def _restore(self, checkpoint: Path) -> None:
        state = load_training(checkpoint)
        self.plain_optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.position = state["position"]
        torch.set_rng_state(state["rng"])

    def _divergence(self, result: StepResult) -> str:
        numbers = f"loss {result.loss:.4g}, gradient norm {result.gradient_norm:.4g}"
        hint = f"lower train.learning_rate (now {self.recipe.learning_rate:g}) or train longer with a warm-up"
        return f"training diverged at step {self.position.step}: {numbers}. The last checkpoint is intact; {hint}"


def resolve_precision(precision: str) -> str:
    """ "auto" made concrete: "bf16" on hardware with bfloat16 multiplication, else "fp32"."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def clip_texts(texts: list[str], limit: int | None) -> list[str]:
    """The beginnings of all texts, cut alike so that they have about `limit` bytes together; None: all of them."""
    if limit is None or sum(len(text.encode()) for text in texts) <= limit:
        return texts
    share = limit // len(texts) + 1
    return [text.encode()[:share].decode("utf-8", "ignore") for text in texts]


def _accelerator(precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
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
