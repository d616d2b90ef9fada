"""Finding passages.

encode_corpus                 passages to vectors, once, kept on disk                      encode.py
VectorStore, ArrayVectors     stored vectors by row number; of an array or a memory map    vectors.py
Retriever, Retrieval          questions to passages and their scores                       retriever.py
Index, Queries, Proposal      what an index is, is asked and answers                       retriever.py
ExactIndex                    exact inner-product search (FAISS)                           faiss_index.py
DeviceIndex                   the same on the accelerator, in 32, 16 or 8 bits             device_index.py
Bm25Index                     search by words, which are those of words.py                 bm25.py
HybridIndex                   by vectors and by words, ranks fused                         hybrid.py
TwoHopIndex                   a second search that knows what the first has found          two_hops.py
RerankedIndex, Reranker       a second look at what another search has found               rerank.py
"""

from ragjax.retrieval.bm25 import Bm25Index
from ragjax.retrieval.device_index import DeviceIndex
from ragjax.retrieval.encode import EncodedCorpus, encode_corpus
from ragjax.retrieval.faiss_index import ExactIndex
from ragjax.retrieval.hybrid import HybridIndex
from ragjax.retrieval.rerank import RerankedIndex, Reranker
from ragjax.retrieval.retriever import Index, Proposal, Queries, Retrieval, Retriever
from ragjax.retrieval.two_hops import TwoHopIndex
from ragjax.retrieval.vectors import ArrayVectors, VectorStore

__all__ = [
    "ArrayVectors",
    "Bm25Index",
    "DeviceIndex",
    "EncodedCorpus",
    "ExactIndex",
    "HybridIndex",
    "Index",
    "Proposal",
    "Queries",
    "RerankedIndex",
    "Reranker",
    "Retrieval",
    "Retriever",
    "TwoHopIndex",
    "VectorStore",
    "encode_corpus",
]
