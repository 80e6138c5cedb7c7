"""Preparing text: every format gives the same tokens, a killed run goes on, each error is one line."""

import gzip
import json
import lzma
import signal

import numpy as np
import pytest
from training_calls import SAMPLE, kill_when, run, start

from glabench.corpus import manifest as corpus
from glabench.corpus import sources
from glabench.corpus.sources import PIECE
from glabench.installed import is_installed

TEXTS = ["First document,\nwith an é.", "Second.", "Third: \U0001f600"]
JOINED = "\n\n\n\n".join(TEXTS)
LINES = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS))
END = 256


def prepare(folder, out, *words, tokenizer="bytes"):
    return run("data", "prepare", folder, "--out", out, "--tokenizer", tokenizer, *words)


def prepared(folder, out, *words):
    done = prepare(folder, out, "--valid-frac", "0", *words)
    assert done.exit_code == 0, done.stderr
    return corpus.read_manifest(out)


def tokens(out, manifest, split="train"):
    run_of = corpus.Tokens(out, manifest, split)
    return run_of.read(0, len(run_of))


def wanted(texts):
    return np.concatenate([[*text.encode(), END] for text in texts])


def zstd(data):
    return pytest.importorskip("zstandard", reason="zstandard reads .zst").compress(data)


def parquet(path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads .parquet")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"text": TEXTS}), path)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "texts"
    made.mkdir()
    return made


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prepared"


def check(done, *words):
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    *progress, line = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not any("error" in said or "Traceback" in said for said in progress)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("pack", ["", ".xz", ".gz", ".zst"])
def test_each_format_gives_the_same_tokens(folder, out, name, pack):
    data = (JOINED if name == "a.txt" else LINES).encode()
    packed = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstd}[pack](data)
    (folder / (name + pack)).write_bytes(packed)
    made = prepared(folder, out)
    assert tokens(out, made).tolist() == wanted(TEXTS).tolist()
    assert made["splits"]["train"]["documents"] == 3 and made["dtype"] == "uint16"


def test_parquet_gives_the_same_tokens(folder, out):
    parquet(folder / "a.parquet")
    assert tokens(out, prepared(folder, out)).tolist() == wanted(TEXTS).tolist()


@pytest.mark.filterwarnings("ignore")  # dill's, where the test saves the set
def test_a_data_set_on_disk_gives_the_same_tokens(tmp_path, out):
    datasets = pytest.importorskip("datasets", reason="datasets reads what it saved")
    table = datasets.table.InMemoryTable.from_pydict({"text": TEXTS})
    # a fingerprint of our own: the library's pickles the table, which some pairs of dill and pyarrow cannot
    datasets.Dataset(table, fingerprint="made").save_to_disk(str(tmp_path / "set"))
    assert tokens(out, prepared(tmp_path / "set", out)).tolist() == wanted(TEXTS).tolist()


def test_the_index_ends_each_document_and_shards_read_as_one_run(folder, out):
    (folder / "a.txt").write_text(JOINED)
    made = prepared(folder, out, "--shard-tokens", "20")
    shards = made["splits"]["train"]["shards"]
    assert [s["documents"] for s in shards] == [1, 2]
    ends = [np.fromfile(out / s["index"], "<u8").tolist() for s in shards]
    first, second, third = (len(text.encode()) + 1 for text in TEXTS)
    assert ends == [[first], [second, second + third]]
    run_of = corpus.Tokens(out, made, "train")
    across = run_of.read(first - 3, 6)
    assert across.tolist() == wanted(TEXTS)[first - 3 : first + 3].tolist()
    with pytest.raises(IndexError):
        run_of.read(len(run_of) - 1, 2)


def test_the_default_tokenizer_is_the_32k_mistral_vocabulary(folder, out):
    pytest.importorskip("mistral_common", reason="mistral-common carries the vocabulary")
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece reads it")
    from glabench.corpus.tokenizer import load

    (folder / "a.txt").write_text("Gated linear attention.")
    done = run("data", "prepare", folder, "--out", out, "--valid-frac", "0")
    made = corpus.read_manifest(out)
    assert done.exit_code == 0 and made["tokenizer"]["vocabulary"] == 32_000
    ids = tokens(out, made).tolist()
    assert ids[-1] == made["tokenizer"]["end_of_document"] == 2
    import mistral_common

    path = f"{mistral_common.__path__[0]}/data/tokenizer.model.v1"
    assert spm.SentencePieceProcessor(model_file=path).decode(ids[:-1]) == "Gated linear attention."
    assert load(path).digest == load("mistral").digest


