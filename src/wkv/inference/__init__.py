"""Text from models: `generate`, `Sampler`, and conversations (`Chat`)."""

from wkv.inference.chat import Chat, Reply
from wkv.inference.engine import Generation
from wkv.inference.generate import GenerationStream, generate
from wkv.inference.sampler import Sampler

__all__ = ["Chat", "Generation", "GenerationStream", "Reply", "Sampler", "generate"]
