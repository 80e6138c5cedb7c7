"""The parts of training that need no run: data order, schedule, weight decay, segments, settings."""

import tomllib

import numpy as np
import pytest
import torch
from tolerances import TRAINING
from training_calls import MODEL, SAMPLE, run

from glabench.corpus import manifest as corpus
from glabench.errors import UsageError
from glabench.training import folder, optimizer, settings
from glabench.training.metrics import COLUMNS, Metric, MetricsFile
from glabench.training.order import Order
from glabench.training.schedule import learning_rate
from glabench.training.segments import segment_losses

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model():
    from glabench.training.model import build_model

    torch.manual_seed(0)
    return build_model(tomllib.loads(MODEL.format(model=""))["model"], 257)


def test_segments_carry_the_state_and_not_the_gradient():
    model, ids = small_model(), torch.arange(2 * 24).reshape(2, 24) % 257
    embedding = model.get_input_embeddings()
    first, second = segment_losses(model, ids, 2, torch.no_grad)
    logits = model(input_ids=ids).logits
    wanted = [
        torch.nn.functional.cross_entropy(
            logits[:, a : a + 11].flatten(0, 1), ids[:, a + 1 : a + 12].flatten()
        )
        for a in (0, 12)
    ]
    assert abs(first / wanted[0] - 1) < TRAINING and abs(second / wanted[1] - 1) < TRAINING
    seen = []
    embedding.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    for number, loss in enumerate(segment_losses(model, ids, 2, torch.enable_grad)):
        before = [None if out.grad is None else out.grad.clone() for out in seen[:number]]
        loss.backward()
        assert seen[number].grad.abs().sum() > 0
        assert all(torch.equal(out.grad, old) for out, old in zip(seen, before, strict=False))


def test_the_order_is_a_permutation_of_each_epoch_and_a_function_of_the_seed(tmp_path):
    data = tmp_path / "bytes"
    run("data", "prepare", SAMPLE / "valid", "--out", data, "--tokenizer", "bytes", "--valid-frac", "0")
    tokens = corpus.Tokens(data, corpus.read_manifest(data), "train")
    order, count = Order(tokens, 64, seed=0), len(tokens) // 64
    epochs = [[order.sequence(e * count + n) for n in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count)) and epochs[0] != epochs[1]
    assert epochs[0] != [Order(tokens, 64, seed=1).sequence(n) for n in range(count)]
    fresh = Order(tokens, 64, seed=0)
    rows = fresh.rows(count - 2, 4)  # across the epochs' border, asked for out of the blue
    wanted = [tokens.read(i * 64, 64) for i in (*epochs[0][-2:], *epochs[1][:2])]
    assert np.array_equal(rows, wanted)


def test_the_schedule_is_the_papers():
    """GLA §5.1: 3e-4 at most, 3e-5 at both ends, linear warm-up, cosine."""
    paper = settings.load("gla-340m").settings
    assert (paper.lr, paper.lr_end, paper.weight_decay, paper.clip) == (3e-4, 3e-5, 0.01, 1.0)
    assert paper.batch_tokens * paper.steps == pytest.approx(15e9, rel=1e-4)  # tokens
    assert paper.batch_tokens * paper.warmup_steps == pytest.approx(0.5e9, rel=1e-3)
    rate = [learning_rate(step, paper) for step in range(paper.steps)]
    assert rate[0] == 3e-5 and rate[954] == max(rate) == 3e-4 and rate[-1] == pytest.approx(3e-5, rel=1e-9)
    assert rate[477] == pytest.approx((3e-5 + 3e-4) / 2, rel=1e-9)  # half of the warm-up
    half = (954 + paper.steps - 1) / 2
    assert learning_rate(half, paper) == pytest.approx((3e-5 + 3e-4) / 2, rel=1e-9)


def test_norms_and_biases_do_not_decay():
    model = small_model()
    made = optimizer.make(model, settings.load("gla-340m").settings)
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in made.param_groups}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[i] for i in groups[0.0]) and len(groups[0.0]) == 5
    assert set(names) == groups[0.0] | groups[0.01]


def test_a_name_that_is_no_configuration_is_refused():
    with pytest.raises(UsageError, match="no configuration 'nonsense'"):
        settings.load("nonsense")


def test_any_number_of_steps_leaves_some_after_the_warm_up():
    for steps in (1, 2, 9, 10, 40, 4000):
        made = settings.load("gla-tiny", steps=steps).settings
        assert made.steps == steps and made.warmup_steps == min(40, max(1, steps // 10), steps - 1)


def test_a_metrics_file_is_cut_back_to_its_checkpoint_and_never_short(tmp_path):
    from glabench.errors import ResultsError

    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.append(
            Metric(
                step=step,
                tokens=8 * step,
                loss=1 / 3,
                lr=0.1,
                grad_norm=1.0,
                tokens_per_s=1.0,
                peak_mem_mib=1.0,
            )
        )
    with pytest.raises(ValueError, match="not finite"):
        file.append(
            Metric(
                step=4, tokens=8, loss=float("nan"), lr=0.1, grad_norm=1.0, tokens_per_s=1.0, peak_mem_mib=1.0
            )
        )
    file.close()
    MetricsFile(path, 2).close()
    assert path.read_text().splitlines() == [
        ",".join(COLUMNS),
        *(f"{n},{8 * n},{1 / 3!r},0.1,1.0,1.0,1.0," for n in (1, 2)),
    ]
    with pytest.raises(ResultsError, match="has 2 of the checkpoint's 5 steps"):
        MetricsFile(path, 5)


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with folder.claim(tmp_path / "run", {"seed": 0}):
        with pytest.raises(UsageError, match="another run writes here"), folder.claim(tmp_path / "run", {}):
            pass
        folder.note(tmp_path / "run", {"seed": 0}, {})
    with (
        pytest.raises(UsageError, match="made with seed 0, not 1"),
        folder.claim(tmp_path / "run", {"seed": 1}),
    ):
        pass
