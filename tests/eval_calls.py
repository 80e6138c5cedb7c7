"""Tiny checkpoints and the harness's own tasks, for the tests of lm-eval."""

import functools
import json
from pathlib import Path

import datasets
import lm_eval.tasks
import torch

from glabench.models import catalog
from glabench.models.language import LinearAttentionForCausalLM
from glabench.quality import harness, loading, records, tasks, vocabulary

DATA = Path(__file__).parent / "data" / "eval"
NAMES = [name for name in records.specs() if not name.endswith("_like")]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}


def save(folder, name="gla-tiny", scale=4.0, **fields):
    """A checkpoint whose answers are far from uniform."""
    torch.manual_seed(0)
    model = catalog.build(name, **SMALL, **fields)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.save_pretrained(folder)
    return folder


def lms(folder, *, dtype=torch.float32, batch=4, max_length=1024):
    """(ours, the harness's own class) over one checkpoint that reads bytes."""
    found = loading.describe(folder, "bytes")
    tokenizer, adds_special = vocabulary.for_harness(found, "bytes")
    model = loading.load(found, "cpu", "fp32").to(dtype)
    options = {"batch": batch, "max_length": max_length, "adds_special": adds_special}
    ours = harness.StateLM(model, tokenizer, **options)
    theirs = lm_eval.models.huggingface.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch,
        max_length=max_length,
        softmax_dtype=dtype,
        add_bos_token=False,
    )
    return ours, theirs


def local_task(name, scratch, folder=DATA, shots=0):
    local = records.find(records.specs(folder)[name], folder)
    task = tasks.local_task(local, scratch)
    assert tasks.set_shots(task, shots, local) == ""
    return task


def own_task(name, monkeypatch, shots=0):
    """The harness's own task, its download replaced by the same records in memory."""
    spec = records.specs()[name]
    held = {spec.split: DATA / f"{name}.jsonl", "train": DATA / f"{name}_train.jsonl"}
    rows = {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in held.items()
        if path.is_file()
    }
    rows |= {split: rows[spec.split] for split in ("train", "validation", "test") if split not in rows}
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(r) for split, r in rows.items()})
    asked = []

    def download(path, name=None, **_):
        asked.append((path, name))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", download)
        task = tasks.hub_tasks(name)[name]
    assert asked == [(task.DATASET_PATH, task.DATASET_NAME)]  # it did ask the hub for its own data
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    return task


def requests(task):
    task.build_all_requests(rank=0, world_size=1)
    return [(r.request_type, r.doc_id, r.idx, r.args) for r in task.instances]


def scores(lm, task):
    found = harness.evaluate(lm, task, None) if isinstance(lm, harness.PlainLM) else _evaluate(lm, task)
    return {s.metric: s.value for s in found.scores} if hasattr(found, "scores") else found


def _evaluate(lm, task):
    """By the harness alone, nothing of ours."""
    name = task.task_name
    found = lm_eval.evaluate(lm=lm, task_dict={"tasks": {name: task}}, bootstrap_iters=0)["results"][name]
    return {k.partition(",")[0]: v for k, v in found.items() if "," in k and "stderr" not in k}


def read_padding(monkeypatch):
    """Our models from now on take padding for text."""
    forward = LinearAttentionForCausalLM.forward

    @functools.wraps(forward)
    def blind(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LinearAttentionForCausalLM, "forward", blind)
