"""States of language models: prompts cut anywhere, generation, padding, gradients across pieces."""

import pytest
import torch
from small_models import GATES, KINDS, small, tokens
from tolerances import EXACT, difference

from glabench.errors import UsageError
from glabench.models import RecurrentState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_state_stands_for_the_tokens_before_it(kind):
    model, ids = small(kind), tokens(length=20)
    with torch.no_grad():
        want = model(ids).logits
        out = model(ids[:, :13], use_cache=True)
        parts, first = [out.logits], out.past_key_values
        for t in range(13, 18):  # token by token, then a longer piece
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        parts.append(model(ids[:, 18:], past_key_values=out.past_key_values).logits)
        again = model(ids[:, 13:], past_key_values=first).logits
    assert difference(torch.cat(parts, 1), want) < EXACT
    assert difference(again, want[:, 13:]) < EXACT and first.seen == 13


@pytest.mark.parametrize("kind", ["retnet", {"gate": "channel"}], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_state_is_generation_without(kind, beams):
    model, ids = small(kind, eos_token_id=None), tokens(length=7)
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    got = model.generate(ids, use_cache=True, **options)
    assert got.shape == (2, 16) and torch.equal(got, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["retnet", *({"gate": g} for g in GATES)], ids=str)
def test_padding_at_the_left_changes_nothing(kind):
    model, ids = small(kind, eos_token_id=None, pad_token_id=0), tokens(length=20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    out = model(ids, attention_mask=mask, use_cache=True)
    alone = model(ids[1:, 6:], use_cache=True)
    assert difference(out.logits[1:, 6:].detach(), alone.logits.detach()) < EXACT
    if kind != "retnet":  # whose keys are turned by where they stand
        padded, short = out.past_key_values.states[1], alone.past_key_values.states[1]
        assert difference(padded[1:].detach(), short.detach()) < EXACT
    step, whole = ids[:, :1], torch.cat((mask, mask[:, :1] | 1), 1)
    got = model(step, attention_mask=whole, past_key_values=out.past_key_values).logits[1:]
    assert (
        difference(got.detach(), model(step[1:], past_key_values=alone.past_key_values).logits.detach())
        < EXACT
    )
    pair = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    one = model.generate(ids[1:, 6:], attention_mask=mask[1:, 6:], max_new_tokens=5, do_sample=False)
    assert torch.equal(pair[1, 20:], one[0, 14:])


def test_padding_elsewhere_is_harmless_or_refused():
    model, ids = small(), tokens(length=8)
    right, middle = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 5:] = middle[1, 3] = 0
    out = model(ids, attention_mask=right)
    assert difference(out.logits[1, :5].detach(), model(ids[1:, :5]).logits[0].detach()) < EXACT
    assert out.past_key_values is None
    state = model(ids, use_cache=True).past_key_values
    for mask, options, text in (
        (right, {"use_cache": True}, "padding at the right would decay the state"),
        (middle, {}, "zeros between tokens"),
        (middle.flip(0), {"use_cache": True}, "zeros between tokens"),
        (1 - right, {"past_key_values": state}, "padding after a state"),
        (right[:, :3], {}, "a mask of shape [2, 3] for 8 tokens"),
    ):
        with pytest.raises(UsageError) as caught:
            model(ids, attention_mask=mask, **options)
        assert text in str(caught.value)


def gradients(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def checkpointing(model, what):
    """transformers renamed it during version 5."""
    names = (f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient"))
    getattr(model, next(n for n in names if hasattr(model, n)))()


@pytest.mark.parametrize("kind", ["retnet", {"gate": "channel"}], ids=str)
def test_checkpointing_keeps_gradients_and_recomputes(kind):
    model, ids = small(kind).train(), tokens()
    runs = []
    model.model.layers[0].attn.register_forward_hook(lambda *_: runs.append(1))
    plain = gradients(model, ids)
    assert len(runs) == 1
    checkpointing(model, "enable")
    state = model(ids, use_cache=True).past_key_values.detach()
    runs.clear()
    saved = gradients(model, ids)
    assert len(runs) == 2 and all(difference(saved[n], g) < EXACT for n, g in plain.items())
    carried = gradients(model, ids, past_key_values=state)
    checkpointing(model, "disable")
    want = gradients(model, ids, past_key_values=state)
    assert all(difference(carried[n], g) < EXACT for n, g in want.items())


def test_states_carry_gradients_until_detached():
    """Back-propagation through time: two halves with a live state give the whole's gradients."""
    model, ids = small().train(), tokens(length=24)
    model(ids).logits.square().sum().backward()
    whole = model.model.embeddings.weight.grad.clone()
    cut = {}
    for detached in (False, True):
        model.zero_grad()
        first = model(ids[:, :12], use_cache=True)
        state = first.past_key_values.detach() if detached else first.past_key_values
        second = model(ids[:, 12:], past_key_values=state, use_cache=True)
        (first.logits.square().sum() + second.logits.square().sum()).backward()
        cut[detached] = model.model.embeddings.weight.grad.clone()
        assert isinstance(second.past_key_values, RecurrentState) and second.past_key_values.seen == 24
    assert difference(cut[False], whole) < EXACT and difference(cut[True], whole) > 1e-3
