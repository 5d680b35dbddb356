"""What holds for any tree, drawn by hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_equal, assert_same_types
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import GRID, SPECS

import adamjax

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])


@st.composite
def leaves(draw):
    """A None, or (shape, dtype of the parameter, dtype of the gradient or None for no gradient)."""
    if draw(st.integers(0, 5)) == 0:
        return None
    dtype = draw(DTYPES)
    gradient = draw(DTYPES.filter(lambda g: dtype == "complex64" or g != "complex64") | st.none())
    return Leaf(draw(SHAPES), dtype, gradient)


class Leaf:
    """Opaque to JAX: a leaf."""

    def __init__(self, shape, dtype, gradient):
        self.shape, self.p_dtype, self.g_dtype = shape, dtype, gradient

    def __repr__(self):
        return f"Leaf{self.shape, self.p_dtype, self.g_dtype}"


TREES = st.recursive(
    leaves(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), children, max_size=3)
    ),
    max_leaves=5,
)


def draw_array(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0)
    return jnp.asarray(x, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tree=TREES, name=st.sampled_from(GRID))
def test_any_tree(tree, name):
    opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), SPECS[name].make())
    params = jax.tree.map(lambda x: draw_array(x.shape, x.p_dtype, 0), tree)
    grads = jax.tree.map(lambda x: None if x.g_dtype is None else draw_array(x.shape, x.g_dtype, 1), tree)
    state = opt.init(params)
    updates, new_state = jax.eval_shape(opt.update, grads, state, params)
    assert_same_types(new_state, state)
    assert_same_types(updates, params)
    new_params, new_state = opt.step(grads, state, params)
    assert_same_types(new_params, params)
    assert_same_types(new_state, state)
    for before, after, g in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(new_params),
        jax.tree.leaves(jax.tree.map(lambda x: x.g_dtype is None, tree)),
        strict=True,
    ):
        if g:
            assert_equal(after, before)
        assert np.all(np.isfinite(np.asarray(after, np.complex64)))
    restored = jax.tree.unflatten(*reversed(jax.tree.flatten(new_state)))
    assert_equal(restored, new_state)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    exponents=st.lists(st.floats(-12, 4), min_size=3, max_size=3),
    rate=st.floats(1e-6, 1.0),
    b2=st.floats(0, 0.9999),
)
def test_a_first_step_has_the_size_of_the_learning_rate(dtype, exponents, rate, b2):
    """Whatever the scale of the gradients, as long as it is above epsilon's."""
    g = jnp.asarray(10.0 ** np.array(exponents), dtype)
    p = jnp.zeros(3, "float32")
    update, _ = adamjax.adam(rate, b2=b2, eps=1e-30).update(g, adamjax.adam().init(p), p)
    expected = np.where(np.asarray(g, np.float64) > 0, -rate, 0)
    np.testing.assert_allclose(np.asarray(update, np.float64), expected, rtol=1e-5)
