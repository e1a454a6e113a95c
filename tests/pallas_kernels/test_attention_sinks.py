"""Attention sinks: against float64, against gpt-oss' own attention in transformers, and a softmax over one more logit."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels.attention import MaskSpec, attention, attention_reference
from jaxpar.pallas_kernels.attention import sinks as module
from jaxpar.pallas_kernels.decode import decode_attention
from tests.pallas_kernels.attention_cases import draw, errors, float64, seen_by
from tests.pallas_kernels.test_attention_mutants import load

SHAPE, STARTS, SCALE, CAP = (2, 20, 24, 4, 2, 16), (9, 3), 0.7, 3.0
SINKS = np.array([-3.0, 0.5, 2.0, 30.0], np.float32)
"""From next to nothing to nearly all of a query's attention."""
NAMES = ("out", "lse", "dq", "dk", "dv", "d_sinks")


@pytest.fixture(scope="module")
def problem():
    """Inputs, the mask, and the truth. Some queries see nothing."""
    given = draw(0, *SHAPE)
    # Documents 1 and 2, from the 18th token on; two queries are padding.
    of = lambda first, count: 1 + np.tile(first + np.arange(count) >= 18, (2, 1)).astype(np.int32)
    mask = MaskSpec(window=8, q_segments=of(9, 20) * (np.arange(20) > 1), k_segments=of(3, 24))
    seen = seen_by(mask, *SHAPE[:3], *STARTS)
    assert not seen.any(axis=2).all()
    assert seen.any(axis=2).mean() > 0.3
    return given, mask, float64(*given, seen, SCALE, CAP, SINKS)


def both(function, given, mask):
    """out and lse, and the gradients of q, k, v and the sinks."""
    q, k, v, d_out, d_lse = map(jnp.asarray, given)
    place = dict(mask=mask, scale=SCALE, cap=CAP, q_start=STARTS[0], k_start=STARTS[1])

    @jax.jit
    def run(q, k, v, sinks):
        outs, back = jax.vjp(lambda q, k, v, sinks: function(q, k, v, sinks_H=sinks, **place), q, k, v, sinks)
        return *outs, *back((d_out.astype(q.dtype), d_lse))

    return run(q, k, v, jnp.asarray(SINKS))


IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": lambda *x, **call: attention(*x, **call, lse_out=True, implementation="xla"),
    "mosaic_tpu": lambda *x, **call: attention(*x, **call, lse_out=True, implementation="mosaic_tpu", interpret=True),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_against_float64(problem, name):
    given, mask, expected = problem
    for label, a, b in zip(NAMES, both(IMPLEMENTATIONS[name], given, mask), expected, strict=True):
        assert errors(np.atleast_2d(a), np.atleast_2d(b))[0] < 3e-6, label
        assert np.abs(b).max() > 0.01, label


def test_against_transformers_gpt_oss():
    """Forward and backward, by torch's own differentiation."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
    q, k, v, d_out, _ = draw(3, 2, 12, 12, 4, 2, 8)
    to = lambda x: torch.tensor(np.moveaxis(x, 1, 2).copy(), requires_grad=True)
    inputs, sinks = [to(x) for x in (q, k, v)], torch.tensor(SINKS, requires_grad=True)
    hidden = torch.full((12, 12), float("-inf")).triu(1)[None, None]
    layer = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False)
    out, _ = theirs(layer, *inputs, hidden, 0.4)
    (out * torch.tensor(d_out)).sum().backward()
    run = lambda *x: attention(*x[:3], mask=MaskSpec(), scale=0.4, sinks_H=x[3])
    found, back = jax.jit(lambda *x: (lambda f: (f[0], f[1](jnp.asarray(d_out))))(jax.vjp(run, *x)))(q, k, v, SINKS)
    np.testing.assert_allclose(found, out.detach().numpy(), atol=2e-6)
    for a, b in zip(back[:3], inputs, strict=True):
        np.testing.assert_allclose(a, np.moveaxis(b.grad.numpy(), 1, 2), atol=1e-5)
    np.testing.assert_allclose(back[3], sinks.grad.numpy(), atol=1e-5)


@pytest.mark.quick
def test_decoding_has_them_and_it_is_a_softmax_over_one_more_logit():
    q, k, v, *_ = draw(5, 2, 1, 9, 4, 2, 8)
    lens = np.array([9, 4], np.int32)
    out = jax.jit(lambda *x: decode_attention(*x[:4], scale=0.4, sinks_H=x[4]))(q, k, v, lens, SINKS)
    for b, h in np.ndindex(2, 4):
        logits = [0.4 * float(q[b, 0, h] @ k[b, s, h // 2]) for s in range(lens[b])] + [float(SINKS[h])]
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(out[b, 0, h], weights[:-1] @ v[b, : lens[b], h // 2], atol=2e-6)


@pytest.mark.quick
def test_mutants_are_killed(problem, monkeypatch):
    given, mask, expected = problem
    plain = float64(*given, seen_by(mask, *SHAPE[:3], *STARTS), SCALE, CAP)[:2]

    def right(with_sinks):
        found = with_sinks(*(jnp.asarray(x, jnp.float32) for x in plain), jnp.asarray(SINKS))
        return all(np.isfinite(a).all() and errors(a, b)[0] < 3e-6 for a, b in zip(found, expected[:2], strict=True))

    source = Path(module.__file__).read_text()
    assert right(module.with_sinks)
    for old, new in (
        ("sigmoid(lse_BxHxT - sinks_1xHx1)", "sigmoid(lse_BxHxT)"),
        ("sigmoid(lse_BxHxT - sinks_1xHx1)", "sigmoid(sinks_1xHx1 - lse_BxHxT)"),
        ("jnp.logaddexp(lse_BxHxT, sinks_1xHx1)", "lse_BxHxT"),
        ("[None, :, None]", "[None, ::-1, None]"),
    ):
        assert old in source, old
        assert not right(load(module, source.replace(old, new), monkeypatch).with_sinks), new


@pytest.mark.quick
def test_what_it_cannot_do_is_one_sentence():
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    call = lambda sinks, **more: attention(q, q, q, mask=MaskSpec(), scale=1.0, sinks_H=sinks, **more)
    for bad, words in [
        (lambda: call(jnp.ones(3)), r"a float sink for each of the 2 heads; got float32 \(3,\)"),
        (lambda: call(jnp.ones(2, jnp.int32)), "got int32"),
        (
            lambda: call(jnp.ones(2), implementation="cudnn"),
            "no differentiable log-sum-exp, which lse_out and sinks need",
        ),
    ]:
        with pytest.raises(ValueError, match=words) as found:
            bad()
        assert "\n" not in str(found.value)
