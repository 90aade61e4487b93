"""Decoding through recorded steps. Without a GPU the recording is the function itself, run on the same fixed memory."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import wkv
from tests.inference.helpers import assert_same_state, tiny_model
from tests.small import options
from wkv.inference import graphs
from wkv.inference.graphs import AFTER, KEPT, GraphReader, Recorder, Run, grows, refusing_to_wait, unfit
from wkv.inference.reading import ModelReader, reader
from wkv.layers.language_model import LanguageModel
from wkv.ops import use_backend
from wkv.state import State

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Capture:
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


class Counting(ModelReader):
    """Counts what the model reads itself, recorded steps aside."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self.lengths: list[int] = []

    def read(self, tokens: Tensor, *others: object, **options: object) -> tuple[Tensor, State]:
        self.lengths.append(tokens.shape[1])
        return super().read(tokens, *others, **options)  # type: ignore[arg-type]


def ready(batch: int, model: LanguageModel | None = None) -> tuple[GraphReader, Capture]:
    """A reader that has seen enough tokens of this batch size to replay the next one."""
    model, capture = model or tiny_model(), Capture()
    read = GraphReader(model, ModelReader(model), capture)
    for _ in range(AFTER):
        read.read(torch.zeros(batch, 1, dtype=torch.int64))
    assert capture.recorded == 0
    return read, capture


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


def fixed_models() -> list[str]:
    names = []
    for name in wkv.list_models():
        with torch.device("meta"):
            model = wkv.create_model(name, vocab_size=8, hidden_size=32, num_layers=4, **options(name, 16))
        if not grows(model.init_state(1)):
            names.append(name)
    return names


