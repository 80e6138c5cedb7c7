"""Small cases and whole calls of a family, for tests of what computes them."""

from glabench.cases import Case
from glabench.inputs import make_grad_out, make_inputs, make_state

LINEAR = ("gla", "simple_gla", "retention", "linear_attention")
RECURRENT = (*LINEAR, "mamba", "mamba2")


def case(seqlen, batch=2, heads=3, d_k=6, d_v=4, dtype="fp32"):
    """A case that no shape names; attention gets heads as wide as d_v."""
    return Case(
        shape="test",
        passes="fwd_bwd",
        batch=batch,
        seqlen=seqlen,
        heads=heads,
        d_k=d_k,
        d_v=d_v,
        head_dim=d_v,
        dtype=dtype,
    )


def case_of(family, seqlen, **sizes):
    """A case that gives `family` several heads: mamba2's are 64 channels wide."""
    return case(seqlen, **({"heads": 1, "d_v": 64} if family == "mamba2" else {}), **sizes)


def call(family, of, *, regime="trained", seed=0):
    """The tensors of one call, and the oracle's options: every gradient, and a state where there is one."""
    tensors = make_inputs(family, of, "cpu", seed, regime=regime)
    options = {"d_out": make_grad_out(family, of, "cpu", seed + 1)}
    if family in RECURRENT:
        options["initial_state"] = make_state(family, of, "cpu", seed + 2)
        options["d_state"] = make_state(family, of, "cpu", seed + 3)
    return tensors, options
