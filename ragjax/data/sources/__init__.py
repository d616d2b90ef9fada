"""Where data come from: one file for each maker of files, and what they have in common.

Source, Split, Asked, Label   what a source is                                        source.py
open_source, open_corpus      by name, or a folder that is recognised by its files    opening.py, folders.py
Table, Schema                 records in files of any kind; how one maker's are read  tables.py, schema.py
assemble                      a source from tables; splits that are made              assembly.py

ragjax's own, FlashRAG, DPR, BEIR and MTEB                      own.py, flashrag.py, dpr.py, beir.py
HotpotQA, PopQA, SQuAD, NQ-open, TriviaQA                       hotpotqa.py, popqa.py, squad.py, nq_open.py, triviaqa.py
what `datasets` keeps, the hub, TFDS, ragjax.prepare            saved.py, hub.py, tfds.py, prepared.py
"""

from ragjax.data.sources.opening import open_corpus, open_source
from ragjax.data.sources.source import SPLITS, Asked, Facts, Label, Source, Split, Tally

__all__ = ["SPLITS", "Asked", "Facts", "Label", "Source", "Split", "Tally", "open_corpus", "open_source"]
