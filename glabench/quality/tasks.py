"""Tasks of lm-evaluation-harness: its own definitions, with their data from the hub or from local files.

Nothing of a task is written anew: a local task includes the installed definition and changes only where the
documents come from, so that prompts, targets and metrics are those of the installed version.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from glabench.errors import UnavailableError, UsageError, nearest
from glabench.quality.records import Local, specs

SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
SEED = 1234  # the harness's own default for few-shot examples


def local_task(local: Local, scratch: Path) -> Any:
    """The harness's Task over local files. `scratch` takes the definition and the converted data.

    Raises: UsageError where the harness cannot use the documents.
    """
    try:
        task = _python_task(local, scratch) if local.spec.python else _yaml_task(local, scratch)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as err:
        raise UsageError(
            f"the harness cannot use the documents: {type(err).__name__} {err}",
            where=local.files[local.spec.split].name,
            fix=f"compare them with {local.spec.name}'s published ones",
        ) from err
    if local.spec.generation:
        task.set_config(key="generation_kwargs", value=dict(local.spec.generation), update=True)
    return task


def _yaml_task(local: Local, scratch: Path) -> Any:
    """A YAML of ours that includes theirs: JSON is YAML, and an absolute path may be included."""
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent
    override = {
        "include": str(definitions / local.spec.definition),
        "task": local.spec.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": _load_arguments(local, scratch),
        **{key: name if name in local.files else None for key, name in SPLITS.items()},
    }
    folder = scratch / f"task-{local.spec.name}"
    folder.mkdir(exist_ok=True)
    (folder / f"{local.spec.name}.yaml").write_text(json.dumps(override), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load([local.spec.name])["tasks"][local.spec.name]


def _load_arguments(local: Local, scratch: Path) -> dict[str, Any]:
    files = {split: str(path) for split, path in local.files.items()}
    return {"data_files": files, "cache_dir": str(scratch / "datasets")}


def _python_task(local: Local, scratch: Path) -> Any:
    """Their class, whose constructor takes no configuration: only where it reads from is ours."""
    import datasets

    module, _, name = local.spec.python.partition(":")
    theirs = getattr(importlib.import_module(module), name)
    template = local.spec.text

    class FromFile(theirs):
        def download(self, *_: Any, **__: Any) -> None:
            read = datasets.load_dataset("json", **_load_arguments(local, scratch))
            if template:
                read = read.map(lambda row: {"text": template.format(**row)}, load_from_cache_file=False)
            self.dataset = read

    task = FromFile()
    task.config.task = local.spec.name
    return task


def hub_tasks(name: str) -> dict[str, Any]:
    """The harness's own task, tag or group of that name, as {task: Task}.

    Raises: UsageError for an unknown name; UnavailableError where the data is neither cached nor reachable.
    """
    import lm_eval.tasks

    known = specs().get(name)
    if known is not None and not known.definition:
        raise UnavailableError(
            f"{name} is not on the hub", where="--tasks", fix="use --tasks-from FOLDER with its documents"
        )
    definitions = Path(lm_eval.tasks.__file__).parent
    if known is None:  # all 14,000 definitions are read, which takes seconds
        manager = lm_eval.tasks.TaskManager()
    else:
        folder = str((definitions / known.definition).parent)
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    if name not in manager.all_tasks:
        raise UsageError(f"no task {name!r}", where="--tasks", fix=nearest(name, [*specs()]))
    try:
        return manager.load([name])["tasks"]
    except Exception as err:  # hub, network and data-set libraries share no exception
        raise UnavailableError(
            f"{name}'s data cannot be had from the hub: {type(err).__name__}",
            where="--tasks",
            fix="use --tasks-from FOLDER, or a machine with a network",
        ) from err


def set_shots(task: Any, shots: int, local: Local | None) -> str:
    """Set the number of examples in the prompt; why the task cannot have them, or "".

    Where a local task lacks the training split, the harness would draw them from the scored one in silence.
    """
    if shots and local is not None and local.spec.train and "train" not in local.files:
        return f"{shots}-shot prompts need examples: put {local.spec.name}_train.jsonl beside the documents"
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=SEED)
    return ""


def requests_digest(task: Any) -> str:
    """Digest of what the model is asked, in order: equal digests mean equal numbers for any model."""
    whole = hashlib.sha256()
    for one in task.instances:
        whole.update(json.dumps([one.request_type, one.doc_id, one.idx, one.args], sort_keys=True).encode())
    return whole.hexdigest()[:12]
