"""`glabench extrapolate` end to end on the CPU: rows, intervals, resuming, and what it refuses."""

import csv
import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quality_checkpoints import documents, extrapolate, model_of, refused, rows, run, save, texts
from safetensors.torch import load_file, save_file
from tolerances import PIECES
from training_calls import SAMPLE
from transformers.cache_utils import Cache

from glabench.quality import repeats, scoring
from glabench.quality.intervals import bootstrap
from glabench.runners import extrapolate as runner

# older versions of transformers keep no state of Mamba to go on from
RECURRENT = ("gla", "retnet", *(["mamba"] if hasattr(Cache, "get_recurrent_state") else []))
NAMES = (*RECURRENT, "transformer")
SHORT = ("--lengths", "256..1k", "--bucket", "256")


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    """The threads are part of the environment that --resume compares."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of every family; GLA's is a training run's."""
    place = tmp_path_factory.mktemp("checkpoints")
    done = run("data", "prepare", SAMPLE / "valid", "--out", place / "data", "--tokenizer", "bytes")
    assert done.exit_code == 0, done.stderr
    words = ("--data", place / "data", "--out", place / "gla", "--device", "cpu")
    done = run("train", "gla-tiny", *words, "--steps", 2, "--micro-batch", 4)
    assert done.exit_code == 0, done.stderr
    for family in NAMES[1:]:
        save(model_of(family), place / family)
    return place


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """The verb on all of them and two documents of the shipped sample."""
    out = tmp_path_factory.mktemp("out")
    words = [w for f in NAMES for w in ("--ckpt", folder / f)]
    done = extrapolate(out, *words, *SHORT, "--docs", 2, "--state-passing", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    return out, json.loads(done.stdout)


def test_every_family_has_a_row_a_bucket_and_protocol(measured):
    out, done = measured
    found = rows(out)
    assert found == done["rows"] and done["bad"] == 0 and {r["status"] for r in found} == {"ok"}
    lines = dict.fromkeys((r["impl"], r["protocol"]) for r in found)
    assert list(lines) == [
        *((name, p) for name in RECURRENT for p in ("document", "state_passing")),
        ("transformer", "document"),
        ("transformer", "sliding"),
    ]
    for line in lines:
        mine = [r for r in found if (r["impl"], r["protocol"]) == line]
        assert [int(r["bucket"]) for r in mine] == [1, 2, 3, 4]
        assert {(r["n_docs"], r["n_tokens"], r["train_len"], r["train_segments"]) for r in mine} == {
            ("2", "512", "256", "1")
        }
    assert {(r["window"], r["stride"]) for r in found if r["protocol"] == "sliding"} == {("256", "128")}
    assert {r["family"] for r in found} == {
        {"retnet": "retention", "transformer": "attention"}.get(name, name) for name in NAMES
    }
    run_json = json.loads((out / "run.json").read_text())["runs"]
    assert [r["id"] for r in run_json] == [found[0]["env"]] and run_json[0]["finished_utc"]


def test_rows_follow_from_the_losses_of_the_documents(measured):
    out, _ = measured
    for row in rows(out):
        mine = [d for d in documents(out) if (d["ckpt"], d["protocol"]) == (row["impl"], row["protocol"])]
        nats = np.array([d["nats"][int(row["bucket"]) - 1] for d in mine])
        assert len(nats) == 2 and float(row["ppl"]) == pytest.approx(math.exp(nats.sum() / 512), rel=1e-12)
        assert float(row["bits_per_byte"]) == pytest.approx(nats.sum() / 512 / math.log(2), rel=1e-12)
        ((low, high),) = bootstrap(nats, [256, 256])
        assert (float(row["ppl_lo"]), float(row["ppl_hi"])) == pytest.approx((math.exp(low), math.exp(high)))


def test_repeated_and_other_tokens_make_up_each_bucket(measured):
    out, _ = measured
    with (out / "repeats.csv").open(newline="") as file:
        parts = list(csv.DictReader(file))
    for row in rows(out):
        same = ("impl", "protocol", "bucket")
        mine = {p["kind"]: p for p in parts if [p[n] for n in same] == [row[n] for n in same]}
        assert list(mine) == ["repeated", "other"]
        counts = [int(p["n_tokens"]) for p in mine.values()]
        assert sum(counts) == 512 and min(counts) > 0
        total = sum(n * float(p["nll_nats"]) for n, p in zip(counts, mine.values(), strict=True))
        assert total == pytest.approx(512 * float(row["nll_nats"]), rel=1e-12)


def test_a_repeated_token_ends_a_pair_that_stood_once_before():
    ids = np.random.default_rng(3).integers(0, 9, 700).astype(np.uint16)
    seen, wanted = Counter(), [False]
    for pair in itertools.pairwise(ids.tolist()):
        wanted.append(seen[pair] == 1)
        seen[pair] += 1
    assert repeats.is_repeated(ids).tolist() == wanted and 50 < sum(wanted) < 150
    assert repeats.is_repeated(ids[:1]).tolist() == [False] and repeats.is_repeated(ids[:0]).tolist() == []


def test_losses_of_repeated_tokens_are_theirs():
    ids = np.array([5, 6, 5, 6, 7, 5, 6, 7])  # 5 6 comes three times, 6 7 and 7 5 once more or never
    nats = np.arange(8.0)
    found = repeats.sums(nats, ids, 4)
    assert found == {"repeated_nats": [3.0, 7.0], "repeated_tokens": [1, 1]}
    nats[7] = np.nan
    assert repeats.sums(nats, ids, 4)["repeated_nats"] == [3.0, None]


def test_passing_the_state_changes_the_second_document_and_not_the_first(measured):
    out, _ = measured
    for name in RECURRENT:
        plain, passed = (
            [d["nats"] for d in documents(out) if (d["ckpt"], d["protocol"]) == (name, protocol)]
            for protocol in ("document", "state_passing")
        )
        assert plain[0] == passed[0] and plain[1][0] != passed[1][0]


def test_a_bigram_model_has_the_perplexity_of_its_formula(tmp_path):
    """With attention and feed-forward at zero the next token depends on the last one alone."""
    model = model_of("transformer", tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    texts(tmp_path / "text", 600, 512, 5000)
    done = extrapolate(
        tmp_path / "out", "--ckpt", save(model, tmp_path / "ck"), "--data", tmp_path / "text",
        "--lengths", "256..512", "--bucket", 256, "--window", 64,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    table = model.model.embed_tokens.weight.double()
    normed = table * (table.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    nats = -F.log_softmax(normed @ model.lm_head.weight.double().T, -1)
    for row in rows(tmp_path / "out"):
        end, total = int(row["bucket"]) * 256, 0.0
        for path in sorted((tmp_path / "text").iterdir()):
            ids = [256, *path.read_bytes()[:512]]  # the end of a document stands before the next
            total += sum(nats[ids[i], ids[i + 1]].item() for i in range(end - 256, end))
        assert float(row["nll_nats"]) == pytest.approx(total / 768, abs=PIECES)
        assert float(row["ppl"]) == pytest.approx(math.exp(total / 768), rel=PIECES)
    assert {r["protocol"] for r in rows(tmp_path / "out")} == {"document", "sliding"}


def without_times(found):
    return [{k: v for k, v in r.items() if k not in ("started_utc", "wall_s")} for r in found]


def test_resuming_goes_on_after_the_last_document(folder, measured, tmp_path):
    done, _ = measured
    out = shutil.copytree(done, tmp_path / "out")
    lines = (out / "documents.jsonl").read_text().splitlines(keepends=True)
    made = [(d["ckpt"], d["protocol"]) for d in documents(out)]
    at = made.index(("retnet", "state_passing"))
    # retnet: one document is there, of the next, which needs its state, half a line; the last row is torn too
    (out / "documents.jsonl").write_text("".join(lines[: at + 1]) + lines[at + 1][:50])
    table = (out / "extrapolate.csv").read_text().splitlines(keepends=True)
    (out / "extrapolate.csv").write_text("".join(table[:7]) + table[7][:40])
    words = [w for f in NAMES for w in ("--ckpt", folder / f)]
    again = extrapolate(out, *words, *SHORT, "--docs", 2, "--state-passing", "--resume")
    assert again.exit_code == 0 and again.stderr.count("cut a torn last line") == 2, again.stderr
    assert without_times(rows(out)) == without_times(rows(done))
    assert [d["nats"] for d in documents(out)] == [d["nats"] for d in documents(done)]
    assert (out / "documents.jsonl").read_text().startswith("".join(lines[: at + 1]))
    assert len(json.loads((out / "run.json").read_text())["runs"]) == 2


def test_a_run_without_resume_is_another_replicate(folder, tmp_path):
    words = ("--ckpt", folder / "gla", "--lengths", 256, "--bucket", 256, "--docs", 1)
    assert extrapolate(tmp_path, *words).exit_code == extrapolate(tmp_path, *words).exit_code == 0
    first, second = rows(tmp_path)
    assert (first["replicate"], second["replicate"]) == ("0", "1") and first["ppl"] == second["ppl"]
    assert first["ppl_lo"] == "" and first["n_docs"] == "1"  # one document says nothing about others


def test_flash_linear_attentions_layout_has_the_same_losses(folder, measured, tmp_path):
    done = run("convert", folder / "gla/checkpoints/step-00000002", tmp_path / "fla", "--layout", "fla")
    assert done.exit_code == 0, done.stderr
    words = ("--ckpt", tmp_path / "fla", "--tokenizer", "bytes", *SHORT, "--docs", 2)
    assert extrapolate(tmp_path / "out", *words).exit_code == 0
    want = [float(r["ppl"]) for r in rows(measured[0])[:4]]
    # a byte model's end of a document is also the configuration's begin: the same tokens are read
    assert [float(r["ppl"]) for r in rows(tmp_path / "out")] == pytest.approx(want, rel=PIECES)


def test_losses_that_are_no_numbers_are_rows_with_the_place(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", 64)  # NaN spreads to its whole piece: masked values times 0
    bad = shutil.copytree(folder / "transformer", tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    words = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = words.clone()
    words[ord("q")] = math.nan
    config = json.loads((bad / "config.json").read_text()) | {"tie_word_embeddings": False}
    (bad / "config.json").write_text(json.dumps(config))
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a" * 300 + "q" + "a" * 300)
    where = ("--data", tmp_path / "text", "--lengths", "256..512", "--bucket", 256)
    done = extrapolate(tmp_path / "out", "--ckpt", bad, *where)
    assert done.exit_code == 1, done.stderr
    first, second = rows(tmp_path / "out")[:2]
    assert first["status"] == "ok" and float(first["ppl"]) > 1
    assert (second["status"], second["ppl"]) == ("error", "")
    assert second["reason"] == "non-finite loss at position 256 of a.txt"


def test_any_transformer_of_transformers_and_its_learned_positions(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=512, bos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    words = ("--ckpt", tmp_path / "gpt2", *SHORT, "--docs", 2)
    assert refused(extrapolate(tmp_path / "no", *words), "no tokenizer with the checkpoint", "--tokenizer")
    done = extrapolate(tmp_path / "out", *words, "--tokenizer", "bytes", "--window", 4096)
    assert done.exit_code == 0, done.stderr
    found = {(r["protocol"], r["bucket"]): r for r in rows(tmp_path / "out")}
    assert [found["document", b]["status"] for b in "1234"] == ["ok", "ok", "unsupported", "unsupported"]
    assert found["document", "3"]["reason"] == "positions are learned, up to 512 tokens"
    assert {found["sliding", b]["status"] for b in "1234"} == {"ok"}
    assert found["sliding", "1"]["window"] == "512"
    pieces, windows = (float(found[p, "2"]["ppl"]) for p in ("document", "sliding"))
    assert pieces == pytest.approx(windows, rel=PIECES)


def test_the_table_keeps_buckets_of_different_sizes_apart(capsys):
    common = {"impl": "gla", "protocol": "document", "status": "ok", "reason": "", "n_docs": "4"}
    kept = [
        {**common, "bucket": "1", "bucket_tokens": "256", "ppl": "13.5", "bits_per_byte": "3.7"},
        {**common, "bucket": "2", "bucket_tokens": "128", "ppl": "12.9", "bits_per_byte": "3.6"},
    ]
    runner.show({"rows": kept, "folder": "out"})
    told = capsys.readouterr().out
    assert "buckets of 256" in told and "buckets of 128" in told and "13.5" in told and "12.9" in told
    runner.show({"rows": kept[:1], "folder": "out"})
    assert "buckets of" not in capsys.readouterr().out
