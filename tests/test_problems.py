"""The problems beside the digits: a convolutional network and a transformer."""

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_equal, assert_same_types
from tolerances import RECOMPILED

import adamjax
from adamjax import problems
from adamjax.problems._text import sentence, texts
from adamjax.training import train

pytestmark = pytest.mark.numbers

SMALL = {
    "digits_convnet": problems.digits_convnet(channels=(4, 6, 8), batch_size=8),
    "characters": problems.characters(width=16, depth=1, heads=2, context=12, batch_size=4),
}
each_problem = pytest.mark.parametrize("problem", SMALL.values(), ids=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "steps", "accuracy"),
    [
        (problems.digits_convnet(), 300, 0.96),  # typically 0.98
        (problems.characters(width=32, batch_size=16), 150, 0.65),  # 0.75 to 0.79; spaces alone are 0.14
    ],
)
def test_they_learn(problem, steps, accuracy):
    *_, report = train(problem, adamjax.adamw(4e-3), steps=steps)
    assert report.metrics["accuracy"] > accuracy


@each_problem
def test_batches_follow_from_step_and_key(problem):
    problems.check(problem)
    batch = jax.jit(problem.batch)
    first = batch(0, jax.random.key(0))
    assert_equal(batch(0, jax.random.key(0)), first)
    for other in (batch(1, jax.random.key(0)), batch(0, jax.random.key(1))):
        assert_same_types(other, first)
        assert not np.array_equal(jax.tree.leaves(other)[0], jax.tree.leaves(first)[0])


@pytest.mark.slow
@each_problem
def test_half_precision_gradients(problem):
    """In float16, which is promoted as bfloat16 is, and overflows sooner."""

    @jax.jit
    def start(key):
        params = jax.tree.map(lambda p: p.astype("float16"), problem.init(key))
        return params, jax.value_and_grad(problem.loss)(params, problem.batch(0, key), key)

    params, (loss, grads) = start(jax.random.key(0))
    assert loss.dtype == "float32"
    assert_same_types(grads, params)
    for g in jax.tree.leaves(grads):
        g = np.asarray(g, np.float32)
        assert np.isfinite(g).all()
        assert g.any()


@pytest.mark.slow
@each_problem
def test_vmapping_changes_nothing(problem):
    init, batch = jax.jit(problem.init), jax.jit(problem.batch)(0, jax.random.key(2))
    members = [init(jax.random.key(seed)) for seed in (0, 1)]

    def measured(params):
        return jax.value_and_grad(problem.loss)(params, batch, None), problem.evaluate(params)

    alone = jax.jit(measured)
    together = jax.jit(jax.vmap(measured))(jax.tree.map(lambda *x: np.stack(x), *members))
    together = jax.tree.map(np.asarray, together)
    for i, params in enumerate(members):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone(params), 10 * RECOMPILED)


def test_the_future_is_not_seen():
    problem = SMALL["characters"]
    params = jax.jit(problem.init)(jax.random.key(0))
    window = np.asarray(jax.jit(problem.batch)(0, jax.random.key(1)))[:1, :-1]
    changed = window.copy()
    changed[0, 7] += 1
    logits = jax.jit(problem._logits)
    before, after = np.asarray(logits(params, window)), np.asarray(logits(params, changed))
    np.testing.assert_array_equal(before[0, :7], after[0, :7])
    assert (before[0, 7:] != after[0, 7:]).any(axis=-1).all()


def test_text():
    train_text, validation_text = texts()
    assert texts() == (train_text, validation_text)
    first, second = ({*text.splitlines()} for text in (train_text, validation_text))
    assert len(first) == len(second) == 700
    assert not first & second
    assert sentence(123, 127) == "one hundred and twenty-three plus four is one hundred and twenty-seven.\n"
    assert sentence(800, 19) == "eight hundred minus nineteen is seven hundred and eighty-one.\n"
    assert sentence(60, 60) == "sixty minus sixty is zero.\n"


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        ("digits_convnet", {"channels": ()}, r"channels value: \(\); channels must hold a positive int"),
        ("digits_convnet", {"channels": (8, 0)}, "channels value"),
        ("digits_convnet", {"channels": (2.5,)}, "channels value"),
        ("digits_convnet", {"batch_size": 0}, "batch_size value: 0; batch_size must be a positive int"),
        ("characters", {"width": 0}, "width value: 0; width must be a positive int"),
        ("characters", {"width": 30}, r"width value: 30; width must be a multiple of heads \(4\)"),
        ("characters", {"depth": -1}, "depth value"),
        ("characters", {"heads": 2.0}, "heads value: 2.0"),
        ("characters", {"context": 10**6}, "context value: 1000000; context must be below"),
        ("characters", {"batch_size": "32"}, "batch_size value: '32'"),
    ],
)
def test_bad_arguments(make, argument, message):
    with pytest.raises(ValueError, match=f"^Invalid {message}"):
        getattr(problems, make)(**argument)
