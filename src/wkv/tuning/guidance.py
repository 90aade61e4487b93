"""Test-time guidance: a larger model, or a reward, moves the initial state of a small one for a single prompt.

The fourth strategy of "State-based Test-Time Scaling" (arXiv 2504.05097), our reconstruction: only keywords of it are
public (a larger model, chain of thought, reinforcement learning). For every prompt some steps of Adam are made on a
copy of the state the prompt starts from, then the model answers from there. The model itself is never changed, so there
is nothing to put back: its next answer without guidance is the same, bit for bit.

- A teacher writes a continuation of the prompt, its "trace". The student learns to write that ("trace"), or to predict
  as the teacher does along it ("logits", which needs the same tokenizer).
- A reward scores continuations that the student writes itself: REINFORCE without a critic, where rewards are normalised
  within the group of each step.

Shape letters: B sequences, T time, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wkv.data import tokenizer_fingerprint
from wkv.errors import WkvError
from wkv.inference.engine import Generation, evaluating
from wkv.inference.generate import generate, starting_state
from wkv.inference.prompts import as_batch, encode_prompt, find_tokenizer
from wkv.inference.sampler import Sampler
from wkv.layers.language_model import LanguageModel
from wkv.state import State, check_compatible
from wkv.tokenizers import Tokenizer
from wkv.training.losses import next_token_loss
from wkv.tuning.observer import divergence
from wkv.tuning.options import check_rank
from wkv.tuning.state import METHODS, InitialState, empty_state

MATCHES = ("trace", "logits")


@dataclass(frozen=True)
class Guidance:
    """How a prompt's state is tuned before the model answers.

    Args:
        teacher: a larger model, frozen; or give `reward`.
        steps: of Adam on the state.
        learning_rate: of Adam, constant.
        match: what of the teacher is learnt: "trace" (cross-entropy of what it wrote) or "logits" (KL divergence from
            its predictions there).
        trace_tokens: how long a trace, or a continuation that is rewarded, may be.
        sampler: writes the trace; None draws from the teacher's own distribution.
        reward: text of a continuation -> how good it is; a larger number is better.
        group: continuations per step that are rewarded.
        method: what is tuned, "state" or "fullstate"; see `InitialState`.
        clip: largest norm of the gradient.
        seed: of traces and continuations.

    Raises:
        WkvError: for options that cannot be, or unless exactly one of `teacher` and `reward` is given.
    """

    teacher: LanguageModel | None = None
    steps: int = 4
    learning_rate: float = 1e-2
    match: str = "trace"
    trace_tokens: int = 64
    sampler: Sampler | None = None
    reward: Callable[[str], float] | None = None
    group: int = 8
    method: str = "state"
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.teacher is None) == (self.reward is None):
            found = "neither" if self.teacher is None else "both"
            raise WkvError(f"guidance comes from a teacher or from a reward; give one of them, found {found}")
        if self.teacher is not None and not isinstance(self.teacher, LanguageModel):
            raise WkvError(f"teacher must be a language model of this library, found {type(self.teacher).__name__}")
        if self.reward is not None and not callable(self.reward):
            raise WkvError(f"reward must be a function of a text, found {self.reward!r}")
        for name in ("steps", "trace_tokens", "group"):
            check_rank(getattr(self, name), name)
        if self.group < 2 and self.reward is not None:
            raise WkvError("group must be at least 2: rewards are compared with each other")
        for name, known in (("match", MATCHES), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise WkvError(f"{name} {getattr(self, name)!r} is unknown; one of {', '.join(known)}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise WkvError(f"{name} must be a positive number, found {value!r}")

    def states(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], start: State | None, tokenizer: Tokenizer
    ) -> State:
        """The states from which to read the prompts.

        Args:
            model: answers them; not changed.
            prompts: token ids, none empty.
            start: states to begin with, of as many sequences as there are prompts; None: that before the first token.
            tokenizer: of the model.

        Raises:
            WkvError: for "logits" if the teacher has another tokenizer, and for rewards that are no finite numbers.
        """
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            start = model.init_state(len(prompts)) if start is None else start
            check_compatible(start, model.init_state(1), model.ln_out.weight.device, len(prompts))
            rows = [start.select(row).detach() for row in range(len(prompts))]
            tuned = [self._tuned(model, list(ids), row, tokenizer) for ids, row in zip(prompts, rows, strict=True)]
        return State.stack(tuned)

    def _tuned(self, model: LanguageModel, ids: list[int], start: State, tokenizer: Tokenizer) -> State:
        """The state for one prompt."""
        state = GuidedState(model, start, self.method)
        if self.reward is not None:
            losses: Iterator[Tensor | None] = self._rewarded(model, ids, state, tokenizer)
        else:
            losses = self._taught(model, ids, state, tokenizer)
        optimizer = torch.optim.Adam(state.parameters, self.learning_rate)
        for loss in losses:
            if loss is not None:
                gradients = torch.autograd.grad(loss, state.parameters, materialize_grads=True)
                for parameter, gradient in zip(state.parameters, gradients, strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(state.parameters, self.clip)
                optimizer.step()
        return state.expanded(1).detach()

    def _taught(
        self, model: LanguageModel, ids: list[int], state: GuidedState, tokenizer: Tokenizer
    ) -> Iterator[Tensor | None]:
        """The loss of every step against the teacher; none if it writes nothing."""
        trace = self._trace(model, ids, tokenizer)
        if not trace:
            return
        line = torch.tensor([ids + trace], device=model.ln_out.weight.device)
        inputs, targets = line[:, :-1], line[:, 1:]
        counted = torch.arange(inputs.shape[1], device=line.device)[None] >= len(ids) - 1
        followed = self._predictions(inputs) if self.match == "logits" else None
        for _ in range(self.steps):
            logits = model(inputs, state.expanded(1)).logits
            if followed is None:
                yield next_token_loss(logits, targets, counted, l2wrap=0.0)
            else:
                yield divergence(logits, followed.to(logits.device), counted)

    def _trace(self, model: LanguageModel, ids: list[int], tokenizer: Tokenizer) -> list[int]:
        """What the teacher writes behind the prompt, as ids of the student's tokenizer."""
        assert self.teacher is not None
        other = find_tokenizer(self.teacher)
        same = tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
        if self.match == "logits" and not (same and self.teacher.config.vocab_size == model.config.vocab_size):
            raise WkvError(
                'match="logits" compares predictions, and the teacher has another tokenizer; use match="trace"'
            )
        prompt: Any = ids if same else tokenizer.decode_bytes(ids)
        written = self._written(self.teacher, prompt, other)
        return written if same else tokenizer.encode(other.decode_bytes(written))

    def _written(self, teacher: LanguageModel, prompt: Any, tokenizer: Tokenizer) -> list[int]:
        found = generate(
            teacher, prompt, self.trace_tokens, self.sampler, tokenizer=tokenizer, seed=self.seed, return_state=False
        )
        return chosen(found, tokenizer)

    @torch.no_grad()
    def _predictions(self, inputs: Tensor) -> Tensor:
        """The teacher's logits, from where it starts to generate."""
        assert self.teacher is not None
        inputs = inputs.to(self.teacher.ln_out.weight.device)
        with evaluating(self.teacher):
            logits: Tensor = self.teacher(inputs, starting_state(self.teacher, None, 1)).logits
        return logits

    def _rewarded(
        self, model: LanguageModel, ids: list[int], state: GuidedState, tokenizer: Tokenizer
    ) -> Iterator[Tensor | None]:
        """The loss of every step on continuations of its own; None where all are equally good."""
        assert self.reward is not None
        for step in range(self.steps):
            start = state.expanded(self.group).detach()
            found = generate(
                model, [ids] * self.group, self.trace_tokens, state=start, tokenizer=tokenizer, seed=self.seed + step,
                return_state=False,
            )  # fmt: skip
            advantages = normalised([float(self.reward(each.text)) for each in found])
            written = [chosen(each, tokenizer) for each in found]
            if any(advantages):
                log_p = mean_log_probabilities(model, ids, written, state)
                yield -(torch.tensor(advantages, device=log_p.device) * log_p).mean()
            else:
                yield None


