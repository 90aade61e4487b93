"""Continue training a checkpoint on questions and answers, of which the answers are learnt.

python examples/continue_training.py model.safetensors chats.jsonl [run folder] [key=value ...]

Every line of chats.jsonl is {"prompt": "...", "response": "..."} or {"messages": [...]}. For an official .pth file add
data.tokenizer=world.
"""

import sys

import wkv
from wkv.training import estimate, load_recipe, train


def main(checkpoint: str, chats: str, out: str = "runs/continued", *changes: str) -> None:
    """Look before the leap, train, ask."""
    recipe = load_recipe("continue", [f"train.start_from='{checkpoint}'", f"data.source='{chats}'", *changes])
    found = estimate(recipe)
    print(f"{found.steps} steps of {found.step_seconds:.2f} s, at least {found.memory / 1e6:,.0f} MB")
    result = train(recipe, out)
    model = wkv.load_model(f"{result.out}/best.safetensors")
    print(wkv.generate(model, "User: What is 2 + 2?\n\nAssistant:", max_tokens=20, seed=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
