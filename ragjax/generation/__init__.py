"""Decoding answers.

decode_answers   as a configuration says                                         decode.py
decode_mixture   one prompt, or one a passage mixed token by token (RAG-Token)   decode.py
decode_sequence  an answer weighed under every passage (RAG-Sequence)            decode.py
stream_answer    an answer as it grows, where can_stream                         decode.py
prepare          once for several calls                                          decode.py
check_decoding   whether the settings agree                                      decode.py
question_seeds   of the questions' draws                                         decode.py
Rule             how answers are found                                           beam_search.py
"""

from ragjax.generation.beam_search import Rule
from ragjax.generation.decode import (
    Decoded,
    Prepared,
    can_stream,
    check_decoding,
    decode_answers,
    decode_mixture,
    decode_sequence,
    prepare,
    question_seeds,
    stream_answer,
)

__all__ = [
    "Decoded",
    "Prepared",
    "Rule",
    "can_stream",
    "check_decoding",
    "decode_answers",
    "decode_mixture",
    "decode_sequence",
    "prepare",
    "question_seeds",
    "stream_answer",
]
