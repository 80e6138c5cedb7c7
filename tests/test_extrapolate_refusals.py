"""What `glabench extrapolate` refuses, each in one clear line."""

import json
import shutil

import pytest
from quality_checkpoints import extrapolate, model_of, refused, save, texts
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--lengths", "256..512", "--bucket", "256", "--docs", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(model_of("gla"), tmp_path_factory.mktemp("checkpoints") / "gla")


def lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def surplus(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder):
    (folder / "config.json").unlink()


def own_code(folder):
    (folder / "config.json").write_text('{"model_type": "strange", "auto_map": {"AutoModel": "x.Y"}}')


def unknown_kind(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def another_tokenizer(folder):
    record = json.loads((folder / "state.json").read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    (folder / "state.json").write_text(json.dumps(record))


def file_tokenizer(folder):
    (folder / "state.json").write_text('{"tokenizer": {"name": "mine.json", "sha256": "0"}}')


DAMAGE = {
    lacking: ("1 tensors are missing, model.norm.weight first",),
    surplus: ("1 tensors have no place, model.extra.weight first",),
    pickled: ("pytorch_model.bin is pickled",),
    without_config: ("no config.json",),
    own_code: ("run code of its own (auto_map)",),
    unknown_kind: ("model_type 'vit'",),
    another_tokenizer: ("bytes is not the one the checkpoint was trained with",),
    file_tokenizer: ("it was trained with mine.json", "--tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_checkpoint_that_is_not_one(checkpoint, damage, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "ck")
    damage(folder)
    assert refused(extrapolate(tmp_path / "out", "--ckpt", folder, *SHORT), str(tmp_path), *DAMAGE[damage])
    # a sound one before it gets no rows either: the fault is told before the work
    assert refused(
        extrapolate(tmp_path / "out", "--ckpt", checkpoint, "--ckpt", folder, *SHORT), *DAMAGE[damage]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lengths", "4k..2k"), "runs backwards"),
        (("--lengths", "3000"), "3,000 tokens are no whole number of buckets of 2,048"),
        (("--lengths", "x"), "'x' is not a length"),
        (("--bucket", "0"), "'0' is not a length"),
        (("--data", "nowhere"), "no folder 'nowhere'"),
        (("--tokenizer", "nothing"), "no tokenizer 'nothing'"),
        (("--tokenizer", "mistral"), "mistral is not the one the checkpoint was trained with"),
        (("--dtype", "int8"), "no dtype 'int8'"),
        (("--lengths", "256k"), "no document of 262,144 tokens (bytes): the longest has 14"),
    ],
)
def test_words_that_make_no_sense(checkpoint, words, said, tmp_path):
    assert refused(extrapolate(tmp_path / "out", "--ckpt", checkpoint, *words), said)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit_the_vocabulary(checkpoint, tmp_path):
    folder = save(model_of("gla", vocab_size=1000), tmp_path / "ck")
    (folder / "state.json").unlink()
    words = ("--ckpt", folder, "--tokenizer", "bytes", *SHORT)
    assert refused(
        extrapolate(tmp_path / "out", *words), "bytes with 257 entries does not fit the model's 1,000"
    )


def test_the_same_checkpoint_twice_and_none(checkpoint, tmp_path):
    assert refused(
        extrapolate(tmp_path, "--ckpt", checkpoint, "--ckpt", checkpoint, *SHORT), "are called 'gla'"
    )
    assert extrapolate(tmp_path).exit_code == 2


def test_what_is_passed_over_is_said(checkpoint, tmp_path):
    texts(tmp_path / "text", 600, 100, 0)
    words = ("--ckpt", checkpoint, "--data", tmp_path / "text", "--lengths", "512", "--bucket", "256")
    done = extrapolate(tmp_path / "out", *words)
    assert done.exit_code == 0 and "text: 1 shorter than 512 tokens and 1 empty, skipped" in done.stderr


def test_a_folder_of_other_rows_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"a": 1}\n')
    assert refused(extrapolate(tmp_path, "--ckpt", checkpoint, *SHORT), "documents.jsonl is not readable")
    assert (tmp_path / "documents.jsonl").read_text() == '{"a": 1}\n'
