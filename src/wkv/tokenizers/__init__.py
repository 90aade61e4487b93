"""Text to ids and back: the World vocabulary of the released models, plain bytes, and small trained byte-level BPE.

Nothing here imports torch. All errors are `wkv.errors.TokenizerError`.
"""

from wkv.tokenizers.base import StreamDecoder, TableTokenizer, Tokenizer
from wkv.tokenizers.bpe import BPETokenizer
from wkv.tokenizers.byte import ByteTokenizer
from wkv.tokenizers.loading import available, from_dict, load
from wkv.tokenizers.world import WorldTokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "StreamDecoder",
    "TableTokenizer",
    "Tokenizer",
    "WorldTokenizer",
    "available",
    "from_dict",
    "load",
]
