"""What is trained and evaluated on, from files to token rows.

Passage, Question,
read_corpus, read_questions   the schema of JSON Lines files, checked         questions.py
PassageStore, PassageList     the passages of a corpus by row number          passages.py
Dataset, load_dataset         a data set by name or folder                    dataset.py
sources/                      the files of other makers, and named sets
preparing/                    any source as a folder that opens in a moment
PromptBuilder                 prompts from pieces that are tokenised once     prompts.py
Batch, Rows, make_batch       packed rows of tokens                           batches.py
"""

from ragjax.data.batches import Batch, Rows, make_batch
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.data.passages import PassageList, PassageStore
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage, Question, read_corpus, read_questions

__all__ = [
    "Batch",
    "Dataset",
    "Passage",
    "PassageList",
    "PassageStore",
    "PromptBuilder",
    "Question",
    "Rows",
    "load_dataset",
    "make_batch",
    "read_corpus",
    "read_questions",
]
