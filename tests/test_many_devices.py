"""The training of one device on eight: by pmap, jit and shard_map, on one axis and on two.

Gradients are summed in another order there, so most of it is the same up to the last bits only. Where a
rounding would make more of such a bit (parameters in bfloat16, moments in int8), the numbers of the problem are
chosen so that their sums are exact in any order.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import RECOMPILED

import adamjax
from adamjax import sharding
from adamjax.diagnostics import measure
from adamjax.safety import DynamicLossScale
from adamjax.sharding._zero1 import Zero1State

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LR = 1e-2
STEPS = 5
ROWS = 16

pytestmark = pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")


def place(tree, mesh, specs=None):
    """On the mesh, by a tree of specs; without, replicated."""
    specs = jax.tree.map(lambda _: P(), tree) if specs is None else specs
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def fetch(tree):
    """As NumPy arrays, once all devices that have the same part of an array turn out to have the same numbers."""

    def of_leaf(x):
        parts = {}
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            np.testing.assert_array_equal(data, parts.setdefault(str(shard.index), data))
        return np.asarray(x)

    return jax.tree.map(of_leaf, tree)


def of_all(x):
    """Of pmap's stacked arrays, the one that all devices have."""
    x = np.asarray(x)
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    return x[0]


def specs_of(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


# The same course in pmap, jit and shard_map.


def regression(params, batch):
    x, y = batch
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - y) ** 2)


def gradients(params, batch, loss=regression):
    """The loss and its gradients, in float32: in bfloat16, each device would round its part of them."""
    return jax.value_and_grad(loss)(jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)


def some_batches():
    """Small whole numbers."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, -3, 4)
    return [(np.float32(draw((ROWS, 8))), np.float32(draw((ROWS, 4)))) for _ in range(STEPS)]


def some_weights(dtype):
    """Between 1 and 1.5: as long as they are between 0.5 and 2, those in bfloat16 are multiples of 2**-8.

    So are their products with small whole numbers, and these products' sums.
    """
    rng = np.random.default_rng(1)
    draw = functools.partial(rng.uniform, 1.0, 1.5)
    return {"kernel": jnp.asarray(draw((8, 4)), dtype), "bias": jnp.asarray(draw(4), dtype)}


def step_of(opt, params, state, batch):
    loss, grads = gradients(params, batch)
    return *opt.step(grads, state, params), loss


def mean_step_of(opt, params, state, batch):
    loss, grads = jax.lax.pmean(gradients(params, batch), "data")
    return *opt.step(grads, state, params), loss


def course(advance, params, state, batches):
    losses = []
    for batch in batches:
        params, state, loss = advance(params, state, batch)
        losses.append(loss)
    return losses, params, state


def by_pmap(opt, params, batches):
    def copies(tree):
        return jax.tree.map(lambda x: np.stack([x] * 8), tree)

    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batches)
    advance = jax.pmap(functools.partial(mean_step_of, opt), axis_name="data")
    return jax.tree.map(of_all, course(advance, copies(params), copies(opt.init(params)), split))


def by_jit(kind, opt, params, batches):
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        split = [place(batch, mesh, (P("data"), P("data"))) for batch in batches]
        params = place(params, mesh)
        return fetch(course(jax.jit(functools.partial(step_of, opt)), params, opt.init(params), split))


def by_shard_map(check_vma, opt, params, batches):
    mesh = make_mesh(AUTO)

    def body(params, state, batch):
        if not check_vma:
            return mean_step_of(opt, params, state, batch)
        # The gradients of what all devices have are summed over these by jax.grad.
        loss, grads = gradients(params, batch, lambda *x: jax.lax.pmean(regression(*x), "data"))
        return *opt.step(grads, state, params), loss

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P(), P()), check_vma=check_vma
    )
    params = place(params, mesh)
    split = [place(batch, mesh, (P("data"), P("data"))) for batch in batches]
    return fetch(course(jax.jit(mapped), params, place(opt.init(params), mesh), split))


FORMS = {
    "pmap": by_pmap,
    "jit": functools.partial(by_jit, AUTO),
    "jit explicit": functools.partial(by_jit, EXPLICIT),
    "shard_map": functools.partial(by_shard_map, True),
    "shard_map unchecked": functools.partial(by_shard_map, False),
}


def in_8_bits():
    int8 = adamjax.quantized("int8", block_size=8, min_size=1)
    return adamjax.skip_nonfinite(adamjax.stochastic_rounding(adamjax.adamw(LR, mu_dtype=int8, nu_dtype=int8)))


OPTIMIZERS = {
    "schedule": ("float32", lambda: adamjax.adamw(adamjax.schedules.warmup_cosine(LR, 2, 9), weight_decay=0.1)),
    "clipped": ("float32", lambda: adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.amsgrad(LR))),
    "int8 skipping": ("bfloat16", in_8_bits),
    "master": ("bfloat16", lambda: adamjax.master_weights(adamjax.nadam(LR), low_bits=8)),
}


@functools.cache
def expected_course(name):
    dtype, make = OPTIMIZERS[name]
    opt, params = make(), some_weights(dtype)
    return jax.device_get(course(jax.jit(functools.partial(step_of, opt)), params, opt.init(params), batches_for(name)))


def batches_for(name):
    batches = some_batches()
    if "skipping" in name:
        batches[2][0][5, 1] = np.nan  # what the third device has
    return batches


# Every pair that has something of its own: who skips asks the others, in each form; so does who clips, but where jit
# knows the whole; a schedule and master weights are the same everywhere.
PAIRS = [("int8 skipping", form) for form in FORMS]
PAIRS += [("clipped", form) for form in ("jit", "pmap", "shard_map unchecked")]
PAIRS += [("schedule", "jit"), ("schedule", "shard_map"), ("master", "jit explicit"), ("master", "pmap")]


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_the_same_course(name, form):
    dtype, make = OPTIMIZERS[name]
    expected = expected_course(name)
    found = jax.device_get(FORMS[form](make(), some_weights(dtype), batches_for(name)))
    for weights in jax.tree.leaves(found[1]):
        assert np.all((weights > 0.5) & (weights < 2))  # or sums may not be exact
    assert_close(found, expected, RECOMPILED)


# Parameters divided over one axis of the mesh, their state over the other one too.

SHAPES = {"up": (8, 64), "inner": (64,), "down": (64, 24), "scale": ()}
BY_MODEL = {"up": P(None, "model"), "inner": P("model"), "down": P("model"), "scale": P()}
BOTH = ("data", "model")


def mesh_of_two(kind):
    return make_mesh(kind, (2, 4), BOTH)


def spread(opt, mesh):
    return sharding.zero1(opt, mesh=mesh, axis="data")


def unwrapped(state):
    """Without what zero1 adds to it."""

    def is_leaf(x):
        return isinstance(x, Zero1State)

    return jax.tree.map(lambda x: x.inner if is_leaf(x) else x, state, is_leaf=is_leaf)


def moments_of(state):
    """That of Adam, wherever it is in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
    return next(x for x in nodes if hasattr(x, "mu"))


