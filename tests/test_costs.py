"""FLOPs formulas by hand on sizes small enough to multiply out, and the ledger's bookkeeping."""

import pytest

from ragjax.costs import PARTS, Cost, Ledger, ModelSize, decode_flops, forward_flops, peak_memory_bytes, train_flops

FULL = ModelSize(layer_weights=100, head_weights=30, lora_weights=0, layers=2, attention_width=8)
LORA = ModelSize(layer_weights=100, head_weights=30, lora_weights=10, layers=2, attention_width=8)


def test_forward_by_hand():
    # Linear 2 * 100 * (3 + 5) = 1600, attention 4 * 2 * 8 * (9 + 25) = 2176, head 2 * 30 * 4 = 240.
    assert forward_flops(FULL, [3, 5], head_positions=4) == 1600 + 2176 + 240
    # The adapters' own products come on top: 2 * 10 * 8.
    assert forward_flops(LORA, [3, 5], head_positions=4) == 1600 + 160 + 2176 + 240


def test_full_training_is_three_times_forward():
    assert train_flops(FULL, [3, 5], head_positions=4) == 3 * (1600 + 2176 + 240)


def test_lora_training_skips_the_gradient_of_frozen_weights():
    # 4N for frozen layers and head, 6N for adapters, attention (which has no weights) three times.
    assert train_flops(LORA, [3, 5], head_positions=4) == 2 * (1600 + 240) + 3 * 160 + 3 * 2176


def test_lengths_may_be_an_iterator():
    assert train_flops(LORA, iter([3, 5]), 4) == train_flops(LORA, [3, 5], 4)
    assert forward_flops(LORA, iter([3, 5]), 4) == forward_flops(LORA, [3, 5], 4)


def test_decoding_by_hand():
    # The prefill of 4 tokens gives the first choice: 2 * 100 * 4 + 4 * 2 * 8 * 16 + 2 * 30 = 1884. Two steps read one
    # token each: 2 * (100 + 30) * 2 = 520, and attend to 5 and 6 tokens: 4 * 2 * 8 * 11 = 704.
    assert decode_flops(FULL, [4], [2]) == 1884 + 520 + 704
    assert decode_flops(FULL, [4], [0]) == 1884
    assert decode_flops(FULL, [4, 4], [2, 0]) == 2 * 1884 + 520 + 704


def test_costs_add_up():
    assert Cost(1.5, 10, 2, 1) + Cost(0.5, 5, 1, 1) == Cost(2.0, 15, 3, 2)


def test_split_shares_seconds_by_flops():
    ledger = Ledger()
    ledger.add("generator", Cost(1.0, 100, 5))
    ledger.split(8.0, {"generator": Cost(0.0, 300.0, 30, 20), "embedder": Cost(0.0, 100.0, 10)})
    parts = ledger.as_dict()
    assert parts["generator"] == {"seconds": 7.0, "flops": 400.0, "tokens": 35, "backward_tokens": 20}
    assert parts["embedder"] == {"seconds": 2.0, "flops": 100.0, "tokens": 10, "backward_tokens": 0}
    ledger.split(1.0, {"embedder": Cost()})  # nothing to share by
    assert ledger.as_dict() == parts


def test_merge_adds_part_by_part():
    one, other = Ledger(), Ledger()
    one.add("search", Cost(1, 2, 3, 0))
    other.add("search", Cost(10, 20, 30, 40))
    other.add("encode", Cost(4, 5, 6))
    one.merge(other)
    assert one.as_dict()["search"] == {"seconds": 11, "flops": 22, "tokens": 33, "backward_tokens": 40}
    assert one.as_dict()["encode"] == {"seconds": 4, "flops": 5, "tokens": 6, "backward_tokens": 0}
    assert other.as_dict()["search"] == {"seconds": 10, "flops": 20, "tokens": 30, "backward_tokens": 40}


def test_summary_keeps_evaluation_out_of_the_total():
    ledger = Ledger()
    for power, part in enumerate(PARTS):
        ledger.add(part, Cost(10.0**power, 2 * 10.0**power, 3 * 10**power, 10**power))
    summary = ledger.summary()
    units = ("seconds", "flops", "tokens", "backward_tokens")
    assert tuple(summary[unit] for unit in units) == (1111.0, 2222.0, 3333, 1111)
    assert ledger.total() == Cost(1111.0, 2222.0, 3333, 1111)
    assert summary["evaluation"] == dict(zip(units, (10000.0, 20000.0, 30000, 10000), strict=True))
    assert ledger.part("evaluation") == Cost(10000.0, 20000.0, 30000, 10000)
    assert set(summary) == {*units, "embedder", "generator", "search", "encode", "evaluation"}


def test_a_saved_ledger_goes_on_counting():
    ledger = Ledger()
    ledger.add("embedder", Cost(1, 2, 3, 4))
    again = Ledger(ledger.as_dict())
    again.add("embedder", Cost(1, 2, 3, 4))
    assert again.as_dict()["embedder"] == {"seconds": 2, "flops": 4, "tokens": 6, "backward_tokens": 8}
    assert again.as_dict()["search"] == {"seconds": 0.0, "flops": 0.0, "tokens": 0, "backward_tokens": 0}


def test_an_unknown_part_is_an_error():
    with pytest.raises(KeyError):
        Ledger().add("lunch", Cost(1, 1, 1))


def test_peak_memory_covers_what_was_held():
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])  # touched, so resident
    assert len(block) < peak_memory_bytes() < 2**40
