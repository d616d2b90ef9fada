"""Finding passages.

PassageStore   the passages by row number             passages.py
encode_corpus  texts to vectors, once, kept on disk   encode.py
ExactIndex     exact inner-product search (FAISS)     faiss_index.py
"""

from ragjax.retrieval.encode import EncodedCorpus, default_cache_dir, encode_corpus
from ragjax.retrieval.faiss_index import ExactIndex
from ragjax.retrieval.passages import PassageStore, hash_texts

__all__ = ["EncodedCorpus", "ExactIndex", "PassageStore", "default_cache_dir", "encode_corpus", "hash_texts"]