def numbers(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def perceptron(params, batch, *, down=jnp.matmul):
    x, y = batch
    hidden = jnp.tanh(x @ params["up"] + params["inner"][None])
    return jnp.mean((params["scale"] * down(hidden, params["down"]) - y) ** 2)


def perceptron_batches():
    rng = np.random.default_rng(2)
    return [tuple(np.float32(rng.normal(size=(ROWS, n))) for n in (8, 24)) for _ in range(STEPS)]


def clipped(axis_name=None):
    """By a factor that the state shows: it is in the first moments."""
    return adamjax.chain(adamjax.clip_by_global_norm(0.1, axis_name=axis_name), adamjax.adamw(LR))


def guarded(axis_name=None):
    """All that looks at gradients together."""
    return adamjax.skip_nonfinite(clipped(axis_name), axis_name=axis_name)


def perceptron_course(opt, params, state, batches, loss=perceptron):
    def body(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        return *opt.step(grads, state, params), value

    advance = jax.jit(body, donate_argnums=(0, 1))
    # A copy has its sharding by the name that compiled programs give it: a spec of another length compiles again.
    found = course(advance, jax.tree.map(jnp.copy, params), state, batches)
    assert advance._cache_size() == 1
    return found


@functools.cache
def perceptron_alone():
    params = jax.tree.map(jnp.asarray, numbers(0))
    return jax.device_get(perceptron_course(guarded(), params, guarded().init(params), perceptron_batches()))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_tensor_parallel_with_zero1(kind):
    mesh = mesh_of_two(kind)
    opt = spread(guarded(), mesh)
    loss = functools.partial(perceptron, down=functools.partial(jnp.matmul, out_sharding=P("data")))
    with jax.set_mesh(mesh):
        params = place(numbers(0), mesh, BY_MODEL)
        batches = [place(batch, mesh, (P("data"), P("data"))) for batch in perceptron_batches()]
        found = perceptron_course(opt, params, opt.init(params), batches, loss if kind == EXPLICIT else perceptron)
    moments = moments_of(found[2])
    for x in jax.tree.leaves((moments.mu, moments.nu)):
        assert math.prod(x.sharding.shard_shape(x.shape)) == max(x.size // 8, 1)
    losses, params, state = fetch(found)
    assert_close((losses, params, unwrapped(state)), perceptron_alone(), RECOMPILED)


def in_shard_map_of_two(opt, params, batches):
    """The same by hand: each device has columns of `up`, rows of `down`, and the moments of half of those."""
    mesh = mesh_of_two(AUTO)
    params = place(params, mesh, BY_MODEL)
    state = opt.init(params)
    specs = specs_of(state)

    def down(hidden, kernel):
        return jax.lax.psum(hidden @ kernel, "model")

    def body(params, state, batch):
        def loss(params):
            return jax.lax.pmean(perceptron(params, batch, down=down), "data")

        value, grads = jax.value_and_grad(loss)(params)
        return *opt.step(grads, state, params), value

    mapped = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(BY_MODEL, specs, P("data")), out_specs=(BY_MODEL, specs, P()), check_vma=True
        )
    )
    return course(mapped, params, state, [place(batch, mesh, (P("data"), P("data"))) for batch in batches])


def test_tensor_parallel_with_zero1_mapped():
    found = in_shard_map_of_two(sharding.zero1_mapped(guarded(BOTH), axis="data"), numbers(0), perceptron_batches())
    assert_close(fetch(found), perceptron_alone(), RECOMPILED)


# What looks at all gradients together: given some, some with a NaN among them, and some.

NAN = ("down", (37, 5))  # in the shard of one device, or of the two that have the same
BY_HAND = BY_MODEL | {"up": P("data", "model"), "down": P(BOTH)}
# Where nothing tells what is sharded, everything is taken for that.
SHARDED = {name: P(BOTH) for name in ("up", "inner", "down")}


GUARDS = {
    "skip": lambda by, spread: spread(guarded(by)),
    "scale": lambda by, spread: adamjax.dynamic_loss_scale(spread(clipped(by)), initial=4.0, axis_name=by),
}


def gradients_with_a_nan(names):
    trees = [numbers(seed) for seed in (5, 6, 7)]
    leaf, index = NAN
    trees[1][leaf][index] = np.nan
    return [{name: tree[name] for name in names} for tree in trees]


def measured_step(opt, axis_name=None):
    def advance(params, state, grads):
        updates, after = opt.update(grads, state, params)
        seen = opt.unscale(grads, state) if isinstance(opt, DynamicLossScale) else grads
        stats = measure(seen, updates, after, params, opt=opt, axis_name=axis_name)
        return adamjax.apply_updates(params, updates), after, (stats.overall, stats.leaves)

    return advance


@functools.cache
def measured_alone(guard, names):
    """Of each step the parameters, the state and the figures, on one device."""
    opt = GUARDS[guard](None, lambda opt: opt)
    params = {name: numbers(0)[name] for name in names}
    return course_of_three(jax.jit(measured_step(opt)), params, opt.init(params), gradients_with_a_nan(names))


def course_of_three(advance, params, state, grads, fetch=jax.device_get):
    history = []
    for g in grads:
        params, state, figures = advance(params, state, g)
        history.append(fetch((params, state, figures)))
    return history


def under_jit(kind, guard):
    mesh = mesh_of_two(kind)
    opt = GUARDS[guard](None, functools.partial(spread, mesh=mesh))
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.copy, place(numbers(0), mesh, BY_MODEL))
        grads = [place(tree, mesh, BY_MODEL) for tree in gradients_with_a_nan(SHAPES)]
        # Where zero1 is not outermost, updates are not pinned, and measuring them may spread them over the data axis.
        placed = jax.tree.map(lambda p: p.sharding, params)
        advance = jax.jit(measured_step(opt), out_shardings=(placed, None, None))
        history = course_of_three(advance, params, opt.init(params), grads, fetch)
    assert advance._cache_size() == 1
    return [(p, unwrapped(state), figures) for p, state, figures in history]


