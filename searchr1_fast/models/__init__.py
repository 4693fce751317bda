"""The decoder, its cache, its tokenizer, and their Hugging Face directories."""

from searchr1_fast.models.adapter_files import save_adapter
from searchr1_fast.models.attention_backends import describe_attention
from searchr1_fast.models.decoder import Decoder
from searchr1_fast.models.decoder_config import DecoderConfig, Llama3Scaling
from searchr1_fast.models.export import save_model, save_weights
from searchr1_fast.models.kv_cache import KVCache
from searchr1_fast.models.tokenizer import TextTokenizer, load_tokenizer
from searchr1_fast.models.weights import load_model, load_weights, meta_model, read_config, resolve

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Llama3Scaling",
    "TextTokenizer",
    "describe_attention",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "meta_model",
    "read_config",
    "resolve",
    "save_adapter",
    "save_model",
    "save_weights",
]
