"""lm-eval: the harness's own documents, prompts and numbers; states carried; padding checked; bad input."""

import json

import eval_calls as calls
import pytest
import torch
from eval_calls import DATA

from glabench.corpus import tokenizer as vocabularies
from glabench.errors import UsageError
from glabench.quality import harness, loading, records, tasks, vocabulary

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the harness's and its libraries' own
]
MODELS = {"gla": "gla-tiny", "llama": "transformer-tiny"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: calls.save(folder / kind, name) for kind, name in MODELS.items()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("name", calls.NAMES)
def test_local_files_give_the_harness_own_requests_and_metrics(name, scratch, monkeypatch):
    ours, own = calls.local_task(name, scratch), calls.own_task(name, monkeypatch)
    asked = calls.requests(ours)
    assert asked == calls.requests(own) and asked
    assert ours.aggregation() == own.aggregation() and ours.VERSION == own.VERSION
    assert [ours.doc_to_target(d) for d in ours.eval_docs] == [own.doc_to_target(d) for d in own.eval_docs]
    assert tasks.requests_digest(ours) == tasks.requests_digest(own)


def test_examples_in_the_prompt_are_the_harness_own(scratch, monkeypatch):
    ours, own = (
        calls.local_task("piqa", scratch, shots=2),
        calls.own_task("piqa", monkeypatch, shots=2),
    )
    asked = calls.requests(ours)
    assert asked == calls.requests(own)
    assert all(args[0].count("Question:") == 3 for *_, args in asked)


def test_examples_without_a_training_split_are_refused(scratch):
    local = records.find(records.specs()["openbookqa"], DATA)
    assert "openbookqa_train.jsonl" in tasks.set_shots(tasks.local_task(local, scratch), 5, local)


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_equal_those_of_the_harness_own_model_class(kind, checkpoints, scratch):
    ours, theirs = calls.lms(checkpoints[kind])
    for name in (*calls.NAMES, "squad_like"):
        task = calls.local_task(name, scratch)
        assert calls.scores(ours, task) == calls.scores(theirs, task), name


@pytest.mark.parametrize("name", ["gla-tiny", "retnet-tiny"])
def test_a_carried_state_gives_the_same_likelihoods(name, tmp_path, scratch):
    ours, theirs = calls.lms(calls.save(tmp_path, name), dtype=torch.float64)
    asked = [
        request
        for task in ("hellaswag", "arc_easy", "boolq", "sciq", "piqa")
        for request in _instances(calls.local_task(task, scratch))
    ]
    carried, whole = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert ours.shared == len(asked)  # every context of these is one of several
    for (ours_nats, ours_greedy), (nats, greedy) in zip(carried, whole, strict=True):
        assert ours_nats == pytest.approx(nats, rel=1e-10) and ours_greedy == greedy


def _instances(task):
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def test_a_context_that_does_not_fit_the_window_is_the_harness_own(checkpoints, scratch):
    ours, theirs = calls.lms(checkpoints["gla"], dtype=torch.float64, max_length=110)
    asked = _instances(calls.local_task("arc_easy", scratch))
    made, whole = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [nats for nats, _ in made] == pytest.approx([nats for nats, _ in whole], rel=1e-10)
    assert 0 < ours.shared < len(asked)


def test_an_answer_longer_than_the_window_is_said_to_be_so(checkpoints, scratch):
    ours, _ = calls.lms(checkpoints["gla"], max_length=8)
    with pytest.raises(harness.WindowError, match="longer than the window of 8"):
        ours.loglikelihood(_instances(calls.local_task("arc_easy", scratch)))


@pytest.mark.parametrize("name", ["piqa", "wikitext", "fda"])
def test_padding_does_not_change_an_answer(name, checkpoints, scratch):
    for kind in MODELS:
        ours, _ = calls.lms(checkpoints[kind])
        assert harness.padding_error(ours, calls.local_task(name, scratch)) <= harness.padding_limit(ours)


@pytest.mark.parametrize("name", ["piqa", "fda"])
def test_a_model_that_reads_padding_is_found(name, checkpoints, scratch, monkeypatch):
    calls.read_padding(monkeypatch)
    ours, _ = calls.lms(checkpoints["gla"])
    assert harness.padding_error(ours, calls.local_task(name, scratch)) > harness.padding_limit(ours)


def test_errors_of_ratios_and_means_are_those_of_the_documents():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    made = harness._score("contains,none", 0.6, {}, [{"contains": v, "filter": "none"} for v in values])
    assert made.stderr == pytest.approx((0.24 / 4) ** 0.5) and made.stderr_from == "documents"
    # documents of equal weight: the ratio's error is the mean's, here of nats a word
    pairs = [(-2.0 * 10, 10), (-4.0 * 10, 10), (-3.0 * 10, 10)]
    samples = [{"word_perplexity": p, "filter": "none"} for p in pairs]
    made = harness._score("word_perplexity,none", 20.0, {}, samples)
    assert made.stderr == pytest.approx(20.0 * (1 / 3) ** 0.5)


def test_the_vocabularies_of_training_give_the_same_ids(checkpoints):
    texts = ["Question: is it so?\nAnswer:", " two  spaces</s>", "漢字 é \t x", "no pieces:\u0001"]
    for name in ("bytes", "mistral"):
        theirs = vocabularies.load(name)
        ours = vocabulary._as_prepared(theirs, "")
        assert ours.eos_token_id == theirs.end and len(ours) == theirs.vocabulary
        for text, ids in zip(texts, theirs.encode(texts), strict=True):
            assert ours.encode(text, add_special_tokens=False) == ids.tolist()
            assert ours.decode(ids.tolist()).strip() == text.strip()


def test_the_tokenizer_of_training_is_taken_without_being_named(tmp_path):
    folder = calls.save(tmp_path)
    record = {"tokenizer": vocabularies.load("bytes").describe()}
    (folder / "state.json").write_text(json.dumps(record))
    found, adds_special = vocabulary.for_harness(loading.describe(folder), "")
    assert found.encode("ab", add_special_tokens=False) == [97, 98] and adds_special is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": "1"}', "'label' is not an integer"),
        ('{"goal": " ", "sol1": "a", "sol2": "b", "label": 1}', "'goal' is empty"),
        ('{"goal": "g", "sol1": "a", "label": 1}', "no field 'sol2'"),
        ("[1]", "no JSON object"),
        ("", "no documents"),
    ],
)
def test_a_bad_document_is_named(line, message, tmp_path):
    (tmp_path / "piqa.jsonl").write_text(line)
    with pytest.raises(UsageError, match=message):
        records.find(records.specs(tmp_path)["piqa"], tmp_path)


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "hellaswag", "copa"])
def test_each_kind_of_field_is_checked(name, tmp_path):
    spec = records.specs()[name]
    record = json.loads((DATA / f"{name}.jsonl").read_text().splitlines()[0])
    for key in spec.fields:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**record, key: {}}))
        with pytest.raises(UsageError, match=f"'{key}' is not"):
            records.find(spec, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[mine]\nlike = "piqa"\nfile = "../piqa.jsonl"', "a file outside its folder: ../piqa.jsonl"),
        ('[mine]\nlike = "piqa"\nfile = "link.jsonl"', "a file outside its folder: link.jsonl"),
        ('[mine]\nlike = "piqaa"\nfile = "a.jsonl"', "no task 'piqaa'"),
        ('[mine]\nlike = "piqa"\npython = "os:system"', "a task names a known one and a file"),
        ('[piqa]\nlike = "arc_easy"\nfile = "a.jsonl"', "'piqa' is a known task's name"),
        ("[mine", "cannot read the task file"),
    ],
)
def test_a_task_file_names_data_of_its_folder_only(text, message, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "piqa.jsonl").write_text((DATA / "piqa.jsonl").read_text())
    (folder / "link.jsonl").symlink_to(tmp_path / "piqa.jsonl")
    (folder / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        records.find(records.specs(folder)["mine"], folder)


def test_a_task_of_the_users_own_is_scored_as_the_one_it_is_like(tmp_path, scratch):
    (tmp_path / "other.jsonl").write_text((DATA / "piqa.jsonl").read_text())
    (tmp_path / "tasks.toml").write_text('[mine]\nlike = "piqa"\nfile = "other.jsonl"\n')
    mine, theirs = calls.local_task("mine", scratch, folder=tmp_path), calls.local_task("piqa", scratch)
    assert mine.task_name == "mine" and calls.requests(mine) == calls.requests(theirs)
