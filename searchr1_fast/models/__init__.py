"""The decoder, its cache, its tokenizer, and their Hugging Face directories."""

from searchr1_fast.models.decoder import Decoder, DecoderConfig
from searchr1_fast.models.kv_cache import KVCache
from searchr1_fast.models.tokenizer import TextTokenizer, load_tokenizer
from searchr1_fast.models.weights import load_model, resolve, save_model, write_state_dict

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "TextTokenizer",
    "load_model",
    "load_tokenizer",
    "resolve",
    "save_model",
    "write_state_dict",
]
