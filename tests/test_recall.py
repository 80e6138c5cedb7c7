"""The verb `recall` end to end on small tasks, what it resumes, and the models it trains."""

import json
import math

import pytest
import torch
from tolerances import TWO_FP32_FORMS, difference
from training_calls import run

from glabench.quality import mqar, recall, recall_model, recall_rows
from glabench.quality.mixers import MIXERS
from glabench.quality.recall_model import RecallModel
from glabench.quality.recall_rows import FILE
from glabench.registry import implementations
from glabench.runners import recall_grid as grid

TINY = """
mixers = ["attention", "gla", "retnet", "mamba"]
dims = [16]
lrs = [1e-3, 1e30]
seqlen = 16
pairs = 2
vocab = 20
epochs = 2
examples = 40
batch = 16
test = 20
valid = 10
"""
# one pair: the answer is the only value in sight; a guess among values is right one time in four
EASY = ("--seqlen", 4, "--pairs", 1, "--vocab", 8, "--dims", 16, "--examples", 2000, "--batch", 32)
EASY += ("--lrs", "1e-4,1e-2,1", "--epochs", 4, "--mixers", "attention,gla", "--jobs", 1)


def implementation_of(mixer, device):
    """What the verb would take."""
    families = [MIXERS[mixer].family]
    return grid.implementations_for(families, "", device)[0][families[0]].id


def cell(mixer, **changes):
    heads, device = MIXERS[mixer].heads, changes.get("device", "cpu")
    return {
        **{"mixer": mixer, "impl": implementation_of(mixer, device), "dim": 16, "heads": heads},
        **{"layers": 2, "seqlen": 16, "pairs": 2, "vocab": 20, "lr": 1e-2, "seed": 0, "epochs": 2},
        **{"batch": 16, "examples": 40, "test": 20, "valid": 10, "dtype": "fp32", "device": "cpu"},
        **{"threads": 1, "graph": True, "compile": False},
        **changes,
    }


def model(mixer, **changes):
    names = ("dim", "heads", "layers", "vocab", "seqlen", "impl")
    torch.manual_seed(0)
    return RecallModel(
        mixer, **{name: value for name, value in cell(mixer, **changes).items() if name in names}
    )


def test_the_verb_writes_a_row_a_run_and_resumes_after_a_torn_line(tmp_path):
    panel = tmp_path / "tiny.toml"
    panel.write_text(TINY)
    words = ("recall", "--panel", panel, "--out", tmp_path / "out", "--jobs", 2, "--json")
    done = run(*words)
    assert done.exit_code == 0, done.stderr  # a rate that diverged is a result while another did not
    document = json.loads(done.stdout)
    rows = {(r["mixer"], r["lr"]): r for r in document["rows"]}
    assert len(rows) == 8 and document["trained"] == 8 and document["bad"] == 0
    for (_, lr), row in rows.items():
        if lr == 1e30:
            assert row["status"] == "error" and "loss is not finite in epoch" in row["reason"]
            assert row["acc_token_frac"] is None
        else:
            assert row["status"] == "ok" and (row["epochs"], row["steps"], row["stop"]) == (2, 6, "epochs")
            assert 0 <= row["acc_example_frac"] <= row["acc_token_frac"] <= 1
            assert abs(row["loss_nats"] - math.log(20)) < 1  # hardly trained
    assert rows["gla", 1e-3]["state_bytes"] == 4 * 2 * 2 * 4 * 8  # fp32, layers, heads, d_k, d_v
    assert rows["retnet", 1e-3]["state_bytes"] == 4 * 2 * 2 * 8 * 16
    assert rows["attention", 1e-3]["state_bytes"] == 4 * 2 * 2 * 16 * 16  # keys and values of 16 tokens
    assert {s["mixer"]: s["failed"] for s in document["summary"]} == dict.fromkeys(
        ("attention", "gla", "retnet", "mamba"), 1
    )
    curves = [json.loads(line) for line in (tmp_path / "out" / "curves.jsonl").read_text().splitlines()]
    assert len(curves) == 4 and all(len(c["epochs"]) == 2 for c in curves)

    path = tmp_path / "out" / FILE
    whole = path.read_text()
    path.write_text(whole[:-40])
    again = run(*words, "--resume")
    assert again.exit_code == 0 and "cut a torn last line" in again.stderr
    assert json.loads(again.stdout)["trained"] == 1 and "7 already done" in again.stderr
    assert path.read_text().startswith(whole[: whole.rstrip().rfind("\n")])
    assert len(json.loads(again.stdout)["rows"]) == 8


def test_models_solve_a_small_task_and_the_rest_of_their_sweep_is_left_out(tmp_path):
    done = run("recall", *EASY, "--stop-sweep", "--out", tmp_path, "--json")
    document = json.loads(done.stdout)
    solved = {r["mixer"]: r for r in document["rows"] if r["stop"] == "solved"}
    assert set(solved) == {"attention", "gla"} and document["left_out"] == 4
    assert all(r["acc_token_frac"] > 0.99 and r["val_acc_frac"] > 0.9 for r in solved.values())
    assert all(r["lr"] == 1e-2 for r in solved.values())  # the middle of the sweep goes first


