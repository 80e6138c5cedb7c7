"""A made-up GPU's training calls: a mixer whose step cannot be captured, one that finds no memory."""

import os
from pathlib import Path

RESULT = {
    **{"acc_token_frac": 0.5, "acc_example_frac": 0.1, "val_acc_frac": 0.4, "loss_nats": 1.0, "epochs": 1},
    **{"steps": 1, "stop": "epochs", "params": 1, "state_bytes": 1, "compiled": "no", "epoch_s": 0.1},
    **{"train_s": 0.1, "peak_mem_mib": 1.0, "curve": [[1.0, 0.5, 0.1, 0.4]]},
}


def train(cell):
    """Ends its process where it would capture gla; mamba runs out of memory the first time it is tried."""
    if cell["mixer"] == "gla" and cell["graph"]:
        os.write(2, b"no CUDA graph: operation not permitted\n")
        os._exit(1)
    tried = Path(os.environ["RECALL_DEVICE"]) / f"{cell['mixer']}-{cell['dim']}"
    if cell["mixer"] == "mamba" and not tried.exists():
        tried.touch()
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return {**RESULT, "graphed": "yes" if cell["graph"] else "no"}
