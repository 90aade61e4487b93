"""How good a model is: bits per byte."""

from wkv.evaluation.bits_per_byte import bits_per_byte, document_nats

__all__ = ["bits_per_byte", "document_nats"]
