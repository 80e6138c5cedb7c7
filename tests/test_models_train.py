"""Every family learns real text: its loss ends below what the frequencies of single tokens allow."""

import collections
import json
import math

import pytest
from training_calls import SAMPLE, config, metrics, run

from glabench.corpus import manifest as corpus

pytestmark = pytest.mark.usefixtures("one_thread")
MARGIN = 0.2  # nats a byte below the unigram entropy of unseen text, after 50 steps: pairs of letters
MARGIN_8M = 0.5  # nats a word piece below the unigram entropy of the training text, after 150 steps
TINY = {  # shipped ones with fewer layers, for CI; Mamba's scan is the slowest of all on a CPU
    "gla": "num_hidden_layers = 2",
    "retnet": "num_hidden_layers = 2",
    "transformer": "num_hidden_layers = 2",
    "mamba": "num_hidden_layers = 2\nhidden_size = 64",
}


def prepared(out, tokenizer):
    words = ("--valid", SAMPLE / "valid", "--out", out, "--tokenizer", tokenizer)
    done = run("data", "prepare", SAMPLE / "train", *words)
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def read_bytes(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "bytes", "bytes")


@pytest.fixture(scope="module")
def read_words(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "words", "mistral")


def unigram_entropy(data, split):
    tokens = corpus.Tokens(data, corpus.read_manifest(data), split)
    counts = collections.Counter(tokens.read(0, len(tokens)).tolist())
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())


def trained(path, data, out):
    done = run("train", path, "--data", data, "--out", out, "--device", "cpu", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout)


def table(path, model, **train):
    """A configuration of a shipped model; `config` writes the rest of the settings."""
    config(path, **train)
    settings = path.read_text().partition("[train]")[2]
    path.write_text(f"[model]\n{model}\n[train]{settings}")
    return path


@pytest.mark.parametrize("family", TINY)
def test_a_byte_model_learns_more_than_letter_frequencies(family, read_bytes, tmp_path):
    model = f'name = "{family}-tiny"\n{TINY[family]}'
    settings = {"steps": 50, "batch_tokens": 1024, "seqlen": 64, "micro_batch": 16, "warmup_steps": 4}
    path = table(tmp_path / "c.toml", model, **settings, lr=4e-3, lr_end=4e-4, save_every=50)
    done = trained(path, read_bytes, tmp_path / "run")
    first = float(metrics(tmp_path / "run")[0]["loss"])
    assert abs(first - math.log(259)) < 0.3  # it started knowing nothing
    assert done["valid_loss"] < unigram_entropy(read_bytes, "valid") - MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gla", "retnet", "mamba", "transformer"])
def test_an_8m_model_learns_more_than_word_frequencies(family, read_words, tmp_path):
    settings = {"steps": 150, "batch_tokens": 1024, "seqlen": 128, "micro_batch": 8, "warmup_steps": 15}
    path = table(tmp_path / "c.toml", f'name = "{family}-8m"', **settings, lr=3e-3, save_every=150)
    trained(path, read_words, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert abs(float(rows[0]["loss"]) - math.log(32000)) < 0.5
    last = [float(row["loss"]) for row in rows[-20:]]
    assert sum(last) / len(last) < unigram_entropy(read_words, "train") - MARGIN_8M
