"""Finding passages.

encode_corpus                 passages to vectors, once, kept on disk                      encode.py
VectorStore, ArrayVectors     stored vectors by row number; of an array or a memory map    vectors.py
Retriever, Retrieval          questions to passages and their scores                       retriever.py
Index, Queries, Proposal      what an index is, is asked and answers                       retriever.py
ExactIndex                    exact inner-product search (FAISS)                           faiss_index.py
DeviceIndex                   the same on the accelerator, in 32, 16 or 8 bits             device_index.py
"""

from ragjax.retrieval.device_index import DeviceIndex
from ragjax.retrieval.encode import EncodedCorpus, encode_corpus
from ragjax.retrieval.faiss_index import ExactIndex
from ragjax.retrieval.retriever import Index, Proposal, Queries, Retrieval, Retriever
from ragjax.retrieval.vectors import ArrayVectors, VectorStore

__all__ = [
    "ArrayVectors",
    "DeviceIndex",
    "EncodedCorpus",
    "ExactIndex",
    "Index",
    "Proposal",
    "Queries",
    "Retrieval",
    "Retriever",
    "VectorStore",
    "encode_corpus",
]