@pytest.mark.parametrize("name", fixed_models())
@pytest.mark.parametrize(("inplace", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=str)
@torch.no_grad()
def test_equals_the_model(name: str, inplace: bool, dtype: torch.dtype) -> None:
    """A prompt, then token by token, with every kind of state."""
    torch.manual_seed(0)
    model = wkv.create_model(name, vocab_size=256, hidden_size=32, num_layers=4, **options(name, 16)).eval().to(dtype)
    read, capture = ready(2, model)
    plain = ModelReader(model)
    _, state = read.read(tokens(2, 5))
    _, expected_state = plain.read(tokens(2, 5))
    for place in range(4):
        fed = tokens(2, 1, place)
        logits, state = read.read(fed, state, inplace=inplace)
        expected, expected_state = plain.read(fed, expected_state)
        assert torch.equal(logits, expected)
        assert_same_state(state, expected_state, 0)
    assert (capture.recorded, capture.replayed) == (1, 4)


@pytest.mark.parametrize("name", fixed_models())
@torch.no_grad()
def test_a_token_needs_nothing_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values stand in for those of a GPU: reading a number, or mixing in a CPU tensor, raises."""
    with torch.device("meta"):
        model = wkv.create_model(name, vocab_size=256, hidden_size=32, num_layers=4, **options(name, 16)).eval()
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # knows no such device
    with use_backend("reference"):
        logits, _ = model(torch.zeros(2, 1, dtype=torch.int64, device="meta"), model.init_state(2))
    assert logits.shape == (2, 1, 256)


def test_the_model_reads_prompts_masks_and_the_first_tokens() -> None:
    model, capture = tiny_model(), Capture()
    by = Counting(model)
    read = GraphReader(model, by, capture)
    for _ in range(AFTER):
        read.read(tokens(2, 1))
    read.read(tokens(2, 3))
    read.read(tokens(2, 1), mask=torch.tensor([[True], [False]]))
    assert by.lengths == [1] * AFTER + [3, 1]
    assert capture.recorded == 0
    read.read(tokens(2, 1))
    assert (capture.recorded, capture.replayed) == (1, 1)


def test_states_are_values() -> None:
    """Whatever was returned stays as it is, unless it is given to a call in place."""
    read, _ = ready(1)
    plain = ModelReader(tiny_model())
    _, start = plain.read(tokens(1, 5))
    kept = start.clone()
    _, first = read.read(tokens(1, 1), start, inplace=True)
    assert_same_state(start, kept, 0)
    kept = first.clone()
    _, second = read.read(tokens(1, 1, 2), first)  # goes on from the lent state, and leaves it alone
    assert_same_state(first, kept, 0)
    assert_same_state(second, plain.read(tokens(1, 1, 2), kept)[1], 0)
    _, third = read.read(tokens(1, 1, 3), second, inplace=True)
    after = third.clone()
    read.read(tokens(1, 1, 4))  # another sequence
    assert_same_state(third, after, 0)
    _, fourth = read.read(tokens(1, 1, 5), third, inplace=True)
    assert_same_state(fourth, plain.read(tokens(1, 1, 5), after)[1], 0)
    after = fourth.clone()
    _, same = read.read(tokens(1, 1, 6), fourth, inplace=True)
    assert same is fourth
    assert_same_state(same, plain.read(tokens(1, 1, 6), after)[1], 0)


def test_logits_are_values() -> None:
    read, _ = ready(1)
    logits, state = read.read(tokens(1, 1), inplace=True)
    kept = logits.clone()
    read.read(tokens(1, 1, 1), state, inplace=True)
    assert torch.equal(logits, kept)


def test_changes_of_a_lent_state_count() -> None:
    read, _ = ready(1)
    _, state = read.read(tokens(1, 1), inplace=True)
    state.layers[0]["wkv"].zero_()
    expected, _ = ModelReader(tiny_model()).read(tokens(1, 1, 1), state.clone())
    assert torch.equal(read.read(tokens(1, 1, 1), state, inplace=True)[0], expected)


def test_tensors_taken_out_of_a_lent_state_are_left_alone() -> None:
    read, capture = ready(1)
    _, state = read.read(tokens(1, 1), inplace=True)
    view = state.detach()
    kept, replayed = view.clone(), capture.replayed
    _, other = read.read(tokens(1, 1, 1), view)
    assert_same_state(view, kept, 0)
    assert_same_state(other, ModelReader(tiny_model()).read(tokens(1, 1, 1), kept)[1], 0)
    assert capture.replayed == replayed


def test_a_lent_state_does_not_keep_the_reader_busy() -> None:
    read, _ = ready(1)
    _, state = read.read(tokens(1, 1), inplace=True)
    gone = weakref.ref(state)
    del state
    gc.collect()
    assert gone() is None
    read.read(tokens(1, 1))


def test_inference_mode_may_come_and_go() -> None:
    model, capture = tiny_model(), Capture()
    read = GraphReader(model, ModelReader(model), capture)
    state: State | None = None
    with torch.inference_mode():
        for _ in range(AFTER + 1):
            _, state = read.read(tokens(1, 1), state, inplace=True)
    logits, state = read.read(tokens(1, 1), state, inplace=True)
    assert not logits.requires_grad
    with torch.inference_mode():
        read.read(tokens(1, 1), state)
    assert capture.replayed == 3


def test_batch_sizes_have_graphs_of_their_own_and_only_some_are_kept() -> None:
    model, capture = tiny_model(), Capture()
    read = GraphReader(model, ModelReader(model), capture)
    _, state = read.read(tokens(KEPT + 1, 3))
    for batch in range(KEPT + 1, 0, -1):
        state = state.select(range(batch))
        for place in range(AFTER + 2):
            fed = tokens(batch, 1, place)
            expected, _ = ModelReader(model).read(fed, state.clone())
            logits, state = read.read(fed, state, inplace=True)
            assert torch.equal(logits, expected)
    assert capture.recorded == KEPT + 1
    assert read.recorded == KEPT


def test_another_backend_is_another_recording() -> None:
    read, capture = ready(1)
    read.read(tokens(1, 1))
    with use_backend("reference"):
        for _ in range(AFTER + 1):
            read.read(tokens(1, 1))
    assert capture.recorded == 2


def test_a_failure_is_said_once_and_the_model_reads_on() -> None:
    model = tiny_model()

    def fail(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    read = GraphReader(model, ModelReader(model), fail)
    for _ in range(AFTER):
        read.read(tokens(1, 1))
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*not permitted when stream is capturing$"):
        logits, _ = read.read(tokens(1, 1))
    assert torch.equal(logits, ModelReader(model).read(tokens(1, 1))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (1, 2):
            for _ in range(AFTER + 2):
                read.read(tokens(batch, 1))


def test_unusual_arguments_are_the_models_to_take_or_refuse() -> None:
    read, capture = ready(1)
    read.read(tokens(1, 1))
    _, state = ModelReader(tiny_model()).read(tokens(1, 3))
    wide = state.to(dtype=torch.float64)
    _, found = read.read(tokens(1, 1), wide)
    assert found.layers[0]["wkv"].dtype == torch.float64
    with pytest.raises(wkv.WkvError, match="2 sequences"):
        read.read(tokens(1, 1), State.stack([state, state]))
    with pytest.raises(wkv.WkvError, match="int64"):
        read.read(torch.zeros(1, 1))
    with pytest.raises(wkv.WkvError, match="non-empty"):
        read.read(torch.zeros(3, dtype=torch.int64))
    assert capture.replayed == 1


def test_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on cpu" in str(unfit(tiny_model()))
    growing = wkv.create_model("transformer", vocab_size=8, hidden_size=32, num_layers=1, head_size=16)
    assert grows(growing.init_state(1))
    other = wkv.create_model("rwkv6", vocab_size=8, hidden_size=64, num_layers=1)
    assert type(reader(other)) is ModelReader
    monkeypatch.setattr(graphs, "unfit", lambda model: None)  # as on a GPU
    assert isinstance(reader(other), GraphReader)


def test_the_engine_through_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that finish, stop strings and kept states: the same texts and states as without."""
    from wkv.inference import engine

    model, captures = tiny_model(), []

    def recorded(model: LanguageModel) -> GraphReader:
        captures.append(Capture())
        return GraphReader(model, ModelReader(model), captures[-1])

    prompts = [list(b"one"), list(b"another"), list(b"third")]
    for stop in ((), ("e", "a")):
        found = []
        for make in (ModelReader, recorded):
            monkeypatch.setattr(engine, "reader", make)
            found.append(wkv.generate(model, prompts, max_tokens=30, seed=1, stop=stop, tokenizer="bytes"))
        for plain, replayed in zip(*found, strict=True):
            assert plain.tokens == replayed.tokens
            assert_same_state(replayed.state, plain.state, 0)
    assert all(capture.replayed > 0 for capture in captures)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=128, num_layers=3, head_size=64).to("cuda", dtype)
    read, plain = reader(model), ModelReader(model)
    assert isinstance(read, GraphReader)
    with torch.no_grad():
        _, state = plain.read(tokens(2, 5).cuda())
        expected_state = state.clone()
        for place in range(AFTER + 8):
            fed = tokens(2, 1, place).cuda()
            logits, state = read.read(fed, state, inplace=True)
            expected, expected_state = plain.read(fed, expected_state)
            assert torch.equal(logits, expected)
            assert_same_state(state, expected_state, 0)


@needs_gpu
def test_waiting_for_the_gpu_is_found_out() -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError), refusing_to_wait():
        x.item()
    with pytest.raises(RuntimeError):
        Recorder(x.device)(lambda: print(x.item()))
    y = torch.zeros(1, device="cuda")
    replay = Recorder(x.device)(lambda: y.add_(x) and None)  # type: ignore[func-returns-value]
    before = float(y)
    replay()
    assert float(y) == before + 1
