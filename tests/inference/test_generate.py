"""`generate`: batches, streams, stops, logprobs and states."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import wkv
from tests import small
from tests.inference.helpers import (
    PieceTokenizer,
    ScriptModel,
    assert_same_state,
    read_all,
    tiny_model,
    was_read,
)
from wkv.inference import Generation, Sampler, generate
from wkv.inference.engine import evaluating, read
from wkv.tokenizers import BPETokenizer, ByteTokenizer, WorldTokenizer

PROMPTS = ["Once upon a time", "x", "1, 2, 3, 4", "Été à Zürich, " * 3]
SAMPLERS = {
    "plain": Sampler(seed=3),
    "greedy": Sampler(temperature=0),
    "filters": Sampler(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95, seed=4),
    "penalties": Sampler(presence_penalty=0.4, frequency_penalty=0.7, penalty_decay=0.9, seed=5),
}


def scripted(text: str | bytes, *pieces: str, prompt: str = "P", eos: bool = False) -> tuple[Any, list[int]]:
    """A model that writes `text` in as few tokens as `pieces` allow; and those tokens."""
    tokenizer = PieceTokenizer(*pieces)
    tokens = tokenizer.encode(text) + [tokenizer.end] * eos
    model = ScriptModel(tokenizer.vocab_size, tokens, len(tokenizer.encode(prompt)))
    model.tokenizer = tokenizer
    return model, tokens


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_gives_what_single_prompts_give(name: str) -> None:
    model, sampler = tiny_model(), SAMPLERS[name]
    together = generate(model, PROMPTS, 25, sampler, logprobs=2)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = generate(model, prompt, 25, sampler, logprobs=2)
        assert found.tokens == alone.tokens
        assert found.text == alone.text
        assert found.prompt_tokens == len(prompt.encode())
        torch.testing.assert_close(found.logprobs, alone.logprobs, atol=1e-5, rtol=0)
        assert alone.state is not None
        assert_same_state(found.state, alone.state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_results_do_not_depend_on_neighbours_or_place(name: str) -> None:
    model, sampler = tiny_model(), SAMPLERS[name]
    forward = generate(model, PROMPTS, 15, sampler)
    backward = generate(model, PROMPTS[::-1], 15, sampler)
    assert [g.tokens for g in forward] == [g.tokens for g in backward[::-1]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_streaming_gives_what_waiting_gives(name: str) -> None:
    model, sampler = tiny_model(), SAMPLERS[name]
    whole = generate(model, PROMPTS[0], 40, sampler)
    stream = generate(model, PROMPTS[0], 40, sampler, stream=True)
    assert "".join(stream) == whole.text == stream.result.text
    assert stream.result.tokens == whole.tokens
    batch = generate(model, PROMPTS, 20, sampler, stream=True)
    texts = [""] * len(PROMPTS)
    for row, piece in batch:
        texts[row] += piece
    assert texts == [g.text for g in batch.result] == [g.text for g in generate(model, PROMPTS, 20, sampler)]


def test_a_result_taken_early_completes_the_stream() -> None:
    stream = generate(tiny_model(), "ab", 30, seed=1, stream=True)
    first = next(stream)
    assert stream.result.text == first + "".join(stream) == generate(tiny_model(), "ab", 30, seed=1).text


def test_long_ragged_prompts_are_read_in_segments() -> None:
    model = tiny_model()
    prompts = [[(7 * i) % 256 for i in range(n)] for n in (50, 1, 23)]
    logits, state = read(model, prompts, None, segment=8)
    for row, ids in enumerate(prompts):
        expected, expected_state = read_all(model, ids)
        torch.testing.assert_close(logits[row].log_softmax(-1), expected[-1], atol=1e-5, rtol=0)
        assert_same_state(state.select(row), expected_state)


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(temperature=0.5, top_k=20, presence_penalty=1.0, seed=2)
    made = generate(tiny_model(), "Hello", 12, sampler, logprobs=3)
    log_p, state = read_all(tiny_model(), [*b"Hello", *made.tokens])
    for n, token in enumerate(made.tokens):
        expected = log_p[4 + n]
        assert made.logprobs[n] == pytest.approx(expected[token].item(), abs=1e-5)
        ids = [token for token, _ in made.top_logprobs[n]]
        assert ids == expected.topk(3).indices.tolist()
        assert [value for _, value in made.top_logprobs[n]] == pytest.approx(expected[ids].tolist(), abs=1e-5)
    assert_same_state(made.state, state)


def test_greedy_takes_the_likeliest_and_logprobs_may_exceed_the_vocabulary() -> None:
    made = generate(tiny_model(), "Hello", 5, Sampler(temperature=0), logprobs=1000)
    assert [top[0][0] for top in made.top_logprobs] == made.tokens
    assert len(made.top_logprobs[0]) == 256
    assert generate(tiny_model(), "Hello", 5).top_logprobs == []


def test_seeds() -> None:
    def sample(**options: Any) -> list[int]:
        return generate(tiny_model(), "seed", 12, **options).tokens

    assert (
        sample(seed=1) == sample(seed=1) == sample(sampler=Sampler(seed=1)) == sample(sampler=Sampler(seed=2), seed=1)
    )
    assert sample(seed=1) != sample(seed=2)
    several = generate(tiny_model(), ["seed"] * 3, 12, seed=1)
    assert several[0].tokens == sample(seed=1)
    assert len({tuple(g.tokens) for g in several}) == 3


@pytest.mark.parametrize("name", ["plain", "penalties"])
def test_a_carried_state_is_a_longer_prompt(name: str) -> None:
    model = tiny_model()
    first = generate(model, "The beginning", 0)
    whole = generate(model, list(b"The beginning and the end"), 10, Sampler(temperature=0))
    rest = generate(model, " and the end", 10, Sampler(temperature=0), first.state)
    assert rest.tokens == whole.tokens
    assert whole.state is not None
    assert_same_state(rest.state, whole.state)
    states = [generate(model, text, 0).state for text in ("The beginning", "Another")]
    both = generate(model, [" and", " a"], 8, SAMPLERS[name], wkv.State.stack([s for s in states if s is not None]))
    for state, prompt, found in zip(states, (" and", " a"), both, strict=True):
        assert found.tokens == generate(model, prompt, 8, SAMPLERS[name], state).tokens


def test_no_tokens_only_reads() -> None:
    made = generate(tiny_model(), "read me", 0)
    assert (made.text, made.tokens, made.finish_reason, made.prompt_tokens) == ("", [], "length", 7)
    assert_same_state(made.state, read_all(tiny_model(), b"read me")[1])
    assert list(generate(tiny_model(), "read me", 0, stream=True)) == []
    assert generate(tiny_model(), ["a", "b"], 0, return_state=False)[1].state is None


def test_without_state_the_last_token_is_not_read() -> None:
    model, tokens = scripted("abcdef")
    made = generate(model, "P", 3, return_state=False)
    assert (made.text, made.state, len(model.calls)) == ("abc", None, 3)
    model, tokens = scripted("abcdef")
    made = generate(model, "P", 3)
    assert was_read(made.state) == [ord("P"), *tokens[:3]]


@pytest.mark.parametrize(
    "pieces", [(), ("d.\n",), ("d.\n\nUs", "er:"), ("\n\nUser:",), ("\n\n", "User", ": "), ("d.", "\n\nU")]
)
def test_stop_strings_across_tokens(pieces: tuple[str, ...]) -> None:
    model, tokens = scripted("The end.\n\nUser: more", *pieces)
    stream = generate(model, "P", 100, stop=["\n\nUser:", "never"], stream=True)
    shown = "".join(stream)
    made: Generation = stream.result
    assert shown == made.text == str(made) == "The end."
    assert made.finish_reason == "stop"
    assert made.tokens == tokens[: len(made.tokens)]
    covered = model.tokenizer.decode_bytes(made.tokens)
    assert covered + made.remainder == b"The end."
    assert was_read(made.state) == [ord("P"), *made.tokens]
    assert len(made.logprobs) == len(made.tokens)
    next_piece = model.tokenizer.decode_bytes([tokens[len(made.tokens)]])
    assert len(covered + next_piece) > len("The end."), "every token before the stop string is kept"


def test_what_only_looks_like_a_stop_string_is_kept() -> None:
    text = "a\n\nUse it\n\nUs"
    model, tokens = scripted(text, "\n\n", "Us")
    made = generate(model, "P", len(tokens), stop="\n\nUser:")
    assert (made.text, made.finish_reason, made.tokens) == (text, "length", tokens)
    assert was_read(made.state) == [ord("P"), *tokens]


def test_held_back_text_appears_when_a_stop_id_ends_it() -> None:
    model, tokens = scripted("a\n\nUs", eos=True)
    made = generate(model, "P", stop="\n\nUser:")
    assert (made.text, made.finish_reason, made.tokens) == ("a\n\nUs", "eos", tokens[:-1])
    assert was_read(made.state) == [ord("P"), *tokens[:-1]]


def test_stop_ids() -> None:
    model, tokens = scripted("abc", eos=True)
    made = generate(model, "P")
    assert (made.text, made.finish_reason, made.tokens) == ("abc", "eos", tokens[:3])
    assert was_read(made.state) == [ord("P"), *tokens[:3]]
    made = generate(model, "P", stop_ids=[ord("b")])
    assert (made.text, made.finish_reason, made.tokens) == ("a", "stop", tokens[:1])
    made = generate(model, "P", 6, stop_ids=())
    assert (made.finish_reason, made.tokens[:4]) == ("length", tokens)


def test_rows_end_at_their_own_time_and_leave_the_batch() -> None:
    tokenizer = PieceTokenizer()
    scripts = {ord("1"): [*b"a", 256], ord("2"): [*b"abcdefghij"], ord("3"): [*b"ab.c"]}
    model: Any = ScriptModel(257, scripts, 1)
    made = generate(model, ["1", "2", "3"], 6, stop=".", tokenizer=tokenizer)
    assert [(g.text, g.finish_reason) for g in made] == [("a", "eos"), ("abcdef", "length"), ("ab", "stop")]
    assert [was_read(g.state) for g in made] == [[*b"1a"], [*b"2abcdef"], [*b"3ab"]]
    assert [batch for batch, _ in model.calls] == [3, 3, 2, 1, 1, 1, 1]


def test_streams_never_show_half_a_character() -> None:
    text = "né 漢字 🙂!"
    model, tokens = scripted(text)
    pieces = list(generate(model, "P", len(tokens), stream=True))
    assert pieces == list(text)
    model, tokens = scripted(text)
    made = generate(model, "P", 2)
    assert (made.text, made.tokens) == ("n\ufffd", tokens[:2])


def test_tokens_that_stand_for_nothing_are_never_sampled() -> None:
    tokenizer = WorldTokenizer()
    eos_then_padding: Any = ScriptModel(65536, [65531, 65535, 0], 1)
    made = generate(eos_then_padding, [11], 3, tokenizer=tokenizer, stop_ids=())
    assert all(token < 65530 for token in made.tokens)
    assert made.tokens[2] == 0
    wide: Any = ScriptModel(300, [299, 298], 1)
    made = generate(wide, "P", 2, Sampler(temperature=0), tokenizer=ByteTokenizer())
    assert max(made.tokens) < 256
    asked_for = generate(wide, "P", 2, Sampler(temperature=0), tokenizer=ByteTokenizer(), stop_ids=[299])
    assert (asked_for.tokens, asked_for.finish_reason) == ([], "stop")


def test_an_empty_prompt_starts_a_document() -> None:
    model, _ = scripted("abc", eos=True)
    empties: list[Any] = ["", b"", []]
    for empty in empties:
        made = generate(model, empty)
        assert (made.text, made.prompt_tokens) == ("abc", 1)
        assert was_read(made.state)[0] == model.tokenizer.eos_id


def test_prompts_as_text_bytes_ids_and_tensors_are_the_same() -> None:
    prompts: Any = ("hé", "hé".encode(), list("hé".encode()), torch.tensor(list("hé".encode())))
    assert len({generate(tiny_model(), prompt, 8, seed=0).text for prompt in prompts}) == 1
    mixed: Any = generate(tiny_model(), torch.tensor([[1, 2], [3, 4]]), 4, seed=0)
    assert [g.tokens for g in mixed] == [generate(tiny_model(), ids, 4, seed=0).tokens for ids in ([1, 2], [3, 4])]


def test_a_tuned_state_is_the_start_unless_a_state_is_given() -> None:
    model = tiny_model()
    tuned = generate(model, "prefix that was tuned in", 0).state
    expected = generate(model, " go", 6, Sampler(temperature=0), tuned)
    plain = generate(model, " go", 6, Sampler(temperature=0), model.init_state(1))
    model.tuned_state = tuned
    try:
        assert generate(model, " go", 6, Sampler(temperature=0)).logprobs == expected.logprobs
        batch = generate(model, [" go", " stop it"], 6, Sampler(temperature=0))
        assert batch[0].tokens == expected.tokens
        assert generate(model, " go", 6, Sampler(temperature=0), model.init_state(1)).logprobs == plain.logprobs
    finally:
        model.tuned_state = None


def test_the_models_mode_and_the_callers_gradients_are_untouched() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):  # type: ignore[arg-type]
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
    tiny = tiny_model().train()
    for _ in generate(tiny, "ab", 3, stream=True):
        assert tiny.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    state = generate(tiny, "ab", 3).state
    tiny(torch.tensor([[1, 2]]), state).logits.sum().backward()
    tiny.zero_grad()


@functools.cache
def half_model() -> Any:
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=2, head_size=16)
    return model.to(torch.bfloat16)


def test_half_precision_generates_and_carries_states() -> None:
    first = generate(half_model(), "abc", 5, seed=0)
    again = generate(half_model(), "d", 5, state=first.state, seed=0)
    assert len(again.tokens) == 5
    assert all(value <= 0 for value in again.logprobs)


@pytest.mark.parametrize("name", wkv.list_models())
def test_every_model_generates_in_batches(name: str) -> None:
    model = wkv.create_model(name, vocab_size=256, hidden_size=32, num_layers=2, **small.options(name, 16))
    together = generate(model, ["a longer prompt", "b"], 6, seed=0)
    assert [g.tokens for g in together] == [generate(model, p, 6, seed=0).tokens for p in ("a longer prompt", "b")]


def test_a_trained_vocabulary() -> None:
    tokenizer = BPETokenizer.train(["the cat sat on the mat. the end.\n\nUser: the cat é漢\n" * 5], 300)
    model = wkv.create_model("rwkv7", vocab_size=320, hidden_size=32, num_layers=1, head_size=16)
    model.tokenizer = tokenizer
    stream = generate(model, ["the cat", ""], 60, stream=True, seed=1, stop=" t", stop_ids=())
    texts = ["", ""]
    for row, piece in stream:
        texts[row] += piece
    for text, made in zip(texts, stream.result, strict=True):
        assert made.text == text == (tokenizer.decode_bytes(made.tokens) + made.remainder).decode("utf-8", "replace")
        assert " t" not in text
        assert max(made.tokens) < tokenizer.vocab_size
