"""Finding passages.

PassageStore   the passages by row number             passages.py
encode_corpus  texts to vectors, once, kept on disk   encode.py
ExactIndex     exact inner-product search (FAISS)     faiss_index.py
"""

from ragjax.retrieval.encode import EncodedCorpus, encode_corpus
from ragjax.retrieval.faiss_index import ExactIndex
from ragjax.retrieval.passages import PassageStore, hash_texts

__all__ = ["EncodedCorpus", "ExactIndex", "PassageStore", "encode_corpus", "hash_texts"]
