"""What a run starts from: a new model, a checkpoint to continue, or its own last checkpoint; and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from wkv.data import Document, TokenStore, tokenizer_fingerprint
from wkv.errors import RecipeError
from wkv.layers.language_model import LanguageModel
from wkv.tokenizers import Tokenizer
from wkv.training.checkpoint import ADAPTER, MODEL
from wkv.training.sections import Recipe
from wkv.training.source import create_sampler

GRADIENT_BATCHES = 4  # from which LoRA-GA estimates the gradient


def given_model(recipe: Recipe, checkpoint: Path | None) -> LanguageModel | None:
    """The model of the run's last checkpoint, or of `train.start_from`; None if a new one is to be made.

    Raises:
        WkvError: if it cannot be loaded, or not be trained.
    """
    from wkv import load_model
    from wkv.quantization import is_quantized
    from wkv.quantization.blockwise import BLOCK_KINDS
    from wkv.quantization.frozen import freeze_base

    if checkpoint is not None and not recipe.tuning.active:
        return load_model(checkpoint / MODEL)
    source, tuning = recipe.train.start_from, recipe.tuning
    if source is None:
        return None
    model = load_model(source, dtype=torch.bfloat16 if tuning.base == "bfloat16" else torch.float32)
    if is_quantized(model) and not tuning.active:
        raise RecipeError(
            f"train.start_from: {source} is quantised and cannot learn; give the original checkpoint, or train an "
            "adapter with tuning.method"
        )
    if tuning.base in BLOCK_KINDS:
        model = freeze_base(model, tuning.base)  # type: ignore[arg-type]
    if model.tuned_state is not None:
        raise RecipeError(
            f"train.start_from: {source} has a tuned initial state, and training starts from an empty one; set "
            "model.tuned_state to None and save it first"
        )
    return model


def mount_adapter(recipe: Recipe, model: LanguageModel, checkpoint: Path | None, store: TokenStore) -> None:
    """Mount what the recipe trains: the adapter of the last checkpoint, that of `tuning.adapter`, or a new one.

    Args:
        store: the training tokens, from which methods that start from gradients take some.

    Raises:
        WkvError: if the method or a file does not fit the model.
    """
    from wkv import tuning

    plan = recipe.tuning
    if checkpoint is not None:
        tuning.load(checkpoint / ADAPTER, model, "default")
    elif plan.adapter is not None:
        tuning.load(plan.adapter, model, "default")
    else:
        assert plan.method is not None
        torch.manual_seed(recipe.train.seed)
        options = plan.options()
        if tuning.canonical(plan.method) == "lora-ga":
            sampler = create_sampler(store, recipe.data, recipe.train)
            options["batches"] = [sampler.next_batch() for _ in range(GRADIENT_BATCHES)]
        tuning.create(plan.method, model, "default", **options)


def choose_tokenizer(
    recipe: Recipe, folder: Path, model: LanguageModel | None, documents: Iterable[Document] | None
) -> Tokenizer:
    """The tokenizer a recipe asks for.

    Args:
        recipe: its `data.tokenizer`; "bpe" is that of the run in `folder`, or is trained on `documents`.
        folder: the run folder.
        model: what the run starts from, if there is something.
        documents: the training text; None if there are only tokens.

    Raises:
        WkvError: if it is unknown, or contradicts that of `train.start_from`.
    """
    from wkv import tokenizers

    name, start = recipe.data.tokenizer, recipe.train.start_from
    own: Tokenizer | None = None if model is None else model.tokenizer
    if start is None:
        return _trained(recipe, folder, documents) if name == "bpe" else tokenizers.load(name or "bytes")
    tokenizer = own if name is None else tokenizers.load(name)
    if tokenizer is None:
        raise RecipeError(f"train.start_from: {start} carries no tokenizer; give data.tokenizer, such as world")
    if own is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise RecipeError(f"data.tokenizer: {start} was trained with another tokenizer, {own!r}; leave the key out")
    return tokenizer


def _trained(recipe: Recipe, folder: Path, documents: Iterable[Document] | None) -> Tokenizer:
    """The "bpe" vocabulary of the run, kept or new."""
    from wkv import tokenizers

    kept = folder / "tokenizer.json"
    if kept.is_file():
        return tokenizers.load(kept)
    if documents is None:
        raise RecipeError(
            f'data.tokenizer: "bpe" is trained on text, and {recipe.data.source} holds tokens; name the tokenizer that '
            "made them"
        )
    assert recipe.data.vocab_size is not None
    return tokenizers.BPETokenizer.train((document.text for document in documents), recipe.data.vocab_size)


def complete_model(recipe: Recipe, model: LanguageModel | None, tokenizer: Tokenizer) -> LanguageModel:
    """The given model, or a new one with a seed, with its tokenizer.

    Raises:
        RecipeError: if its vocabulary is too small for the tokenizer.
    """
    if model is None:
        model = _new_model(recipe, tokenizer)
    if model.config.vocab_size < tokenizer.vocab_size:
        found = f"{model.config.vocab_size}, the tokenizer has {tokenizer.vocab_size} entries"
        hint = "leave model.vocab_size out" if recipe.train.start_from is None else "give another data.tokenizer"
        raise RecipeError(f"model.vocab_size is {found}; {hint}")
    model.tokenizer = tokenizer
    return model.train()


def _new_model(recipe: Recipe, tokenizer: Tokenizer) -> LanguageModel:
    from wkv import create_model

    sizes = dict(recipe.model.sizes)
    if recipe.model.preset is None:
        sizes.setdefault("vocab_size", tokenizer.vocab_size)
    torch.manual_seed(recipe.train.seed)
    return create_model(recipe.model.name, recipe.model.preset, **sizes)
