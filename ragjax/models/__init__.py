"""The networks: tokens -> hidden states. They do no I/O. (Layers, attention and quantised kernels are theirs alone.)

Decoder                      LLaMA, Mistral, Qwen2 and Qwen3                  decoder.py
DecoderConfig                its shape, read from a config.json               decoder_config.py
Bert, BertConfig             MiniLM and others                                bert.py
MPNet, MPNetConfig                                                            mpnet.py
EncoderConfig,
sentence_vectors             what the encoders share; tokens -> unit vectors  encoders.py
LoraConfig                   low-rank adapters                                lora.py
matmul, float32_matmul       products at one precision on every device        products.py
"""

from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.encoders import EncoderConfig, sentence_vectors
from ragjax.models.lora import LoraConfig
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.models.products import float32_matmul, matmul

__all__ = [
    "Bert",
    "BertConfig",
    "Decoder",
    "DecoderConfig",
    "EncoderConfig",
    "LoraConfig",
    "MPNet",
    "MPNetConfig",
    "float32_matmul",
    "matmul",
    "sentence_vectors",
]