class GuidedState:
    """A copy of a state of one sequence, of which the parts that a model can be tuned by are parameters.

    Args:
        model: whose state it is.
        start: the state; slots that a mounted adapter has added stay as they are.
        method: see `InitialState`.
    """

    def __init__(self, model: LanguageModel, start: State, method: str) -> None:
        pairs = zip(empty_state(model).layers, start.layers, strict=True)
        self._own = State(start.model, [{name: layer[name] for name in empty} for empty, layer in pairs])
        self._start = start
        self._module = InitialState(model, method, init=self._own)
        self.parameters = list(self._module.parameters())

    def expanded(self, batch_size: int) -> State:
        """The state of so many sequences, differentiable."""
        rows = [0] * batch_size
        tuned, start = self._module(self._own.select(rows)), self._start.select(rows)
        return State(start.model, [{**a, **b} for a, b in zip(start.layers, tuned.layers, strict=True)])


def guided_generate(
    model: LanguageModel,
    prompt: Any,
    guidance: Guidance,
    max_tokens: int = 100,
    sampler: Sampler | None = None,
    state: State | None = None,
    *,
    tokenizer: Any = None,
    **extras: Any,
) -> Any:
    """`wkv.generate` with guidance: tune the state for each prompt, answer, forget it.

    Args:
        guidance: by what, and how much.
        model, prompt, max_tokens, sampler, state, tokenizer, extras: see `wkv.generate`.
    """
    found = find_tokenizer(model, tokenizer)
    prompts, batch = as_batch(prompt)
    ids = [encode_prompt(item, found, model.config.vocab_size, carried=state is not None) for item in prompts]
    start = guidance.states(model, ids, starting_state(model, state, len(ids)), found)
    given: Any = ids if batch else ids[0]
    return generate(model, given, max_tokens, sampler, start, tokenizer=found, **extras)


