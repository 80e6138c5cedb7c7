"""GLA, one token with a state, by flash-linear-attention's fused recurrent kernel."""

from glabench.installed import import_leaf
from glabench.registry import implementation


@implementation(
    label="GLA step (fla)",
    passes=("decode",),
    needs=("torch", "triton", "fla", "cuda"),
    preference=30,
    compiles=True,
    note="a new state a step, not in place",
)
def load():
    # the packages above import every layer and model of fla, and with them transformers
    recurrent = import_leaf("fla.ops.gla").fused_recurrent_gla

    def gla(q, k, v, g, state):
        return recurrent(q, k, v, gk=g, initial_state=state, output_final_state=True)

    return gla
