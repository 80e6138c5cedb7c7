"""Training: it learns, resumes exactly after kill -9, refuses what does not fit, and stops at NaN."""

import collections
import json
import math
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tolerances import TRAINING
from training_calls import SAMPLE, TRAIN, config, kill_when, losses, metrics, run, start

from glabench.corpus import manifest as corpus
from glabench.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MARGIN = 0.5  # nats a byte below the unigram entropy: more than letter frequencies, spelling too
VALID = SAMPLE / "valid"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "bytes"
    done = run("data", "prepare", SAMPLE / "train", "--valid", VALID, "--out", out, "--tokenizer", "bytes")
    assert done.exit_code == 0, done.stderr
    return out


def train(path, data, out, *words):
    return run("train", path, "--data", data, "--out", out, "--device", "cpu", *words)


def trained(path, data, out, *words):
    done = train(path, data, out, *words)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done


def refused(done, *words):
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
    return done.exit_code


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = config(folder / "small.toml", eval_every=5)
    trained(path, data, folder / "run")
    torch.set_num_threads(before)
    return path, folder / "run"


def test_it_learns_more_than_the_frequencies_of_bytes(data, tmp_path):
    tokens = corpus.Tokens(data, corpus.read_manifest(data), "valid")
    counts = collections.Counter(tokens.read(0, len(tokens)).tolist())
    entropy = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())
    path = config(
        tmp_path / "a.toml", steps=160, batch_tokens=16 * 128, seqlen=128, micro_batch=16, warmup_steps=10
    )
    done = json.loads(trained(path, data, tmp_path / "run", "--json").stdout)
    rows = metrics(tmp_path / "run")
    assert len(rows) == done["step"] == 160 and done["finished"]
    assert 5.0 < float(rows[0]["loss"]) < 6.0  # ln 257 = 5.55: it started knowing nothing
    assert done["valid_loss"] == float(rows[-1]["valid_loss"]) < entropy - MARGIN


def test_metrics_are_one_line_a_step(whole):
    rows = metrics(whole[1])
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [int(row["tokens"]) for row in rows] == [512 * n for n in range(1, 13)]
    assert [bool(row["valid_loss"]) for row in rows] == [n in (5, 10, 12) for n in range(1, 13)]
    for name in ("loss", "grad_norm", "tokens_per_s", "peak_mem_mib"):
        assert all(float(row[name]) > 0 for row in rows)


@pytest.mark.parametrize("at", [2, 6, 11])
def test_a_killed_run_reaches_the_same_losses(whole, data, tmp_path, at):
    path, reference = whole
    out = tmp_path / "run"
    process = start("train", path, "--data", data, "--out", out, "--device", "cpu")
    file = out / "metrics.csv"
    kill_when(process, lambda: file.exists() and file.read_text().count("\n") > at)
    done = trained(path, data, out)
    assert ("going on from step" in done.stderr) == (at > 4)
    assert losses(out) == losses(reference)
    names = ("model.safetensors", "optimizer.safetensors")
    last = [checkpoint.find(folder)[-1][1] for folder in (out, reference)]
    for name in names:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_what_a_kill_leaves_behind_is_swept_and_torn_lines_are_cut(whole, data, tmp_path):
    path, reference = whole
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    newest = checkpoint.find(out)[-1][1]
    (newest / "state.json").unlink()
    newest.rename(newest.with_name("." + newest.name))  # a checkpoint that was being written
    lines = (out / "metrics.csv").read_text().splitlines(keepends=True)
    (out / "metrics.csv").write_text("".join(lines[:11]) + lines[11][:9])
    done = trained(path, data, out)
    assert "going on from step 8" in done.stderr and losses(out) == losses(reference)
    assert not list((out / "checkpoints").glob(".*"))