def chosen(found: Generation, tokenizer: Tokenizer) -> list[int]:
    """All ids that were sampled, with the end-of-text id if one ended the text."""
    end = tokenizer.eos_id
    return found.tokens if end is None or found.finish_reason != "eos" else [*found.tokens, end]


def normalised(rewards: Sequence[float]) -> list[float]:
    """Rewards less their mean, over their standard deviation; zeros if they are all equal.

    Raises:
        WkvError: for rewards that are not finite.
    """
    if not all(map(math.isfinite, rewards)):
        raise WkvError(f"rewards must be finite numbers, found {list(rewards)}")
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [0.0 if spread == 0 else (reward - mean) / spread for reward in rewards]


def mean_log_probabilities(
    model: LanguageModel, ids: list[int], written: Sequence[list[int]], state: GuidedState
) -> Tensor:
    """Mean log-probability per token of each continuation of a prompt, [B]."""
    longest = max(len(each) for each in written)
    device = model.ln_out.weight.device
    line = torch.tensor([ids + each + [0] * (longest - len(each)) for each in written], device=device)
    lengths = torch.tensor([len(each) for each in written], device=device)
    logits = model(line[:, :-1], state.expanded(len(written))).logits[:, len(ids) - 1 :]
    log_p_BT = logits.float().log_softmax(-1).gather(-1, line[:, len(ids) :, None]).squeeze(-1)
    counted_BT = torch.arange(longest, device=device) < lengths[:, None]
    return (log_p_BT * counted_BT).sum(1) / lengths.clamp_min(1)