def in_shard_map(check_vma, guard):
    mesh, specs = mesh_of_two(AUTO), BY_HAND if check_vma else SHARDED
    opt = GUARDS[guard](BOTH, lambda opt: opt)
    params = place({name: numbers(0)[name] for name in specs}, mesh, specs)
    shardings = sharding.state_sharding(opt, params)
    of_state = jax.tree.map(lambda s: s.spec, shardings)
    advance = jax.shard_map(
        measured_step(opt, BOTH),
        mesh=mesh,
        in_specs=(specs, of_state, specs),
        out_specs=(specs, of_state, P()),
        check_vma=check_vma,
    )
    state = sharding.init_sharded(opt, params, shardings)
    return course_of_three(jax.jit(advance), params, state, gradients_with_a_nan(specs), fetch)


def in_pmap(guard):
    opt = GUARDS[guard]("devices", lambda opt: opt)

    def parts(tree):
        return {name: tree[name].reshape(8, -1, *tree[name].shape[1:]) for name in SHARDED}

    def joined(history):
        """The parts that have the parameters' shapes; of what all devices have, that of the first."""

        def of_leaf(x):
            x = np.asarray(x)
            if x.shape[1:] in [(SHAPES[name][0] // 8, *SHAPES[name][1:]) for name in SHARDED]:
                return x.reshape(-1, *x.shape[2:])
            return of_all(x)

        return jax.tree.map(of_leaf, history)

    params = parts(numbers(0))
    advance = jax.pmap(measured_step(opt, "devices"), axis_name="devices")
    grads = [parts(tree) for tree in gradients_with_a_nan(SHAPES | SHARDED)]
    return course_of_three(advance, params, jax.pmap(opt.init)(params), grads, joined)


TOGETHER = {
    "jit": functools.partial(under_jit, AUTO),
    "jit explicit": functools.partial(under_jit, EXPLICIT),
    "shard_map": functools.partial(in_shard_map, True),
    "shard_map unchecked": functools.partial(in_shard_map, False),
    "pmap": in_pmap,
}


def without_rates(figures):
    """In shard_map and pmap, the quantiles of rates are means over the shards of theirs."""
    return [x._replace(rate_low=0, rate_median=0, rate_high=0) for x in figures]


@pytest.mark.slow
@pytest.mark.parametrize(("guard", "form"), [*(("skip", form) for form in TOGETHER if form != "jit"), ("scale", "jit")])
def test_all_elements_together(guard, form):
    history = TOGETHER[form](guard)
    names = tuple(history[0][0])
    expected = measured_alone(guard, names)
    for (*found, figures), (*wanted, wanted_figures) in zip(history, expected, strict=True):
        assert_close(found, wanted, RECOMPILED)
        assert_close(*map(without_rates, (figures, wanted_figures)), RECOMPILED)
        if "jit" in form:
            assert_close(figures, wanted_figures, RECOMPILED)
    before, after = history[0], history[1]
    skip = after[1] if guard == "skip" else after[1].inner
    assert_equal((after[0], moments_of(after[1])), (before[0], moments_of(before[1])))
    assert (skip.skipped, skip.consecutive) == (1, 1)
    assert dict(zip(skip.nonfinite.paths, skip.nonfinite.counts, strict=True)) == {n: n == NAN[0] for n in names}
    if guard == "scale":
        assert [state.scale for _, state, _ in history] == [4, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("fused", [False, True])
def test_codes_of_which_each_device_has_some_columns(name, fused):
    """In shard_map each steps its part as if that were all; the state is still that of the whole."""
    mesh, spec = make_mesh(AUTO, (2,)), P(None, "data")
    format = adamjax.quantized(name, block_size=32, min_size=1)
    opt = adamjax.adamw(LR, mu_dtype=format, nu_dtype=format, fused=fused)
    whole = jnp.sin(jnp.arange(256 * 256.0)).reshape(256, 256)
    params = jax.device_put(whole, NamedSharding(mesh, spec))
    state = opt.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)

    def two_steps(params, state):
        for _ in range(2):
            params, state = opt.step(jnp.cos(params), state, params)
        return params, state

    mapped = jax.jit(jax.shard_map(two_steps, mesh=mesh, in_specs=(spec, specs), out_specs=(spec, specs)))
    found = mapped(params, state)
    assert jax.tree.structure(found[1]) == jax.tree.structure(state)
    halves = [jax.jit(two_steps)(x, opt.init(x)) for x in jnp.split(whole, 2, axis=1)]
    for i, half in enumerate(halves):
        here = jax.tree.map(lambda x, i=i: np.asarray(x.addressable_shards[i].data), found)
        for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(half), strict=True):
            np.testing.assert_array_equal(a, b)
