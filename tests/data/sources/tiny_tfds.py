"""Builders of TFDS, which the tests prepare: a class that is imported is registered under its name."""

import numpy as np
import tensorflow_datasets as tfds

TEXT = tfds.features.Text()


class _Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    FEATURES: dict = {}
    EXAMPLES: dict = {}

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, license="CC0", disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.EXAMPLES}

    def _generate_examples(self, split):
        yield from enumerate(self.EXAMPLES[split])


def _squad(identity):
    answers = {"text": ["Malmö", "Malmö", "M"], "answer_start": [0, 0, 0]}
    return {"id": identity, "title": "T", "context": "Malmö is.", "question": "Where?", "answers": answers}


class TinySquad(_Tiny):
    """The features of TFDS's squad."""

    FEATURES = {
        "id": TEXT,
        "title": TEXT,
        "context": TEXT,
        "question": TEXT,
        "answers": tfds.features.Sequence({"text": TEXT, "answer_start": np.int32}),
    }
    EXAMPLES = {"train": [_squad("1")], "validation": [_squad("2")]}


class TinyWikipedia(_Tiny):
    """The features of TFDS's wikipedia."""

    FEATURES = {"title": TEXT, "text": TEXT}
    EXAMPLES = {"train": [{"title": "A", "text": "Ä."}, {"title": "B", "text": ""}]}


class TinyPictures(_Tiny):
    FEATURES = {"label": TEXT}
    EXAMPLES = {"pictures": [{"label": "cat"}]}