@pytest.mark.slow
def test_the_quick_panel_is_solved_by_its_three_mixers(tmp_path):
    """A guess among the two values in sight is right half of the time; a recurrence has to associate."""
    done = run("recall", "--panel", "quick", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    summary = {s["mixer"]: s["acc_token_frac"] for s in json.loads(done.stdout)["summary"]}
    assert set(summary) == {"attention", "gla", "retnet"} and min(summary.values()) > 0.99


def test_a_control_that_does_not_learn_makes_the_others_errors(tmp_path):
    words = ("--panel", "quick", "--epochs", 1, "--examples", 64, "--jobs", 1)
    done = run("recall", *words, "--out", tmp_path, "--json")
    rows = {r["mixer"]: r for r in json.loads(done.stdout)["rows"]}
    assert done.exit_code == 1 and rows["attention"]["status"] == "ok"
    assert "1 epochs (not solved)" in done.stderr
    for name in ("gla", "retnet"):
        assert rows[name]["status"] == "error" and "control arm did not learn" in rows[name]["reason"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mixers", "gal"), "error: no mixer 'gal' (--mixers); did you mean 'gla'?"),
        (("--dims", "24", "--heads", "5"), "which do not split into 5 heads (dims); choose other --dims"),
        (("--dims", "18", "--mixers", "retnet"), "do not split into 2 even heads"),
        (
            ("--seqlen", "64", "--pairs", "17"),
            "error: 17 pairs do not fit in 64 tokens (options); at most 16",
        ),
        (("--seqlen", "63", "--pairs", "2"), "error: a sequence of 63 tokens is odd"),
        (
            ("--pairs", "4", "--seqlen", "64", "--vocab", "64"),
            "a vocabulary of 64 is too small for 64 tokens",
        ),
        (("--panel", "qiuck"), "error: no panel 'qiuck' (--panel); did you mean 'quick'?"),
        (("--panel", "no.toml"), "error: cannot read no.toml"),
        (("--lrs", "fast"), "error: 'fast' are no learning rates (--lrs)"),
        (("--lrs", "-1"), "is not above 0"),
        (("--lrs", "1e-3,0.001"), "error: lrs names a value twice"),
        (("--shard", "2/2"), "error: no shard '2/2' (--shard); write I/N"),
        (("--impl", "mamba_torch"), "error: 'mamba_torch' serves no mixer here (--impl)"),
        (("--batch", "17000"), "error: a batch of 17000 of 16000 examples"),
        (("--dtype", "fp8"), "error: no dtype 'fp8' (--dtype)"),
        (("--cell-limit", "0"), "error: 0 is not a time (--cell-limit)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("recall", *words)
    assert done.exit_code == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_an_unknown_key_of_a_panel_file_is_named(tmp_path):
    (tmp_path / "mine.toml").write_text(TINY + "dropout = 0.1\n")
    done = run("recall", "--panel", tmp_path / "mine.toml", "--dry-run")
    assert done.exit_code == 2 and "error: no key 'dropout' (mine.toml)" in done.stderr


def test_the_papers_panels_are_its_protocol():
    a, b = grid.panels("paper", {}, "cuda")
    assert [(p.seqlen, p.pairs, p.batch, p.dtype) for p in (a, b)] == [
        (256, 16, 256, "bf16"),
        (512, 64, 128, "bf16"),
    ]
    assert a.dims == (64, 128, 256, 512) and a.lrs == pytest.approx(
        [10**e for e in (-4, -10 / 3, -8 / 3, -2)]
    )
    assert (a.vocab, a.examples, a.test, a.epochs, a.layers) == (8192, 100_000, 3_000, 64, 2)
    assert len(a.cells()) == 4 * 4 * 4 * 1
    assert {c.heads for c in a.cells() if c.mixer in ("gla", "retnet")} == {2}


def test_shards_share_out_every_model_once_with_all_its_rates():
    cells = [c for p in grid.panels("paper", {"seeds": 2}, "cuda") for c in p.cells()]
    shards = [grid.in_order(cells, (i, 3)) for i in range(3)]
    assert sorted(map(id, cells)) == sorted(id(c) for shard in shards for c in shard)
    models = [{c.model for c in shard} for shard in shards]
    assert not models[0] & models[1] and not models[1] & models[2] and not models[0] & models[2]
    work = [sum(c.cost() for c in shard) for shard in shards]
    assert max(work) < 1.3 * min(work)
    first = grid.in_order(cells, None)
    assert [c.lr for c in first[:64]] == [
        pytest.approx(2.154e-3, rel=1e-3)
    ] * 64  # a likely rate of every model
    assert first[0].dim == 512 and first[0].panel.seqlen == 512  # the longest run first


def test_heads_that_kernels_do_not_take_go_to_plain_pytorch_unless_a_kernel_was_asked_for():
    (panel,) = grid.panels("a", {"mixers": ("gla",), "dims": (32, 64)}, "cuda")
    options = {"panels": [panel], "cells": panel.cells(), "impls": {"gla": implementations()["gla_chunk"]}}
    options |= {"device": "cuda", "jobs": 1, "out": None, "resume": False, "stop_sweep": False}
    asked = grid.Request(**options, compiled=False, cell_limit_s=1.0)
    narrow, wide = (next(c for c in panel.cells() if c.dim == dim) for dim in (32, 64))
    assert (asked.impl(narrow).id, asked.impl(wide).id) == ("gla_chunk_torch", "gla_chunk")
    fixed = grid.Request(**options, fixed=frozenset({"gla"}), compiled=False, cell_limit_s=1.0)
    assert fixed.impl(narrow).id == "gla_chunk" and "8 wide" in fixed.misfit(narrow)


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_follows_a_query_does_not_change_its_answer(mixer, one_thread):
    net = model(mixer, dim=32).eval()
    examples = mqar.draw(3, 16, 2, 20, 0)
    at = torch.full((3, 1), 7)
    other = examples.tokens.clone()
    other[:, 8:] = 5
    with torch.no_grad():
        ours, theirs = (net.logits(net(tokens, at)) for tokens in (examples.tokens, other))
        early = examples.tokens.clone()
        early[:, 0] = 9
        moved = net.logits(net(early, at))
    assert ours.shape == (3, 1, 20)
    assert torch.equal(ours, theirs) and not torch.equal(ours, moved)


def test_mambas_block_is_transformers_block(one_thread):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaForCausalLM

    torch.manual_seed(0)
    ours = recall_model.Mamba(24, "mamba_torch")
    config = MambaConfig(hidden_size=24, num_hidden_layers=1, vocab_size=8, state_size=16, expand=2)
    theirs = MambaForCausalLM(config).backbone.layers[0].mixer
    weights = ours.state_dict()
    weights["dt_proj.weight"], weights["dt_proj.bias"] = weights.pop("dt_weight"), weights.pop("dt_bias")
    theirs.load_state_dict(weights)
    x = torch.randn(2, 19, 24)
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) < TWO_FP32_FORMS


@pytest.mark.parametrize("mixer", ["attention", "gla", "mamba"])
def test_a_run_repeats_to_the_bit_and_another_seed_is_another_run(mixer, one_thread):
    first, again, other = (recall.train(cell(mixer, seed=seed)) for seed in (0, 0, 1))
    assert first["curve"] == again["curve"] and first["curve"] != other["curve"]


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_captured_step_trains_as_the_plain_one_does(mixer, monkeypatch):
    """Without dropout, which a graph draws elsewhere; of 40 examples the last 8 are no whole batch."""
    monkeypatch.setattr(recall_model, "DROPOUT", 0.0)
    shape = {"dim": 64, "device": "cuda", "epochs": 3, "lr": 1e-3}
    graphed, plain = (recall.train(cell(mixer, **shape, graph=graph)) for graph in (True, False))
    assert (graphed["graphed"], plain["graphed"]) == ("yes", "no")
    losses = [[epoch[0] for epoch in one["curve"]] for one in (graphed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][2] < losses[0][0] - 0.1


def test_the_rate_falls_by_a_cosine_over_the_epochs_and_decay_reaches_every_weight(one_thread):
    training = recall.Run(cell("gla", epochs=4, lr=0.5), mqar.draw(40, 16, 2, 20, 0), torch.device("cpu"))
    rates = []
    for number in range(4):
        training.epoch(number)
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.25 + 0.25 * 0.5**0.5, 0.25, 0.25 - 0.25 * 0.5**0.5])
    (group,) = training.optimizer.param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(list(training.model.parameters()))


def test_accuracies_count_queries_and_whole_examples(one_thread):
    training = recall.Run(cell("attention"), mqar.draw(40, 16, 2, 20, 0), torch.device("cpu"))
    examples = mqar.draw(50, 16, 2, 20, 1)
    with torch.no_grad():
        training.model.eval()
        guesses = training.model.logits(training.model(examples.tokens, examples.queries)).argmax(-1)
    right = [
        [int(g) == int(a) for g, a in zip(*row, strict=True)]
        for row in zip(guesses, examples.answers, strict=True)
    ]
    token, example = training.accuracy(examples)
    assert token == sum(map(sum, right)) / 100 and example == sum(map(all, right)) / 50
    answers = mqar.Examples(examples.tokens, examples.queries, guesses.int())
    assert training.accuracy(answers) == (1.0, 1.0)


def test_published_accuracies_are_figure_4s():
    printed = recall_rows.published()
    assert len(printed) == 40
    assert [printed["gla", 512, 64, d] for d in (64, 128, 256, 512)] == [0.22, 0.95, 1.0, 1.0]
