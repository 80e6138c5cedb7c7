"""Losses by position: pieces equal the whole, windows see what they say, intervals cover."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quality_checkpoints import FAMILIES, model_of, run, texts
from tolerances import PIECES

from glabench.corpus import tokenizer
from glabench.errors import UsageError
from glabench.quality import documents, scoring
from glabench.quality.intervals import bootstrap

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(length, seed=0):
    return np.random.default_rng(seed).integers(0, 257, length + 1)


def whole(model, ids):
    """Nats of ids[1:] from one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[None, :-1]), use_cache=False).logits[0]
    return F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none").numpy()


def carries_or_skips(scorer, family):
    if scorer.piece == 0 and family in ("mamba", "mamba2"):
        pytest.skip("this version of transformers keeps no state to go on from: documents are read whole")


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_the_losses_of_one_forward_pass(family):
    model, ids = model_of(family), draw(150)
    want = whole(model, ids)
    scorer = scoring.Scorer(model, piece=64)
    got, state = scorer.in_pieces(ids)
    assert got.shape == want.shape and np.abs(got - want).max() <= PIECES
    carries_or_skips(scorer, family)
    assert scorer.piece == 64 and state is not None
    # the second piece alone, without the state, is another thing: what is carried matters
    forgetful, _ = scorer.in_pieces(ids[50:])
    assert np.abs(forgetful[:50] - want[50:100]).mean() > 100 * PIECES


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "transformer"])
def test_a_state_goes_on_into_the_next_document(family):
    model, ids = model_of(family), draw(120)
    scorer = scoring.Scorer(model, piece=50)
    carries_or_skips(scorer, family)
    want = whole(model, ids)
    first, state = scorer.in_pieces(ids[:71])
    second, _ = scorer.in_pieces(ids[70:], state)
    assert np.abs(np.concatenate([first, second]) - want).max() <= PIECES


def test_a_window_sees_its_own_tokens_only():
    model, ids = model_of("transformer"), draw(50)
    scorer = scoring.Scorer(model)
    got = scorer.through_windows(ids, window=16, stride=5)
    assert got.shape == (50,) and np.abs(got[:16] - whole(model, ids)[:16]).max() <= PIECES
    for end in (21, 26, 50):  # the last window ends with the document
        start = end - 16
        new = 5 if end < 50 else (50 - 16) % 5 or 5
        want = whole(model, ids[start : end + 1])[-new:]
        assert np.abs(got[end - new : end] - want).max() <= PIECES


def test_pieces_are_short_for_large_vocabularies():
    assert scoring.piece_length(259) == scoring.piece_length(32000) == 2048
    assert 8 * 152_000 * scoring.piece_length(152_000) <= scoring.LOGIT_BYTES


def test_a_cache_that_forgets_is_found_and_the_document_is_read_whole(monkeypatch):
    model, ids = model_of("mamba"), draw(100)
    monkeypatch.setattr(scoring, "carry_states", lambda model: True)  # as if it had been done
    scorer = scoring.Scorer(model)
    assert scorer.piece == 0
    got, state = scorer.in_pieces(ids)
    assert state is None and np.abs(got - whole(model, ids)).max() <= PIECES


def test_learned_positions_have_an_end():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    assert scoring.Scorer(GPT2LMHeadModel(config)).limit == 64
    assert scoring.Scorer(model_of("transformer")).limit is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    sums = np.random.default_rng(1).gamma(4.0, 0.5, size=(30, 1000))  # mean 2, skewed as losses are
    covered = sum(low <= 2.0 <= high for low, high in bootstrap(sums, np.ones((30, 1000))))
    assert 900 <= covered <= 970  # 95%, less what the percentile interval of thirty documents lacks


def test_intervals_are_paired_weighted_and_absent_for_one_document():
    sums = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
    (a, b), (c, d) = bootstrap(sums, np.ones((3, 2)))
    assert (2 * a, 2 * b) == pytest.approx((c, d)) and 1.0 <= a < b <= 5.0
    ((low, high),) = bootstrap(np.array([10.0, 30.0]), np.array([10.0, 10.0]))
    assert (low, high) == (1.0, 3.0)
    assert bootstrap(np.array([[1.0, 2.0]]), np.ones((1, 2))) == [None, None]


def test_the_shipped_sample_is_long_enough_and_its_bytes_add_up():
    words = tokenizer.load("bytes")
    found = documents.read(None, words, 131_072, 4096, None)
    assert found.dataset == "books" and len(found.kept) == 20 and not found.short
    assert all(sum(d.bytes) == 131_072 and len(d.bytes) == 32 for d in found.kept)
    assert len({d.digest for d in found.kept}) == 20


def test_documents_too_short_or_empty_are_counted_and_none_left_is_an_error(tmp_path):
    for name, size in (("a", 700), ("b", 300), ("c", 0), ("d", 512)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    words = tokenizer.load("bytes")
    found = documents.read(tmp_path, words, 512, 256, None)
    assert [d.name for d in found.kept] == ["a.txt", "d.txt"] and (found.short, found.empty) == (1, 1)
    assert found.skipped(512).endswith(": 1 shorter than 512 tokens and 1 empty, skipped")
    assert [d.name for d in documents.read(tmp_path, words, 256, 256, 1).kept] == ["a.txt"]
    with pytest.raises(UsageError, match=r"no document of 1,024 tokens \(bytes\): the longest has 700"):
        documents.read(tmp_path, words, 1024, 256, None)


def test_prepared_data_are_the_same_documents_as_their_text(tmp_path):
    text = texts(tmp_path / "text", 700, 300, 512)
    words = ("--out", tmp_path / "prepared", "--tokenizer", "bytes", "--valid-frac", 0)
    assert run("data", "prepare", text, *words).exit_code == 0
    bytes_ = tokenizer.load("bytes")
    want, got = (documents.read(tmp_path / n, bytes_, 512, 256, None) for n in ("text", "prepared"))
    assert [d.digest for d in got.kept] == [d.digest for d in want.kept] and len(got.kept) == 2
    assert got.kept[0].name == "train-00000:1" and got.short == 1 and got.kept[0].bytes == [256, 256]
    with pytest.raises(UsageError, match="does not match the manifest's"):
        documents.read(tmp_path / "prepared", tokenizer.load("mistral"), 64, 64, None)


@pytest.mark.gpu
def test_64k_tokens_of_gla_1_3b_need_less_than_2_gb_beyond_the_weights():
    from glabench.models import catalog
    from glabench.quality.loading import _widen_head

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = catalog.build("gla-1.3b", dtype=torch.bfloat16).eval()
    weights = torch.cuda.memory_allocated()
    _widen_head(model)
    torch.cuda.reset_peak_memory_stats()
    losses, _ = scoring.Scorer(model).in_pieces(np.random.default_rng(0).integers(0, 32000, 65_537))
    assert np.isfinite(losses).all() and len(losses) == 65_536
    assert torch.cuda.max_memory_allocated() - weights < 2e9
