"""Finding passages.

cached_vectors                passages to vectors, once, kept in the cache                 encode.py
encode_corpus, Place,
PassageEncoder, identity_of,
missing_passages              the same in any folder, shard by shard                       encode.py
VectorShards, Identity        vectors of a corpus in shards on disk                        shards.py
VectorStore, ArrayVectors     stored vectors by row number; of an array                    vectors.py
MovingVectors, at_first       vectors that are replaced while they are searched            vectors.py
Retriever, Retrieval          questions to passages and their scores                       retriever.py
Index, Queries, Proposal      what an index is, is asked and answers                       retriever.py
ExactIndex, ApproximateIndex  inner-product search (FAISS): all vectors, or a part         faiss_index.py
IndexRecord, open_index       the folder of an index: what it was made of, opening it      index_folder.py
DeviceIndex                   search on the accelerator, in 32, 16 or 8 bits               device_index.py
Bm25Index                     search by words, which are those of words.py                 bm25.py
HybridIndex                   by vectors and by words, ranks fused                         hybrid.py
TwoHopIndex                   a second search that knows what the first has found          two_hops.py
RerankedIndex, Reranker       a second look at what another search has found               rerank.py
"""

from ragjax.retrieval.bm25 import Bm25Index
from ragjax.retrieval.device_index import DeviceIndex
from ragjax.retrieval.encode import (
    PassageEncoder,
    Place,
    cached_vectors,
    encode_corpus,
    identity_of,
    missing_passages,
)
from ragjax.retrieval.faiss_index import ApproximateIndex, ExactIndex
from ragjax.retrieval.hybrid import HybridIndex
from ragjax.retrieval.index_folder import IndexRecord, open_index, read_index_record
from ragjax.retrieval.rerank import RerankedIndex, Reranker
from ragjax.retrieval.retriever import Index, Proposal, Queries, Retrieval, Retriever
from ragjax.retrieval.shards import Identity, VectorShards
from ragjax.retrieval.two_hops import TwoHopIndex
from ragjax.retrieval.vectors import ArrayVectors, MovingVectors, VectorStore, at_first

__all__ = [
    "ApproximateIndex",
    "ArrayVectors",
    "Bm25Index",
    "DeviceIndex",
    "ExactIndex",
    "HybridIndex",
    "Identity",
    "Index",
    "IndexRecord",
    "MovingVectors",
    "PassageEncoder",
    "Place",
    "Proposal",
    "Queries",
    "RerankedIndex",
    "Reranker",
    "Retrieval",
    "Retriever",
    "TwoHopIndex",
    "VectorShards",
    "VectorStore",
    "at_first",
    "cached_vectors",
    "encode_corpus",
    "identity_of",
    "missing_passages",
    "open_index",
    "read_index_record",
]
