"""Tokenise conversations once, and draw training batches in which only the answers count.

python examples/prepare_data.py                        # three small conversations
python examples/prepare_data.py chats.jsonl cache      # your own, one {"messages": [...]} per line
"""

import json
import sys
from pathlib import Path

from wkv.data import PackedDocuments, PaddedDocuments, build_cache, iter_documents, open_cache, write_binidx
from wkv.tokenizers import WorldTokenizer

TALKS = [("What is 2 + 2?", "It is 4."), ("Who wrote Faust?", "Goethe did."), ("Say hello.", "Hello!")]


def main(source: str | None = None, folder: str = "token_cache") -> None:
    """Text to cache, cache to batches, cache to the official trainer's format."""
    if source is None:
        source = "talks.jsonl"
        Path(source).write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in TALKS))

    tokenizer = WorldTokenizer()
    build_cache(
        iter_documents(source), tokenizer, folder, progress=lambda n, tokens: print(f"{n} documents, {tokens} ids")
    )
    store = open_cache(folder, tokenizer)  # mapped: no matter how big it is, it takes no memory

    batch = PaddedDocuments(store, context_length=512, batch_size=2, seed=1).next_batch()
    print("a row reads", repr(tokenizer.decode(batch.inputs[0][batch.mask[0]])))
    print("and learns ", repr(tokenizer.decode(batch.targets[0][batch.loss_mask[0]])))

    batch = PackedDocuments(store, context_length=32, batch_size=1, seed=1).next_batch()
    print(f"packed: {int(batch.reset.sum())} documents begin in a row of 32, {batch.num_targets} targets count")

    write_binidx(folder + "_binidx", (store.document(i) for i in range(len(store))))


if __name__ == "__main__":
    main(*sys.argv[1:])
