"""Makes lengths.json: how long HotPotQA's prompts, answers, questions and passages are, in tokens; no text.

    python experiments/accelerator/lengths.py --data=$RAGJAX_DATA/hotpotqa

Prompts are those of the first training questions under the five passages that untrained MiniLM finds, in SmolLM2's
tokens (LLaMA-3's tokenizer is not to be had without the hub; its larger vocabulary makes texts somewhat shorter).
"""

import argparse
import json
from pathlib import Path

from ragjax.config import RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.pipeline import build_pipeline, load_models

FILE = Path(__file__).parent / "lengths.json"
QUESTIONS = 256
PASSAGES = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of HotPotQA")
    dataset = load_dataset(parser.parse_args().data)
    config = RunConfig()
    pipeline = build_pipeline(config, dataset, *load_models(config))
    questions = dataset.train[:QUESTIONS]
    found = pipeline.retrieve([question.question for question in questions], config.top_k).passage_rows
    measured = []
    for question, rows, tokens in zip(
        questions, found, pipeline.embedder.query_tokens([q.question for q in questions]), strict=True
    ):
        passages, answer = pipeline.passages(rows), len(pipeline.prompts.answer(question.answers[0]))
        single = [len(pipeline.prompts.prompt([passage], question.question, answer).ids) for passage in passages]
        together = len(pipeline.prompts.prompt(passages, question.question, config.max_new_tokens).ids)
        measured.append({"question": len(tokens), "prompts": single, "concatenated": together, "answer": answer})
    stride = -(-len(pipeline.store) // PASSAGES)
    texts = [pipeline.store[row].embedder_text for row in range(0, len(pipeline.store), stride)]
    lines = ",\n".join(json.dumps(one) for one in measured)
    passages = json.dumps(list(map(len, pipeline.embedder.passage_tokens(texts))))
    FILE.write_text(f'{{"questions": [\n{lines}\n],\n"passages": {passages}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