def test_a_document_longer_than_a_piece_is_whole(folder, out):
    text = ("0123456789abcde\n" * (PIECE // 16 + 3)).strip()
    (folder / "a.txt").write_text(text + "\n\n\n\nnext")
    made = prepared(folder, out)
    assert tokens(out, made).tolist() == wanted([text, "next"]).tolist()
    assert made["splits"]["train"]["documents"] == 2


def test_a_share_of_the_documents_is_kept_for_validation(folder, out):
    texts = [f"document {n}" for n in range(400)]
    (folder / "a.txt").write_text("\n\n\n\n".join(texts * 2))
    assert prepare(folder, out, "--valid-frac", "0.2").exit_code == 0
    made = corpus.read_manifest(out)
    parts = {}
    for split in ("train", "valid"):
        ids = tokens(out, made, split)
        parts[split] = bytes(np.where(ids == END, 0, ids).astype(np.uint8)).decode().split("\0")[:-1]
    assert sorted(parts["train"] + parts["valid"]) == sorted(texts * 2)
    assert not set(parts["train"]) & set(parts["valid"])  # a copy does not leak into the other split
    assert 100 < len(parts["valid"]) < 240  # 160 expected of 800 in pairs; 6 standard deviations


def test_preparing_twice_changes_nothing(folder, out):
    (folder / "a.txt").write_text(JOINED)
    prepared(folder, out)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir() if p.name != ".lock"}
    again = prepare(folder, out, "--valid-frac", "0", "--json")
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir() if p.name != ".lock"}
    assert before == after and "already prepared" in again.stderr
    assert json.loads(again.stdout)["splits"]["train"]["documents"] == 3


def test_a_killed_run_goes_on_and_ends_the_same(folder, tmp_path, out):
    text = (SAMPLE / "train" / "magic_world.txt").read_text()
    for n in range(1000):
        (folder / f"{n:04d}.txt").write_text("\n\n\n\n".join((str(n), text[n : n + 20_000], text[-n - 9 :])))
    words = ("--shard-tokens", "50000", "--valid-frac", "0.1")
    whole = tmp_path / "whole"
    assert prepare(folder, whole, *words).exit_code == 0
    journal = out / "progress.json"
    process = start("data", "prepare", folder, "--out", out, "--tokenizer", "bytes", *words)
    kill_when(process, lambda: journal.exists() and json.loads(journal.read_text())["source"] >= 100)
    assert not (out / "manifest.json").exists() and process.returncode == -signal.SIGKILL
    (out / "train-99999.bin.partial").touch()  # nothing of a killed run may be taken for a shard
    kept = out / "train-00001.bin"
    before = kept.stat().st_mtime_ns
    resumed = prepare(folder, out, *words)
    assert resumed.exit_code == 0 and "going on" in resumed.stderr
    assert corpus.read_manifest(out) == corpus.read_manifest(whole)
    corpus.verify(out, corpus.read_manifest(out))
    assert kept.stat().st_mtime_ns == before  # it went on, it did not start again
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_file_mended_after_an_error_is_taken_up(folder, tmp_path, out):
    (folder / "a.txt").write_text(JOINED)
    (folder / "b.txt").write_bytes(b"bad \xff")
    check(prepare(folder, out, "--valid-frac", "0"), "not UTF-8", "b.txt, byte 4")
    (folder / "b.txt").write_text("good")
    assert tokens(out, prepared(folder, out)).tolist() == wanted([*TEXTS, "good"]).tolist()


def test_an_empty_folder_is_refused(folder, out):
    check(prepare(folder, out), "no text in the folder", str(folder))
    (folder / "picture.png").write_bytes(b"")
    check(prepare(folder, out), "no text in the folder")
    check(prepare(folder / "nowhere", out), "no folder 'nowhere'")
    (folder / "a.txt").write_text("\n\n")
    check(prepare(folder, out), "the text files are empty")