def test_checkpoints_are_limited_and_are_hugging_face_folders(whole):
    _, out = whole
    assert [step for step, _ in checkpoint.find(out)] == [8, 12]  # every 4, the last 2
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint.find(out)[-1][1])
    valid = corpus.Tokens(out.parent, {"dtype": "uint16", "splits": {"valid": {"shards": []}}}, "valid")
    assert len(valid) == 0 and model.config.vocab_size == 257
    text = (VALID / "magic_world.txt").read_bytes()
    ids = torch.tensor(list(text[: len(text) // 64 * 64])).reshape(-1, 64)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert abs(loss / float(metrics(out)[-1]["valid_loss"]) - 1) < TRAINING


def test_a_run_converts_as_its_newest_checkpoint(whole, tmp_path):
    for source, target, layout in ((whole[1], "fla", "fla"), (tmp_path / "fla", "back", "glabench")):
        done = run("convert", source, tmp_path / target, "--layout", layout)
        assert done.exit_code == 0, done.stderr
    step, newest = checkpoint.find(whole[1])[-1]
    assert step == TRAIN["steps"]
    assert (
        load_file(tmp_path / "fla" / "model.safetensors").keys()
        != load_file(newest / "model.safetensors").keys()
    )
    for name, tensor in load_file(newest / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[name], tensor)


def test_a_finished_run_is_left_as_it_is(whole, data):
    path, out = whole
    before = (out / "metrics.csv").read_bytes(), checkpoint.find(out)
    told = trained(path, data, out).stderr
    assert "already finished" in told and "going on" not in told
    assert ((out / "metrics.csv").read_bytes(), checkpoint.find(out)) == before


def test_a_folder_of_another_run_is_refused(whole, data, tmp_path):
    path, out = whole
    assert refused(train(path, data, out, "--seed", "1"), "made with seed 0, not 1") == 2
    assert refused(train(path, data, out, "--steps", "13"), "made with train.steps 12, not 13") == 2
    other = config(tmp_path / "other.toml", lr=1e-3)
    assert refused(train(other, data, out), "made with train.lr 0.003, not 0.001") == 2
    other = config(tmp_path / "wide.toml", model="initializer_range = 0.01")
    assert refused(train(other, data, out), "made with model.initializer_range null, not 0.01") == 2
    again = tmp_path / "again"
    run("data", "prepare", SAMPLE / "valid", "--out", again, "--tokenizer", "bytes", "--valid-frac", "0")
    assert refused(train(path, again, out), "made with data") == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert refused(train(path, data, tmp_path / "full"), "holds other files: thesis.txt") == 2


def test_how_often_it_saves_may_change(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    shutil.rmtree(checkpoint.find(out)[-1][1])
    trained(config(tmp_path / "a.toml", eval_every=5, save_every=1, keep=3, micro_batch=2), data, out)
    assert [step for step, _ in checkpoint.find(out)] == [10, 11, 12]


def test_a_loss_that_is_no_number_stops_and_keeps_the_good_checkpoint(data, tmp_path):
    path = config(tmp_path / "a.toml", lr=1e38, lr_end=1e-4, warmup_steps=6, save_every=1, keep=1)
    out = tmp_path / "run"
    done = train(path, data, out)
    assert refused(done, "is nan at step 3; checkpoint step-00000001 is kept", "lower lr") == 1
    assert [step for step, _ in checkpoint.find(out)] == [1]
    assert all(math.isfinite(float(row["loss"])) for row in metrics(out))


def test_two_processes_of_fsdp_give_the_losses_of_one(whole, data, tmp_path):
    path, reference = whole
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glabench")
    words = ("train", path, "--data", data, "--out", tmp_path / "run", "--device", "cpu")
    process = start(*words, launcher=launcher)
    assert process.communicate(timeout=100)[1].count("Traceback") == 0 and process.returncode == 0
    for mine, one in zip(metrics(tmp_path / "run"), metrics(reference), strict=True):
        for name in ("loss", "grad_norm", "valid_loss"):
            if one[name]:
                assert abs(float(mine[name]) / float(one[name]) - 1) < TRAINING, (mine, one)
    # its checkpoint is whole: one process goes on from it
    shutil.rmtree(checkpoint.find(tmp_path / "run")[-1][1])
    trained(path, data, tmp_path / "run")
    last = [float(metrics(out)[-1]["loss"]) for out in (tmp_path / "run", reference)]
    assert abs(last[0] / last[1] - 1) < TRAINING


def test_micro_batches_add_up_to_the_batch(whole, data, tmp_path):
    path, reference = whole
    trained(path, data, tmp_path / "run", "--micro-batch", "3")  # 8 sequences: 3, 3 and 2
    for mine, one in zip(metrics(tmp_path / "run"), metrics(reference), strict=True):
        assert abs(float(mine["loss"]) / float(one["loss"]) - 1) < TRAINING


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The .grad attribute of a Tensor")  # the compiler's
def test_compiled_blocks_give_the_losses_of_eager_ones(whole, data, tmp_path):
    path, reference = whole
    trained(path, data, tmp_path / "run", "--compile")
    for mine, one in zip(metrics(tmp_path / "run"), metrics(reference), strict=True):
        assert abs(float(mine["loss"]) / float(one["loss"]) - 1) < TRAINING


def test_gradient_checkpointing_changes_nothing(whole, data, tmp_path):
    trained(config(tmp_path / "a.toml", grad_checkpointing=True, eval_every=5), data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[1])


def test_training_in_segments_resumes_exactly_too(data, tmp_path):
    path = config(tmp_path / "a.toml", segments=2, steps=4, save_every=2)
    trained(path, data, tmp_path / "run")
    reference = losses(tmp_path / "run")
    shutil.rmtree(checkpoint.find(tmp_path / "run")[-1][1])
    trained(path, data, tmp_path / "run")
    assert losses(tmp_path / "run") == reference and reference[-1][1] == str(4 * 512)


def test_a_model_without_a_state_cannot_be_trained_in_segments(data, tmp_path):
    path = config(tmp_path / "a.toml", segments=2, grad_checkpointing=True)
    done = train(path, data, tmp_path / "run")
    assert refused(done, "the model gives no state to carry between segments") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lrr": 1.0}, ("no key 'lrr'", "did you mean 'lr'?")),
        ({"seqlen": 60}, ("batch_tokens 512 is not a multiple of a sequence, 60 x 1",)),
        ({"steps": "many"}, ("'many' does not fit steps", "write a whole number, not negative")),
        ({"lr_end": 1.0}, ("lr_end 1 is not within",)),
        ({"warmup_steps": 12}, ("warmup_steps 12 leaves nothing of 12 steps",)),
        ({"precision": "fp8"}, ("no precision 'fp8'",)),
        ({"betas": [0.9]}, ("does not fit betas",)),
        ({"batch_tokens": 1 << 20, "seqlen": 1 << 20}, ("tokens are fewer than one sequence",)),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(data, tmp_path, changes, words):
    path = config(tmp_path / "a.toml", **changes)
    assert refused(train(path, data, tmp_path / "run"), *words) == 2
    assert not (tmp_path / "run" / "train.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modell]\n", ("no table 'modell'", "did you mean 'model'?")),
        ("[train\n", ("cannot read a.toml",)),
        ('[model]\nkind = "hf"\nmodel_type = "lama"\n', ("cannot build it", " ... (model lama)")),
        ('[model]\nkind = "hf"\nmodel_type = "llama"\nhiden_size = 8\n', ("no key 'hiden_size'",)),
        ('[model]\nkind = "hf"\nmodel_type = "llama"\nvocab_size = 64\n', ("64 vocabulary entries", "257")),
    ],
)
def test_a_model_table_that_makes_no_sense_is_refused(data, tmp_path, text, words):
    path = tmp_path / "a.toml"
    path.write_text(
        text
        if text == "[train\n"
        else text + "\n[train]\n" + "\n".join(f"{k} = {v}" for k, v in TRAIN.items())
    )
    assert refused(train(path, data, tmp_path / "run"), *words) == 2


def test_data_that_changed_after_preparing_is_refused(whole, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = broken / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert refused(train(whole[0], broken, tmp_path / "run"), "shard train-00000.bin is truncated") == 2
    assert refused(train(whole[0], tmp_path, tmp_path / "run"), "no prepared data") == 2


def test_a_damaged_checkpoint_is_named(whole, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    weights = checkpoint.find(out)[-1][1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(train(whole[0], data, out), "checkpoint step-00000012 is damaged") == 2


def test_a_schedulers_notice_saves_and_ends_the_run(data, tmp_path):
    out = tmp_path / "run"
    path = config(tmp_path / "a.toml", steps=100_000, warmup_steps=10, save_every=100_000)
    process = start("train", path, "--data", data, "--out", out, "--device", "cpu")
    while not ((out / "metrics.csv").exists() and metrics(out)):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    (step, _), rows = checkpoint.find(out)[-1], metrics(out)
    assert process.returncode == 0 and "stopped early" in said and step == int(rows[-1]["step"])
