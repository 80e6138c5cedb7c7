"""Multi-query associative recall: the reference's own examples, and what every example must be."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glabench.quality import mqar

# first 16 hex digits of SHA-256 over int64 tokens, then labels, of 100 examples; from zoology's own program
REFERENCE = {
    (64, 4, 0): "e03f678cfb667649",
    (64, 4, 10): "f23594e13488269e",
    (128, 8, 0): "a9294c5c52c6b5b3",
    (128, 8, 10): "930c92aa3e2253dd",
    (256, 16, 0): "b936b1b2c6bbd645",
    (256, 16, 10): "4677a60aadd799a0",
    (512, 64, 0): "1a7828fc0c2f0b76",
    (512, 64, 10): "1a36bff93796ff40",
}
VOCAB = 8192


def digest(examples):
    parts = (examples.tokens, examples.labels())
    return hashlib.sha256(b"".join(p.numpy().astype("<i8").tobytes() for p in parts)).hexdigest()[:16]


@pytest.mark.parametrize(("seqlen", "pairs", "seed"), REFERENCE)
def test_the_reference_stream_is_the_reference_programs_bit_for_bit(seqlen, pairs, seed):
    made = mqar.draw_reference(100, seqlen, pairs, VOCAB, seed)
    assert digest(made) == REFERENCE[seqlen, pairs, seed]


def test_the_first_queries_of_the_reference_are_where_it_has_them():
    first = mqar.draw_reference(100, 64, 4, VOCAB, 0)
    assert first.tokens[0, :8].tolist() == [583, 5723, 1962, 5956, 1958, 5963, 3194, 7141]
    found = {
        int(p): (int(first.tokens[0, p]), int(a))
        for p, a in zip(first.queries[0], first.answers[0], strict=True)
    }
    assert found == {8: (3194, 7141), 26: (1962, 5956), 52: (583, 5723), 58: (1958, 5963)}


@st.composite
def shapes(draw):
    pairs = draw(st.integers(1, 9))
    seqlen = 2 * draw(st.integers(2 * pairs, 2 * pairs + 20))
    vocab = draw(st.integers(max(seqlen, 2 * pairs + 1) + 1, 150))
    return seqlen, pairs, vocab


@settings(derandomize=True, deadline=None, max_examples=40)
@given(shapes(), st.integers(0, 2**31), st.sampled_from([mqar.draw, mqar.draw_reference]))
def test_every_query_has_one_earlier_key_whose_value_is_its_answer(shape, seed, draw):
    seqlen, pairs, vocab = shape
    made = draw(5, seqlen, pairs, vocab, seed)
    labels = made.labels()
    assert made.tokens.shape == labels.shape == (5, seqlen)
    for tokens, label in zip(made.tokens.tolist(), labels.tolist(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < k < vocab // 2 <= v < vocab for k, v in zip(keys, values, strict=True))
        queries = [i for i, answer in enumerate(label) if answer != mqar.IGNORED]
        assert sorted(tokens[i] for i in queries) == sorted(keys)  # each key is asked for once
        for i in queries:
            assert i >= 2 * pairs and i % 2 == 0
            earlier = [j for j in range(i) if tokens[j] == tokens[i]]
            assert len(earlier) == 1 and tokens[earlier[0] + 1] == label[i]
        rest = set(range(2 * pairs, seqlen)) - set(queries)
        assert all(tokens[i] == 0 for i in rest)


@pytest.mark.parametrize(("seqlen", "pairs"), [(64, 4), (256, 16)])
def test_the_vectorised_draw_has_the_references_distribution_of_gaps(seqlen, pairs):
    """Share of the queries in each slot, and of the first and last pair's: within five standard errors."""
    count = 4000
    fast, reference = (
        draw(count, seqlen, pairs, VOCAB, 0).queries.sub(2 * pairs).div(2, rounding_mode="floor")
        for draw in (mqar.draw, mqar.draw_reference)
    )
    slots = (seqlen - 2 * pairs) // 2
    for pick in (slice(None), slice(0, 1), slice(pairs - 1, pairs)):  # the order of drawing matters as well
        a, b = (
            torch.bincount(x[:, pick].flatten(), minlength=slots).double() / count for x in (fast, reference)
        )
        error = (2 * (a + b) / 2 * (1 - (a + b) / 2) / count).clamp_min(2 / count**2).sqrt()
        assert ((a - b).abs() / error).max() < 5


def test_the_first_pairs_gap_follows_the_stated_power_law():
    count, slots = 20000, 28
    drawn = mqar.draw(count, 64, 4, VOCAB, 3).queries[:, 0].sub(8).div(2, rounding_mode="floor")
    weights = np.arange(1, slots + 1) ** (0.01 - 1)
    wanted = torch.from_numpy(weights / weights.sum())
    found = torch.bincount(drawn, minlength=slots).double() / count
    assert ((found - wanted).abs() / (wanted * (1 - wanted) / count).sqrt()).max() < 5


def test_keys_and_values_are_uniform_and_the_seed_decides_everything():
    made = mqar.draw(20000, 16, 2, 32, 1)
    keys = torch.bincount(made.tokens[:, 0:4:2].flatten(), minlength=16)[1:].double()
    values = torch.bincount(made.answers.flatten() - 16, minlength=16).double()
    for counts in (keys, values):
        mean = counts.mean()
        assert ((counts - mean).abs() / mean.sqrt()).max() < 5
    again, other = mqar.draw(20000, 16, 2, 32, 1), mqar.draw(20000, 16, 2, 32, 2)
    assert torch.equal(made.tokens, again.tokens) and torch.equal(made.answers, again.answers)
    assert not torch.equal(made.tokens, other.tokens)


def test_the_slots_of_the_long_task_crowd_after_the_pairs():
    p = mqar.slot_probabilities(512, 64)
    assert len(p) == 192 and p[:4].round(3).tolist() == [0.167, 0.084, 0.056, 0.042]
    assert p[:96].sum() == pytest.approx(0.88, abs=0.005)
