"""A conversation whose memory is a state of constant size.

python examples/chat_with_model.py               # a new, untrained model: it answers noise
python examples/chat_with_model.py model.pth     # a World or G1 checkpoint
"""

import sys
import tempfile
from pathlib import Path

import wkv
from wkv.inference import Chat, Sampler


def main(checkpoint: str | None = None) -> None:
    """Ask, save the conversation, ask on, go back to the saved place."""
    if checkpoint:
        model = wkv.load_model(checkpoint)
    else:
        model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)

    chat = Chat(model, system="You are a helpful assistant.", sampler=Sampler(top_p=0.85, seed=1), max_tokens=60)
    for piece in chat.send("Name a colour.", stream=True):
        print(piece, end="", flush=True)
    print()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "conversation.safetensors")
        chat.save(path)
        print("saved,", path.stat().st_size, "bytes")
        first = chat.send("Another one?")
        chat.load(path)
        again = chat.send("Another one?")
    print(first)
    print("the same from the saved state:", first.text == again.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
