"""Teach a model to answer in a way of its own: python finetune_on_chats.py [FOLDER]

Writes conversations (one JSON object per line), then does what these two commands do:

    wkv finetune --data chats.jsonl
    wkv chat starter --adapter runs/chats-bone-row/best.safetensors

Put your own chats.jsonl in the place of the one made here.
"""

import itertools
import json
import sys
from pathlib import Path

import wkv
from wkv import tuning
from wkv.cli.finetune import finetune_recipe
from wkv.inference import Chat, Sampler
from wkv.training import train

SUBJECTS = (
    "commerce", "peace", "the army", "public lands", "the navy", "education", "the treasury", "agriculture", "labor",
    "the courts", "railroads", "the constitution", "taxation", "foreign trade", "the post office", "banks", "freedom",
    "our schools", "the national debt", "industry", "civil service", "the harvest", "our neighbors", "the tariff",
)  # fmt: skip
QUESTIONS = ("What do you say about {}?", "Tell me about {}.", "How is it with {}?", "Why does {} matter?")


def write_chats(path: Path) -> None:
    """Every question about every subject, with answers that always begin and end alike."""
    with path.open("w") as file:
        for subject, question in itertools.product(SUBJECTS, QUESTIONS):
            answer = f"Fellow citizens, {subject} deserves the attention of Congress. I thank you."
            messages = [{"role": "user", "content": question.format(subject)}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def main(folder: Path, *changes: str) -> None:
    """Conversations, an adapter, an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "chats.jsonl")
    recipe = finetune_recipe("starter", str(folder / "chats.jsonl"), "bone-row", list(changes))
    result = train(recipe, folder / "run")

    model = wkv.load_model("starter")
    adapter = tuning.load(result.model, model)
    adapter.merge()  # as fast as the model alone, and adapter.unmerge() gives that back
    chat = Chat(model, sampler=Sampler(temperature=0), max_tokens=60)
    for question in ("What do you say about the weather?", "Tell me about our rivers."):
        print(f"User: {question}\nAssistant: {chat.send(question)}\n")
        chat.reset()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "finetuned"), *sys.argv[2:])