@pytest.mark.parametrize("size", [100, 1_048_575, 3_000_000])
def test_bad_utf8_names_the_file_and_the_byte(folder, out, size):
    good = ("é" * size).encode()[:size] if size % 2 == 0 else b"x" * (size - 3) + "日".encode()
    (folder / "a.txt").write_bytes(good + b"\xff rest")
    check(prepare(folder, out), "not UTF-8", f"a.txt, byte {len(good)}")


def test_bad_utf8_in_packed_lines_names_the_byte_of_the_text(folder, out):
    data = LINES.encode() + b'{"text": "\xe9"}\n'
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data))
    where = f"a.jsonl.gz, byte {len(LINES.encode()) + 10} of the unpacked text"
    check(prepare(folder, out), "not UTF-8", where)


def test_a_character_cut_by_the_end_of_the_file_is_refused(folder, out):
    (folder / "a.txt").write_bytes(b"abc\xe6\x97")
    check(prepare(folder, out), "not UTF-8", "byte 3")


@pytest.mark.parametrize("pack", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "foreign"])
def test_an_unreadable_archive_is_refused(folder, out, pack, harm):
    data = np.random.default_rng(0).integers(97, 123, 200_000, dtype=np.uint8).tobytes()
    packed = {".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstd}[pack](data)
    (folder / f"a.txt{pack}").write_bytes(packed[: len(packed) // 2] if harm == "cut" else b"not an archive")
    check(prepare(folder, out), f"cannot unpack a.txt{pack}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ("not JSON", "line 4")),
        ('{"body": "x"}', ("no text under 'text'", "line 4", "there is body")),
        ("[1]", ("no text under 'text'", "line 4")),
    ],
)
def test_a_line_that_holds_no_text_is_named(folder, out, line, words):
    (folder / "a.jsonl").write_text(LINES + line + "\n")
    check(prepare(folder, out), *words)


def without(monkeypatch, package):
    """As on a machine that lacks the package."""
    monkeypatch.setattr(sources, "is_installed", lambda name: name != package and is_installed(name))


def test_parquet_without_its_reader_is_one_line(folder, out, monkeypatch):
    without(monkeypatch, "pyarrow")
    (folder / "a.parquet").write_bytes(b"PAR1")
    check(prepare(folder, out), "pyarrow is not installed", "pip install pyarrow")


def test_a_data_set_without_its_reader_is_one_line(folder, out, monkeypatch):
    without(monkeypatch, "datasets")
    (folder / "dataset_info.json").write_text("{}")
    check(prepare(folder, out), "datasets is not installed", "pip install datasets")


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "longer"),
        (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "changed after it was prepared"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_shard_that_is_not_what_was_prepared_is_refused(folder, out, harm, word, name):
    (folder / "a.txt").write_text(JOINED)
    prepared(folder, out)
    harm(out / name)
    check(prepare(folder, out, "--valid-frac", "0"), name, word)


def test_a_folder_prepared_from_something_else_is_refused(folder, out):
    (folder / "a.txt").write_text(JOINED)
    prepared(folder, out)
    pytest.importorskip("mistral_common", reason="the other tokenizer")
    other = prepare(folder, out, "--valid-frac", "0", tokenizer="mistral")
    check(other, "the tokenizer mistral", "does not match")
    check(prepare(folder, out, "--valid-frac", "0.5"), "prepared with valid_frac=0.0, not 0.5")
    (folder / "a.txt").write_text(JOINED + "!")
    check(prepare(folder, out, "--valid-frac", "0"), "a.txt is new, gone or changed")


def test_a_tokenizer_that_is_not_the_manifests_is_named(folder, out):
    from glabench.corpus.tokenizer import load
    from glabench.errors import UsageError

    (folder / "a.txt").write_text(JOINED)
    made = prepared(folder, out)
    corpus.check_tokenizer(made, load("bytes").describe())
    with pytest.raises(UsageError, match="does not match the manifest's, bytes"):
        corpus.check_tokenizer(made, {"name": "mine", "sha256": "0" * 64})


def test_what_is_not_ours_is_not_written_to(folder, out):
    (folder / "a.txt").write_text(JOINED)
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    check(prepare(folder, out), "prepared holds other files")
    check(prepare(folder, folder / "a.txt"), "a.txt is not a folder")
    check(prepare(folder, out, tokenizer="byte"), "no tokenizer 'byte'")
