"""Parts of the model compiled: the same to rounding, once and for all steps."""

import pytest

OPTIONS = dict(dropout=0.1, attention_dropout=0.1, attention_chunk=5, nope_every=3, temperature_floor=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, keys",
    [(1, {}), (1, {"recompute": "full"}), (2, {"expert": 2, "recompute": "full"}), (2, {"recompute": "selective"})],
)
def test_compiled_parts_agree_and_are_compiled_once(pool, world, keys):
    """Rows of other documents at each step, an idle expert, recomputation: nothing is compiled again.

    Twelve parts: dropout of the embedding, queries and keys with RoPE and without, what follows attention, a dense
    SwiGLU, the residual sum; of a mixture rows in expert order, the SwiGLU of experts and of the shared expert, their
    sum, the statistics; the loss of a chunk.
    """
    for plain, fast, far, graphs, broken in pool.run(world, CASE, timeout=400, **OPTIONS, **keys):
        assert fast == pytest.approx(plain, rel=1e-6) and far < 1e-5
        assert graphs == (12, 12) and not broken


CASE = "tests.support.parallel_cases:compiled"
