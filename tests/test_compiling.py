"""Models compiled block by block: the same loss and gradients, one graph for all layers."""

from contextlib import nullcontext

import pytest
import torch
from tolerances import TWO_FP32_FORMS, difference
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

from glabench.models import catalog
from glabench.models.compiling import compile_blocks
from glabench.training.segments import segment_losses

# dynamo itself looks at .grad of what is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3}
MORE = {
    "gla": {"num_heads": 2, "implementation": "gla_recurrent"},  # traced; the chunks of a CPU break graphs
    "transformer": {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2},
    "mamba": {},
    "mamba2": {"num_heads": 1},
}
GRAPHS = {"gla": 2, "transformer": 2, "mamba": 3, "mamba2": 3}  # a block (before and after a mixer), the norm


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", MORE)
def test_compiled_blocks_give_the_eager_loss_and_gradients(family):
    torch.manual_seed(0)
    model = catalog.build(f"{family}-tiny", **SHAPE, **MORE[family]).train()
    ids = torch.randint(256, (2, 7))
    eager, wanted = step(model, ids)
    compile_blocks(model, backend="aot_eager")
    mine, found = step(model, ids)
    assert abs(mine - eager) <= TWO_FP32_FORMS * eager
    assert max(difference(found[name], g) for name, g in wanted.items()) <= TWO_FP32_FORMS
    assert counters["stats"]["unique_graphs"] == GRAPHS[family]


def test_segments_make_two_graphs_a_block_and_none_after_the_first_step():
    torch.manual_seed(0)
    model = catalog.build("gla-tiny", **SHAPE, **MORE["gla"]).train()
    compile_blocks(model, backend="aot_eager")
    graphs = []
    for _ in range(3):
        for loss in segment_losses(model, torch.randint(256, (2, 28)), 4, nullcontext):
            loss.backward()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2] + [3] * 11  # a block without a state and the norm, then a block with one


def test_a_model_without_blocks_of_that_name_is_compiled_whole():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).eval()
    compile_blocks(model, backend="eager")
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 9)
    assert counters["stats"]["unique_graphs"] >= 1
