"""Rows of recall made up for tests of figures and summaries; their numbers are no measurement."""

import math

from glabench.quality.mixers import MIXERS
from glabench.quality.recall_rows import FILE, RecallRow
from glabench.results import RowFile

RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)


def made_row(mixer, dim, lr, seed, *, seqlen=256, pairs=16, **fields):
    """An ok row whose accuracy grows with the width and has its best rate in the middle."""
    off = abs(math.log10(lr) - math.log10(1.5e-3))
    level = {"attention": 6.0, "gla": 2.2, "retnet": 1.6, "mamba": 3.0}.get(mixer, 1.0)
    accuracy = 1 / (1 + math.exp(-level * (math.log2(dim / 64) + 1.2 - pairs / 40 - off) + seed / 3))
    values = {
        "acc_token_frac": accuracy,
        "acc_example_frac": accuracy**pairs,
        "val_acc_frac": accuracy,
        "loss_nats": 1 - accuracy,
        "epochs": 8,
        "steps": 3128,
        "stop": "solved" if accuracy > 0.99 else "epochs",
    }
    if fields.get("status", "ok") != "ok":
        values = {}
    return RecallRow(
        verb="recall",
        suite="fig4",
        case=f"{seqlen} {pairs} {mixer} {dim} {lr} {fields.get('layers', 2)}",
        impl="an_impl",
        impl_version="0",
        family=MIXERS[mixer].family,
        device="cpu",
        env="0123456789ab",
        seed=seed,
        mixer=mixer,
        seqlen=seqlen,
        kv_pairs=pairs,
        vocab=8192,
        d_model=dim,
        lr=lr,
        epochs_max=16,
        batch=65536 // seqlen,
        examples=100000,
        test=3000,
        valid=1000,
        dtype="bf16",
        **{"layers": 2, "heads": MIXERS[mixer].heads, **values, **fields},
    )


def made_folder(folder, mixers=("attention", "gla", "retnet", "mamba"), dims=(64, 128, 256, 512), seeds=3):
    """recall.csv of two tasks; one run of it diverged."""
    file = RowFile(folder / FILE, RecallRow)
    for seqlen, pairs in ((256, 16), (512, 64)):
        for mixer in mixers:
            for dim in dims:
                for lr in RATES:
                    for seed in range(seeds):
                        bad = (mixer, dim, lr, seed) == ("retnet", 512, 1e-2, 1)
                        fields = {"status": "error", "reason": "diverged: the loss"} if bad else {}
                        file.append(made_row(mixer, dim, lr, seed, seqlen=seqlen, pairs=pairs, **fields))
    return folder
