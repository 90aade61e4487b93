"""Decoding with CUDA graphs: the kernels of one token are recorded once per batch size, and replayed for every token.

A token of a small batch is hundreds of short kernels, and launching them one by one takes longer than running them. A
graph launches all of them at once, on memory that stays where it is: `Step` holds the token, the state and the logits.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wkv.layers.language_model import LanguageModel
from wkv.ops.dispatch import forced_backend
from wkv.state import State

if TYPE_CHECKING:
    from wkv.inference.reading import Reader

AFTER = 4  # tokens that the model reads itself before a batch size is recorded, which takes as long as a few of them
KEPT = 4  # batch sizes whose graphs and memory are kept, the last ones used

Run = Callable[[], None]
# Makes of a function without arguments one that does to the same memory what the function has done.
Capture = Callable[[Run], Run]


def unfit(model: LanguageModel) -> str | None:
    """Why decoding with `model` cannot be recorded; None where it can be tried."""
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    if {device.type for device in devices} != {"cuda"}:
        return f"the model is on {', '.join(sorted(map(str, devices)))}"
    if len(devices) > 1:
        return "the model is spread over several GPUs"
    return "its state grows with the tokens read" if grows(model.init_state(1)) else None


def grows(state: State) -> bool:
    """Whether some slot gets longer with every token."""
    return any(name.endswith("cache") for layer in state.layers for name in layer)


class GraphReader:
    """A `Reader` that replays the reading of single tokens, and leaves prompts and masks to another reader.

    The model's parameters must stay where they are; changes of their values are seen. No gradients.

    Args:
        model: its state must have a fixed size, see `unfit`.
        by: reads what is not replayed, and is what gets recorded.
        capture: see `Capture`; None records CUDA graphs.
    """

    def __init__(self, model: LanguageModel, by: Reader, capture: Capture | None = None) -> None:
        self._model, self._by = model, by
        self._capture = capture or Recorder(next(model.parameters()).device)
        self._steps: OrderedDict[tuple[Any, ...], Step] = OrderedDict()
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._failed = False

    def read(
        self, tokens: Tensor, state: State | None = None, mask: Tensor | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """See `Reader`. With `inplace` the state returned is brought up to date by the next call it is given to."""
        if mask is None and tokens.ndim == 2 and tokens.shape[1] == 1:
            step = self._step(tokens.shape[0])
            if step is not None and step.takes(tokens, state):
                return step.read(tokens, state, inplace)
        return self._by.read(tokens, state, mask, inplace)

    @property
    def recorded(self) -> int:
        """Number of batch sizes that are replayed now."""
        return len(self._steps)

    def _step(self, batch: int) -> Step | None:
        """What reads a token of a batch; None while that is the other reader's task."""
        device = self._model.ln_out.weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (batch, forced_backend(), autocast)
        if key in self._steps:
            self._steps.move_to_end(key)
            return self._steps[key]
        self._seen[key] += 1
        if self._failed or self._seen[key] <= AFTER:
            return None
        if len(self._steps) == KEPT:
            self._steps.popitem(last=False)[1].release()
        try:
            self._steps[key] = Step(self._model, self._by, batch, self._capture)
        except RuntimeError as error:
            self._failed = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"{self._model.name} decodes without a CUDA graph, which is slower: {reason}", stacklevel=3)
            return None
        return self._steps[key]


class Step:
    """Reads one token of each of `batch` sequences, on memory of its own.

    The state that it returned last may be that memory itself ("lent"). Before the memory is needed for anything else,
    the lent state gets a copy: whoever holds it never notices.
    """

    def __init__(self, model: LanguageModel, by: Reader, batch: int, capture: Capture) -> None:
        self._model, self._by = model, by
        self._lent: Callable[[], State | None] = lambda: None
        with torch.inference_mode(False), torch.no_grad():
            self._state = model.init_state(batch).detach().clone()
            self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self._state.device)
            logits, state = by.read(self._tokens, self._state)
            if not _alike(state, self._state):
                raise RuntimeError("its state does not keep its types and sizes")
            self._logits = torch.empty_like(logits)
            self._replay = capture(self._run)

    def _run(self) -> None:
        """What is recorded."""
        logits, state = self._by.read(self._tokens, self._state)
        self._logits.copy_(logits)
        _copy(state, self._state)

    def takes(self, tokens: Tensor, state: State | None) -> bool:
        """Whether `read` may be called with these; all else is for the model to compute, or to refuse."""
        if tokens.device != self._tokens.device or tokens.dtype not in (torch.int64, torch.int32):
            return False
        if state is None or state is self._lent():
            return True
        # Tensors taken out of a lent state would change with it.
        return isinstance(state, State) and _alike(state, self._state) and not _shares(state, self._state)

    @torch.no_grad()
    def read(self, tokens: Tensor, state: State | None, inplace: bool) -> tuple[Tensor, State]:
        """tokens [B, 1] -> logits [B, V] and the state; with `inplace` that is lent."""
        lent = self._lent()
        kept = state if inplace and state is not None and state is lent else None
        if kept is None:
            self.release()
        if state is None or state is not lent:
            _copy(self._model.init_state(len(tokens)) if state is None else state, self._state)
        self._tokens.copy_(tokens)
        self._replay()
        if not inplace:
            return self._logits.clone(), self._state.clone()
        if kept is None:
            kept = State(self._state.model, self._state.layers)
            self._lent = weakref.ref(kept)
        return self._logits.clone(), kept

    def release(self) -> None:
        """Give the lent state, if someone still has it, memory of its own."""
        lent = self._lent()
        self._lent = lambda: None
        if lent is not None:
            with torch.inference_mode(False):
                lent.layers = lent.clone().layers


class Recorder:
    """Records CUDA graphs, which share their working memory: only one of them runs at a time.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        """See `Capture`; `run` is called several times.

        Raises:
            RuntimeError: if `run` waits for the GPU or does anything else that a graph cannot hold.
        """
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles kernels, and lets libraries allocate what they keep
                with refusing_to_wait():  # found out before the recording, which such an error would leave half done
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that load data, may go on meanwhile.
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                run()
        return graph.replay


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Inside the `with` block, reading a value from the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _slots(state: State) -> Iterator[tuple[int, str, Tensor]]:
    return ((index, name, x) for index, layer in enumerate(state.layers) for name, x in layer.items())


def _alike(state: State, other: State) -> bool:
    """Equal in model, slots, shapes, types and device."""
    found, expected = ([(i, n, x.shape, x.dtype, x.device) for i, n, x in _slots(s)] for s in (state, other))
    return state.model == other.model and sorted(found, key=_place) == sorted(expected, key=_place)


def _place(slot: tuple[Any, ...]) -> tuple[Any, ...]:
    return slot[:2]


def _shares(state: State, other: State) -> bool:
    """Whether some tensor of the one lies in the memory of the other."""
    own = {x.untyped_storage().data_ptr() for _, _, x in _slots(other)}
    return any(x.untyped_storage().data_ptr() in own for _, _, x in _slots(state))


def _copy(source: State, target: State) -> None:
    """Values into the target's memory, in one launch per type."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for index, name, x in _slots(target):
        targets, sources = groups.setdefault(x.dtype, ([], []))
        targets.append(x)
        sources.append(source.layers[index][name])
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)
