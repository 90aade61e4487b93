"""One sequence over several processes: each holds a stretch of it, and states travel from one to the next.

A recurrence needs nothing of earlier tokens but the state they left. Process 0 reads its stretch and sends the state
after it to process 1, and so on; in the backward pass the gradients of these states come back. Loss and gradients are
exact.

Memory is shared out. So is the work, where a batch has several rows: while process 1 reads the first ones, process 0
reads the next. With m groups of rows on n processes, each process is busy in m of m + n - 1 steps; a single group is
read by one process after the other, and gains memory only.

Shape letters: B batch, T time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.norms import wide
from wkv.state import State, check_compatible
from wkv.training.segments import (
    Backward,
    Run,
    SegmentResult,
    Sequences,
    Values,
    check_learns,
    check_positive,
    hand_over,
)
from wkv.training.states import free, leaf_state, state_tensors, with_tensors

SENT_AT_ONCE = 1 << 22  # values of gradients


def sequence_parallel_backward(
    model: LanguageModel,
    inputs: Values,
    targets: Values,
    *,
    row_groups: int = 1,
    state: State | None = None,
    loss_mask: Values | None = None,
    reset: Values | None = None,
    mask: Values | None = None,
    l2wrap: float = 1e-4,
    backward: Backward | None = None,
    group: dist.ProcessGroup | None = None,
    normalizer: float | None = None,
    positions: float | None = None,
) -> SegmentResult:
    """Add this process's share of the gradients of sequences that lie, stretch by stretch, on several processes.

    Every process calls this, with the same parameters, rows and options. Then `sum_gradients` adds up the shares.

    Args:
        model: its gradients are added to; call `zero_grad` before.
        inputs: integers [B, T of this process]: the columns that follow those of the process before.
        targets, loss_mask, reset, mask: of the same columns, see `segmented_backward`.
        row_groups: number of groups of rows that follow each other through the processes, at most B.
        state: before the first column, on the first process; the others ignore it. Its gradients arrive there.
        l2wrap: see `next_token_loss`.
        backward: called with a loss in place of `loss.backward()`; it may scale, by the same factor on all processes.
        group: the processes, in the order of their columns; None: all of them.
        normalizer, positions: of a larger batch of which this is a part, see `head_loss`.

    Returns:
        SegmentResult, the same on every process: loss and number of targets of the whole sequences, and the state
        after their last column.

    Raises:
        WkvError: on every process, if arguments do not fit on one of them. A token or target outside the vocabulary is
            found later, by one process alone: the others wait for it until their connection times out.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise WkvError("sequence parallelism needs torch.distributed.init_process_group first")
    line = _Line(model.ln_out.weight, group)
    problem, numbers = None, (0, 0, 0, 0)
    try:
        check_positive(row_groups=row_groups)
        sequences = Sequences(inputs, targets, loss_mask, mask, reset, line.device)
        start = model.init_state(sequences.batch) if state is None or line.rank else state
        check_compatible(start, model.init_state(1, device="meta"), line.device, sequences.batch)
        check_learns(model, leaf_state(start) if line.rank else start)
        numbers = (sequences.count(), sequences.count_tokens(), sequences.batch, row_groups)
    except WkvError as error:
        problem = error
    tokens, exist = line.agree(numbers, problem)
    run = Run(model, l2wrap, normalizer or tokens, positions or exist)
    loss, final, gradients = _pass(line, run, sequences, start, row_groups, backward or Tensor.backward)
    if line.rank == 0:
        _deliver(start, gradients)
    return SegmentResult(line.total(loss), line.last(final), tokens)


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every process the sum of all processes' gradients, after `sequence_parallel_backward`.

    Args:
        model: parameters without a gradient on any process keep none.
        group: the processes; None: all of them.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        return
    device = _message_device(learning[0].device, group)
    found = torch.tensor([parameter.grad is not None for parameter in learning], dtype=torch.int64, device=device)
    dist.all_reduce(found, group=group)
    have = [parameter for parameter, count in zip(learning, found.tolist(), strict=True) if count]
    for some in _messages(have):
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in some]
        message = torch.cat([gradient.flatten() for gradient in gradients]).to(device)
        dist.all_reduce(message, group=group)
        parts = message.to(some[0].device).split([x.numel() for x in some])
        for parameter, part in zip(some, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def _messages(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one type, together about as many values as are sent at once."""
    messages: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not messages or size >= SENT_AT_ONCE or parameter.dtype != messages[-1][0].dtype:
            messages.append([])
            size = 0
        messages[-1].append(parameter)
        size += parameter.numel()
    return messages


def _pass(
    line: _Line, run: Run, sequences: Sequences, state: State, row_groups: int, backward: Backward
) -> tuple[Tensor, State, State]:
    """This process's part of the loss, the state after its columns, and the gradients of the state before them."""
    done = []
    for rows in _row_slices(sequences.batch, row_groups):
        start = leaf_state(line.receive(state.select(rows), -1) or state.select(rows))
        loss, end = run(sequences.rows(rows).piece(slice(0, sequences.length)), start)
        line.send(end, +1)
        done.append((start, loss, end))
    gradients = []
    for start, loss, end in done:
        following = line.receive(end, +1)
        backward(hand_over(loss, end, [] if following is None else state_tensors(following)))
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in state_tensors(start)]
        gradients.append(with_tensors(start, found))
        line.send(gradients[-1], -1)
    line.wait()
    loss = torch.stack([loss.detach() for _, loss, _ in done]).sum()
    return loss, free(State.stack([end for *_, end in done])), State.stack(gradients)


def _deliver(state: State, gradients: State) -> None:
    """Hand the gradients of the initial state to whatever it was made of; they are scaled already."""
    pairs = zip(state_tensors(state), state_tensors(gradients), strict=True)
    learning = [(x, gradient) for x, gradient in pairs if x.requires_grad]
    if learning:
        torch.autograd.backward([x for x, _ in learning], [gradient for _, gradient in learning])


def _row_slices(batch: int, groups: int) -> list[slice]:
    """The rows in groups of nearly equal size."""
    return [slice(batch * i // groups, batch * (i + 1) // groups) for i in range(groups)]


def _message_device(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where messages must be: gloo sends from the CPU only."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


class _Line:
    """The processes, one behind the other.

    Args:
        like: a parameter of the model.
        group: see `sequence_parallel_backward`.
    """

    def __init__(self, like: Tensor, group: dist.ProcessGroup | None) -> None:
        self.device, self.group = like.device, group
        self.dtype = wide(like.detach()[:0]).dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.messages = _message_device(like.device, group)
        self.under_way: list[tuple[dist.Work | None, Tensor]] = []

    def agree(self, numbers: tuple[int, ...], problem: WkvError | None) -> tuple[int, int]:
        """Sums of the first two `numbers` (targets, tokens); all processes must have the others in common.

        Raises:
            WkvError: on every process, if one has a problem or other numbers (rows, groups of rows).
        """
        own = torch.tensor([problem is None, *numbers], dtype=torch.int64, device=self.messages)
        table = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(table, own, group=self.group)
        good, tokens, positions, batch, groups = torch.stack(table).T.tolist()
        if problem is not None:
            raise problem
        if not all(good):
            raise WkvError(f"process {good.index(0)} of the sequence cannot start; its own error says why")
        if len(set(batch)) > 1 or len(set(groups)) > 1 or groups[0] > batch[0]:
            raise WkvError(
                f"all processes need the same rows, in at most as many groups; found {batch} rows, {groups} groups"
            )
        return sum(tokens), sum(positions)

    def send(self, state: State, step: int) -> None:
        """Send values to the next (+1) or previous (-1) process, if there is one, without waiting."""
        if not 0 <= self.rank + step < self.size:
            return
        for message in (*_lengths(state), _pack(state).to(dtype=self.dtype)):
            message = message.to(self.messages)
            self.under_way.append((dist.isend(message, self._global(self.rank + step), self.group), message))

    def receive(self, like: State, step: int) -> State | None:
        """Wait for values with the shapes of `like` from the next or previous process; None if there is none.

        Caches of attention may have other lengths.
        """
        if not 0 <= self.rank + step < self.size:
            return None
        for message in _lengths(like):
            message = message.to(self.messages)
            dist.recv(message, self._global(self.rank + step), self.group)
            like = _with_lengths(like, message)
        message = torch.empty_like(_pack(like), device=self.messages, dtype=self.dtype)
        dist.recv(message, self._global(self.rank + step), self.group)
        return _unpack(message.to(self.device), like)

    def wait(self) -> None:
        """Until everything is sent."""
        for work, _ in self.under_way:
            if work is not None:
                work.wait()
        self.under_way.clear()

    def total(self, loss: Tensor) -> Tensor:
        """The sum over all processes."""
        message = loss.to(self.messages)
        dist.all_reduce(message, group=self.group)
        return message.to(self.device)

    def last(self, state: State) -> State:
        """The state of the last process."""
        for message in _lengths(state):
            message = message.to(self.messages)
            dist.broadcast(message, self._global(self.size - 1), self.group)
            state = state if self.rank == self.size - 1 else _with_lengths(state, message)
        message = _pack(state).to(self.messages, self.dtype)
        dist.broadcast(message, self._global(self.size - 1), self.group)
        return _unpack(message.to(self.device), state)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _pack(state: State) -> Tensor:
    """All values in one tensor."""
    return torch.cat([wide(x.detach()).flatten() for x in state_tensors(state)])


def _unpack(values: Tensor, like: State) -> State:
    """The reverse of `_pack`: types and shapes are those of `like`."""
    parts = zip(values.split([x.numel() for x in state_tensors(like)]), state_tensors(like), strict=True)
    return with_tensors(like, [part.view(x.shape).to(x.dtype) for part, x in parts])


def _lengths(state: State) -> list[Tensor]:
    """One message with the lengths of all caches; none if there are no caches."""
    lengths = [layer[name].shape[1] for layer in state.layers for name in sorted(layer) if name.endswith("cache")]
    return [torch.tensor(lengths, dtype=torch.int64)] if lengths else []


def _with_lengths(like: State, lengths: Tensor) -> State:
    """A state of the same kind whose caches have these lengths."""
    rest = iter(lengths.tolist())

    def resized(name: str, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), next(rest), *x.shape[2:]) if name.endswith("cache") else x

    return State(like.model, [{name: resized(name, layer[name]) for name in sorted(layer)} for layer in like.layers])
