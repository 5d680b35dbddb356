"""A state on many devices: where its arrays are, that the numbers do not change, and nothing compiles twice."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, by_step, by_update, make_mesh
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import STORED
from tolerances import RECOMPILED

import adamjax
from adamjax import checkpoint, interop, sharding
from adamjax._transforms.base import may_skip, rounds_params

MODES = [AxisType.Auto, AxisType.Explicit]
LR = 1e-2
SHAPES = {"kernel": (16, 24), "rows": (5, 64), "bias": (3,), "scale": ()}  # by the first axis, the second, not at all
WHOLE = P()
SPLIT = {"kernel": P("data"), "rows": P(None, "data"), "bias": P(), "scale": P()}


def some_params(mesh, dtype="float32", specs=None, shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jax.device_put(
            jnp.asarray(rng.normal(size=shape), dtype), NamedSharding(mesh, (specs or {}).get(name, P()))
        )
        for name, shape in shapes.items()
    }


def abstract(mesh, spec=WHOLE, **shapes):
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, shape in shapes.items()
    }


def specs_of(tree):
    """Without the Nones at the end, which mean nothing."""

    def of_leaf(x):
        parts = list(getattr(x, "sharding", x).spec)
        while parts and parts[-1] is None:
            parts.pop()
        return P(*parts)

    return jax.tree.map(of_leaf, tree)


def bytes_of_a_device(tree):
    return max(
        sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(tree)) for i in range(len(jax.devices()))
    )


def replicated_state(opt, params):
    return sharding.init_sharded(opt, params, sharding.state_sharding(opt, params))


def train(advance, params, state, steps=5):
    """Step, giving away all buffers; everything stays what and where it is, and compiles once."""
    advance = jax.jit(advance, donate_argnums=(0, 1))
    grads, params = jax.jit(lambda p: (jax.tree.map(lambda x: x * x, p), jax.tree.map(jnp.copy, p)))(params)
    before = [(jax.typeof(x), x.sharding, x.committed) for x in jax.tree.leaves((params, state))]
    for _ in range(steps):
        params, state = advance(params, state, grads)
    assert [(jax.typeof(x), x.sharding, x.committed) for x in jax.tree.leaves((params, state))] == before
    assert advance._cache_size() == 1
    return params, state


def assert_same_run(found, expected):
    """`found`, with `zero1`, and `expected`, without, are equal bit for bit.

    But parameters that are divided along another axis than the first are so up to the last bit.
    XLA gathers those, and computes them, column by column. Some products are then rounded that are not
    rounded elsewhere, since jaxlib 0.12.
    """
    found, expected = jax.device_get(found), jax.device_get(expected)
    assert_equal(found[1].inner, expected[1])
    rows, wanted = (params.pop("rows").astype("float32") for params, _ in (found, expected))
    assert_close(rows, wanted, RECOMPILED)
    assert_equal(found[0], expected[0])


def quantized(name, block_size=8):
    return adamjax.quantized(name, block_size=block_size, min_size=1)


def amsgrad():
    return adamjax.chain(adamjax.clip_by_global_norm(1e9), adamjax.amsgrad(adamjax.schedules.cosine(LR, 9)))


EXACT = {
    "adamw": lambda: adamjax.adamw(LR),
    "amsgrad": amsgrad,
    "groups": lambda: adamjax.groups({"kernel|bias": adamjax.nadam(LR)}, default=adamjax.adamw(LR)),
    "groups that overlap": lambda: adamjax.groups(
        {"kernel|bias": {"learning_rate": adamjax.scale(0.1)}, "bias": {"weight_decay": 0.0}}, default=adamjax.adamw(LR)
    ),
    "optax": lambda: optax.adamw(LR),
    "master": lambda: adamjax.skip_nonfinite(adamjax.master_weights(adamjax.adamw(LR)), max_consecutive=3),
    "stochastic": lambda: adamjax.stochastic_rounding(adamjax.adam(LR)),
}
HALF = ("master", "stochastic")


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, AxisType.Auto) for name in EXACT), ("adamw", AxisType.Explicit), ("master", AxisType.Explicit)],
)
def test_zero1_is_the_replicated_run(name, kind, lenient):
    opt, mesh = EXACT[name](), make_mesh(kind)
    spread = sharding.zero1(opt, axis="data")
    with jax.set_mesh(mesh):
        params = some_params(mesh, "bfloat16" if name in HALF else "float32")
        expected = train(by_step(opt) if name != "optax" else by_update(opt), params, replicated_state(opt, params))
        found = train(by_step(spread), params, spread.init(params))
    assert specs_of(found[0]) == dict.fromkeys(SHAPES, P())
    assert_same_run(found, expected)


@pytest.mark.parametrize("kind", MODES)
def test_zero1_with_its_mesh_given(kind):
    mesh = make_mesh(kind)
    params = some_params(mesh)
    opt = sharding.zero1(adamjax.adamw(LR), mesh=mesh, axis="data")
    found, state = train(by_step(opt), params, opt.init(params))
    expected, _ = train(by_step(adamjax.adamw(LR)), params, replicated_state(adamjax.adamw(LR), params))
    assert specs_of(state.inner[0].mu) == SPLIT
    assert_close(found, expected, RECOMPILED)
    with pytest.raises(ValueError, match=r"expected Mesh.*, the mesh of zero1"):
        sharding.zero1(adamjax.adamw(LR), mesh=jax.make_mesh((4,), ("data",)), axis="data").init(params)


def test_torchs_states_are_spread_too():
    """For each parameter one. NAdam adds two products: which of them is rounded before, the compiler decides."""
    opt, mesh = STORED["torch's nadam"].make(), make_mesh(AxisType.Auto)
    params = some_params(mesh)
    spread = sharding.zero1(opt, axis="data")
    found, state = train(by_step(spread), params, spread.init(params))
    expected, _ = train(by_step(opt), params, replicated_state(opt, params))
    assert {name: of_leaf.mu.sharding.spec for name, of_leaf in state.inner[0].items()} == SPLIT
    assert_close(found, expected, RECOMPILED)


@pytest.mark.parametrize("kind", MODES)
def test_all_buffers_are_used_again(kind):
    mesh, opt = make_mesh(kind), sharding.zero1(adamjax.skip_nonfinite(adamjax.amsgrad(LR)), axis="data")
    with jax.set_mesh(mesh):
        params = some_params(mesh)
        state = opt.init(params)
        advance = jax.jit(by_step(opt), donate_argnums=(0, 1))
        memory = advance.lower(params, state, params).compile().memory_analysis()
    assert memory.alias_size_in_bytes == bytes_of_a_device((params, state))


def test_a_state_comes_back_from_flax():
    """With a target it is what it was; without one, it is spread again by the first step."""
    serialization = pytest.importorskip("flax.serialization")
    mesh, opt = make_mesh(AxisType.Auto), sharding.zero1(adamjax.adamw(LR), axis="data")
    params = some_params(mesh)
    _, state = opt.step(params, opt.init(params), params)
    found = serialization.from_bytes(opt.init(params), serialization.to_bytes(state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x in (found, serialization.to_state_dict(state), serialization.msgpack_restore(serialization.to_bytes(state))):
        new = opt.step(params, x, params)
        assert_equal(new, opt.step(params, state, params))
        assert specs_of(new[1].inner[0].mu) == SPLIT


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("int8", AxisType.Auto), ("int4", AxisType.Explicit)])
def test_quantised_moments_keep_their_blocks_together(name, kind):
    opt, mesh = adamjax.adamw(LR, mu_dtype=quantized(name), nu_dtype=quantized("int8")), make_mesh(kind)
    spread = sharding.zero1(opt, axis="data")
    with jax.set_mesh(mesh):
        params = some_params(mesh, shapes={"rows": (5, 64), "short": (3, 32)})
        expected = train(by_step(opt), params, replicated_state(opt, params))
        found = train(by_step(spread), params, spread.init(params))
    placed = specs_of(found[1].inner[0].mu)
    for leaf in params:  # of "short", 4 numbers a device would be half a block
        assert set(map(str, jax.tree.leaves(placed[leaf]))) == {str(SPLIT.get(leaf, P()))}
    # The largest of a block comes out of another loop: its last bit may differ, and a number be rounded the other way.
    assert_close(found[0], expected[0], LR / 50)


@pytest.mark.parametrize("kind", MODES)
def test_updates_come_whole(kind):
    """With `apply_updates`: what is rounded before it is added may differ from what is added at once."""
    opt, mesh = adamjax.adamw(LR), make_mesh(kind)
    spread = sharding.zero1(opt, axis="data")
    with jax.set_mesh(mesh):
        params = some_params(mesh)
        expected = train(by_update(opt), params, replicated_state(opt, params))
        found = train(by_update(spread), params, spread.init(params))
        updates, _ = jax.jit(spread.update)(params, spread.init(params), params)
    assert specs_of(updates) == specs_of(found[0]) == dict.fromkeys(SHAPES, P())
    assert_equal(found[1].inner, expected[1])
    assert_close(found[0], expected[0], RECOMPILED)


@pytest.mark.parametrize(
    ("kind", "axis"),
    [(AxisType.Auto, "data"), (AxisType.Explicit, "data"), (AxisType.Auto, ("data", "model"))],
)
def test_zero1_beside_tensor_parallelism(kind, axis):
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    by_model = {"kernel": P(None, "model"), "rows": P(None, "model")}
    specs = {name: by_model.get(name, P()) for name in SHAPES}
    opt = adamjax.adamw(LR)
    spread = sharding.zero1(opt, axis=axis)
    with jax.set_mesh(mesh):
        params = some_params(mesh, specs=by_model)
        expected = train(by_step(opt), params, replicated_state(opt, params))
        found = train(by_step(spread), params, spread.init(params))
        given = sharding.zero1(opt, axis=axis, specs=None if kind == AxisType.Explicit else specs)
        inside = jax.jit(given.init)(params)
    assert specs_of(found[0]) == specs
    assert_same_run(found, expected)
    adam = found[1].inner[0]
    wanted = {"kernel": P("data", "model"), "rows": P(None, ("model", "data")), "bias": P(), "scale": P()}
    assert specs_of(adam.mu) == specs_of(adam.nu) == wanted
    assert specs_of(inside) == specs_of(found[1])
    assert found[1].specs == tuple(specs[name] for name in sorted(specs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODES)
def test_a_state_is_one_type_wherever_it_is_made(kind):
    """It says how the parameters are sharded: what differs there would compile again."""
    mesh, opt = make_mesh(kind, (2, 4), ("data", "model")), sharding.zero1(adamjax.adamw(LR), axis="data")
    with jax.set_mesh(mesh):
        for spec in (P(), P(None, "model"), P(("data", "model"), None)):
            params = some_params(mesh, specs={"kernel": spec})
            structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
            states = [opt.init(params), opt.init(structs), jax.jit(opt.step)(params, opt.init(params), params)[1]]
            states.append(sharding.init_sharded(opt, params, sharding.state_sharding(opt, params, zero_axis="data")))
            if spec == P() or kind == AxisType.Explicit:
                states.append(jax.jit(opt.init)(params))
            if spec == P():
                states.append(opt.init(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)))
            assert len({jax.tree.structure(state) for state in states}) == 1
            assert specs_of(states[0]) == specs_of(states[3])


def test_a_step_can_be_exported():
    mesh, opt = make_mesh(AxisType.Auto, (2, 4), ("data", "model")), sharding.zero1(adamjax.adam(LR), axis="data")
    params = some_params(mesh, specs={"kernel": P(None, ("data", "model")), "rows": P(None, "model")})
    state = opt.init(params)
    exported = jax.export.deserialize(jax.export.export(jax.jit(opt.step))(params, state, params).serialize())
    assert_equal(exported.call(params, state, params), jax.jit(opt.step)(params, state, params))


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "groups", "around zero1"])
def test_a_state_of_parameters_on_a_mesh_compiles_once(name):
    """Its counts, too, are where a step leaves them."""
    mesh = make_mesh(AxisType.Auto)
    around = adamjax.dynamic_loss_scale(sharding.zero1(adamjax.adamw(LR), axis="data"))
    opt = around if name == "around zero1" else EXACT[name]()
    params = some_params(mesh)
    train(by_step(opt), params, opt.init(params))


@pytest.mark.parametrize("kind", MODES)
def test_a_device_has_an_eighth(kind):
    mesh = make_mesh(kind)
    shapes = {"embedding": (1000, 64), "kernel": (64, 256), "bias": (256,), "out": (64, 1001), "scale": ()}
    opt = adamjax.amsgrad(LR)
    with jax.set_mesh(mesh):
        params = some_params(mesh, shapes=shapes)
        state = sharding.zero1(opt, axis="data").init(params)
        whole = replicated_state(opt, params)
    assert bytes_of_a_device(whole) == adamjax.storage.state_bytes(opt, params)
    assert bytes_of_a_device(state) <= adamjax.storage.state_bytes(opt, params) / 8 * 1.02


@pytest.mark.parametrize("kind", MODES)
def test_the_state_is_made_in_place(kind):
    """Never whole on one device, nor from parameters that are; and in abstract as in memory."""
    mesh, opt = make_mesh(kind), adamjax.skip_nonfinite(adamjax.master_weights(adamjax.adam(LR)))
    with jax.set_mesh(mesh):
        params = some_params(mesh, "bfloat16", SPLIT)
        placed = sharding.state_sharding(opt, params)
        make = jax.jit(lambda params: sharding.init_sharded(opt, params, placed))
        memory = make.lower(params).compile().memory_analysis()
        states = sharding.init_sharded(opt, params, placed), make(params)
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    states += (sharding.init_sharded(opt, structs, placed),)
    for state in states:
        assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(placed)
    assert_equal(states[0], states[1])
    assert_equal(states[0], jax.device_get(opt.init(params)))
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 1.5 * bytes_of_a_device(states[0])
    assert specs_of(states[2].inner.kept) == SPLIT


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", MODES)
def test_a_compiled_init_needs_no_mesh_to_be_set(kind, given):
    """Of its arguments it needs nothing but to know where they are."""
    mesh = make_mesh(kind)
    opt = sharding.zero1(adamjax.adamw(LR), axis="data", mesh=mesh if given else None)
    params = some_params(mesh)
    state = jax.jit(opt.init)(params)
    assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(opt.init(params))]
    assert specs_of(state.inner[0].mu) == SPLIT


def test_no_two_arrays_share_a_buffer():
    mesh = make_mesh(AxisType.Auto)
    state = sharding.zero1(adamjax.amsgrad(LR), axis="data").init(some_params(mesh))
    pointers = [shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for shard in x.addressable_shards]
    assert len(set(pointers)) == len(pointers)


CASES = {
    "replicated": ("data", P(), (64, 32), P("data")),
    "the second axis": ("data", P(), (3, 32), P(None, "data")),
    "none": ("data", P(), (3, 5), P()),
    "nothing in it": ("data", P(), (0, 5), P()),
    "fully sharded already": ("data", P(None, "data"), (64, 32), P(None, "data")),
    "on top of another axis": ("data", P("model"), (64, 31), P(("model", "data"))),
    "not enough left": ("data", P("model"), (4, 31), P("model")),
    "two axes": (("data", "model"), P(), (64, 32), P(("data", "model"))),
    "two axes, one taken": (("data", "model"), P(None, "model"), (64, 32), P("data", "model")),
    "an axis of one device": ("one", P(), (64, 32), P()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_axis_that_can_be_divided(name):
    axis, spec, shape, expected = CASES[name]
    params = abstract(AbstractMesh((4, 2, 1), ("data", "model", "one"), (AxisType.Auto,) * 3), spec, w=shape)
    found = sharding.state_sharding(adamjax.adam(), params, zero_axis=axis)[0]
    assert found.mu["w"].spec == found.nu["w"].spec == expected
    assert found.count.spec == P()


def test_every_state_finds_its_parameters():
    """Whatever is around the moments, and however the parameters are nested."""
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,))
    params = {
        "a": abstract(mesh, a=(16, 3), b=(5, 8)),
        "b": [*abstract(mesh, x=(16, 3), y=(5, 8)).values(), None],
        "c": {"a": abstract(mesh, a=(16, 3))},
    }
    params["complex"] = jax.ShapeDtypeStruct((8, 7), jnp.complex64, sharding=NamedSharding(mesh, P()))
    split = jax.tree.map(lambda p: P(None, "data") if p.shape == (5, 8) else P("data"), params)
    adam = adamjax.adam()

    def moments(opt, zero_axis="data"):
        state = sharding.state_sharding(opt, params, zero_axis=zero_axis)
        assert jax.tree.structure(state) == jax.tree.structure(opt.init(params))
        return state

    nodes = [
        moments(adam)[0],
        moments(adamjax.skip_nonfinite(adamjax.chain(adamjax.clip_by_global_norm(1.0), adam))).inner[1][0],
        moments(adamjax.chain(adamjax.clip_by_global_norm(1.0), optax.adam(1e-3)))[1][0],
        moments(optax.MultiSteps(optax.adam(1e-3), 2)).inner_opt_state[0],
    ]
    for node in nodes:
        assert node.mu == node.nu == jax.tree.map(lambda s: NamedSharding(mesh, s), split)
    first, rest = moments(adamjax.groups({"^a/a": adamjax.adam(0.1)}, default=adam))
    assert first[0].mu["a"]["a"].spec == P("data")
    assert rest[0].mu["b"][1].spec == rest[0].mu["a"]["b"].spec == P(None, "data")
    assert rest[0].mu["c"]["a"]["a"].spec == P("data")
    combined = {"^a": {"learning_rate": adamjax.scale(0.1)}, "a$": {"b1": 0.5}}
    assert moments(adamjax.groups(combined, default=adam))[3][0].mu["a"]["a"].spec == P("data")
    torch = moments(interop.torch.adam())[0]
    assert torch["b"][1].mu.spec == P(None, "data")
    assert torch["complex"].mu.spec == torch["complex"].nu.spec == P("data")
    assert torch["complex"].count.spec == P()


@pytest.mark.parametrize("kind", MODES)
def test_a_state_is_laid_out_once_per_structure(kind, monkeypatch):
    """By one abstract `init`, whether the learning rate is a number or an argument of the compiled step."""
    adam, calls = type(adamjax.scale_by_adam()), []
    init = adam._init
    monkeypatch.setattr(adam, "_init", lambda self, params: calls.append(params) or init(self, params))
    with jax.set_mesh(mesh := make_mesh(kind)):
        params = some_params(mesh, shapes=SHAPES | {"only here": (8,)})
        state = sharding.zero1(adamjax.adam(0.1), axis="data").init(params)

        def laid_out(lr):
            calls.clear()
            opt = sharding.zero1(adamjax.adam(lr), axis="data")
            jax.jit(opt.step).lower(params, state, params)
            return len(calls)

        assert [laid_out(lr) for lr in (0.2, 0.2, 0.3)] == [1, 0, 1]

        def step():
            return jax.jit(lambda lr, *trees: sharding.zero1(adamjax.adam(lr), axis="data").step(*trees)[0])

        calls.clear()
        with jax.checking_leaks():
            found = [step()(lr, params, state, params) for lr in (0.2, 0.3)]
        assert len(calls) == 1
        expected = jax.jit(sharding.zero1(adamjax.adam(0.3), axis="data").step)(params, state, params)[0]
    assert_equal(found[1], expected)


def test_what_stays_whole_is_reported():
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,))
    params = abstract(mesh, kernel=(64, 4096), bias=(3,)) | abstract(mesh, P("data"), embedding=(64, 8))
    params["short"] = abstract(mesh, short=(3, 64))["short"]
    opt = adamjax.adamw(mu_dtype=quantized("int8", 16))
    lines = sharding.describe(opt, params, zero_axis="data").splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert re.search(r"0/nu/bias +\[3\] +P\(\) +12 +12 +no axis is divisible by 8$", rows["0/nu/bias"])
    assert re.search(r" 24 +24 +no axis is divisible by 8 in blocks of 16$", rows["0/mu/short/scales"])
    assert re.search(r" 1048576 +131072$", rows["0/nu/kernel"])
    assert re.search(r" 256 +256$", rows["0/nu/embedding"])
    before, after = map(int, lines[-1].split()[-2:])
    assert after < before
    assert sharding.zero1(opt, axis="data").describe(params) == "\n".join(lines)


def loss(params, batch):
    x = jnp.sin(batch @ params["kernel"]) * params["scale"]
    return jnp.sum(x[:, :3] @ params["bias"]) + jnp.sum(batch[:, :5] @ params["rows"] ** 2)


def mapped_run(opt, mesh, check_vma, varies, axis="data"):
    params = some_params(mesh)
    state = opt.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)

    def body(params, state, batch):
        seen = jax.tree.map(lambda p: jax.lax.pcast(p, axis, to="varying"), params) if varies else params
        return opt.step(jax.grad(loss)(seen, batch), state, params)

    places = {"mesh": mesh, "in_specs": (P(), specs, P(axis)), "out_specs": (P(), specs), "check_vma": check_vma}
    return jax.jit(jax.shard_map(body, **places), donate_argnums=1), params, state


MAPPED = {
    "adamw": (lambda: adamjax.adamw(LR), {}),
    "guarded": (
        lambda **by: adamjax.skip_nonfinite(
            adamjax.chain(adamjax.clip_by_global_norm(0.1, **by), adamjax.amsgrad(LR)), **by
        ),
        {"axis_name": "data"},
    ),
}


@pytest.mark.parametrize(
    ("name", "check_vma", "varies"),
    [
        ("adamw", True, False),
        ("adamw", True, True),
        ("adamw", False, False),
        ("guarded", True, True),
        ("guarded", False, False),
    ],
)
def test_zero1_inside_shard_map(name, check_vma, varies):
    """The same as under jit; the gradients added up on the way, where the devices have parts of them."""
    make, by = MAPPED[name]
    mesh = make_mesh(AxisType.Auto)
    batch = jax.device_put(
        jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.float32), NamedSharding(mesh, P("data"))
    )
    spread = sharding.zero1(make(), axis="data")
    expected, expected_state = params, state = some_params(mesh), spread.init(some_params(mesh))
    advance = jax.jit(lambda p, s: spread.step(jax.grad(loss)(p, batch), s, p))
    mapped, params, state = mapped_run(sharding.zero1_mapped(make(**by), axis="data"), mesh, check_vma, varies)
    text = mapped.lower(params, state, batch).compile().as_text()
    assert ("reduce-scatter(" in text) == (varies or not check_vma)
    for _ in range(3):
        expected, expected_state = advance(expected, expected_state)
        params, state = mapped(params, state, batch)
    assert mapped._cache_size() == 1
    assert specs_of(state) == specs_of(expected_state.inner)
    exact = name == "adamw" or check_vma  # without, the norm counts what stays whole eight times
    assert_close(params, expected, RECOMPILED if exact else LR)


def test_updates_come_whole_inside_shard_map():
    mesh, opt = make_mesh(AxisType.Auto), sharding.zero1_mapped(adamjax.adamw(LR), axis="data")
    params = some_params(mesh)
    state = opt.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    places = {"in_specs": (P(), specs), "out_specs": (P(), specs)}
    runs = [
        jax.jit(jax.shard_map(lambda p, s, run=run: run(p, s, p), mesh=mesh, **places))(params, state)
        for run in (by_step(opt), by_update(opt))
    ]
    assert_equal(runs[0][1], runs[1][1])
    assert_close(runs[0][0], runs[1][0], RECOMPILED)


def test_zero1_inside_shard_map_over_two_axes_and_in_8_bits():
    mesh = make_mesh(AxisType.Auto, (2, 1, 4), ("a", "one", "b"))
    axis, int8 = ("a", "one", "b"), quantized("int8")
    opt = adamjax.adam(LR, mu_dtype=int8, nu_dtype=int8)
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16)), jnp.float32)
    mapped, params, state = mapped_run(sharding.zero1_mapped(opt, axis=axis), mesh, True, True, axis)
    assert state[0].mu["rows"].codes.sharding.spec == P(None, ("a", "b"))  # a block of 8 on each device
    expected, expected_state = some_params(mesh), replicated_state(opt, params)
    advance = jax.jit(lambda p, s: opt.step(jax.grad(loss)(p, batch), s, p))
    for _ in range(3):
        expected, expected_state = advance(expected, expected_state)
        params, state = mapped(params, state, batch)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    assert_close(params, expected, LR / 4)  # other random numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODES)
def test_offload_keeps_the_moments_on_the_host(kind):
    mesh = make_mesh(kind)
    inner = sharding.zero1(adamjax.skip_nonfinite(adamjax.adamw(LR)), axis="data")
    opt = sharding.offload(inner)
    with jax.set_mesh(mesh):
        params = some_params(mesh)
        state = opt.init(params)
        placed = sharding.state_sharding(opt, params)
        again = sharding.init_sharded(opt, params, placed)
        expected = train(by_step(inner), params, inner.init(params))
        found = train(by_step(opt), params, state)
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    for adam in (found[1].inner.inner[0], opt.init(structs).inner.inner[0], again.inner.inner[0]):
        assert {x.sharding.memory_kind for x in jax.tree.leaves((adam.mu, adam.nu)) if x.ndim} == {"pinned_host"}
        assert adam.count.sharding.memory_kind == "device"
    assert {x.sharding.memory_kind for x in jax.tree.leaves(found[0])} == {"device"}
    assert_equal(jax.device_get(found), jax.device_get(expected))


def test_offload_on_one_device():
    params = jax.device_put({"w": jnp.ones((8, 4)), "b": jnp.ones(())}, jax.devices()[0])
    opt, plain = sharding.offload(adamjax.adam(LR)), adamjax.adam(LR)
    found = train(by_step(opt), params, opt.init(params))
    expected = train(by_step(plain), params, jax.device_put(plain.init(params), jax.devices()[0]))
    assert_equal(jax.device_get(found), jax.device_get(expected))
    for _, state in (found, opt.step(params, opt.init(params), params)):
        assert state[0].mu["w"].sharding.memory_kind == "pinned_host"


def test_a_value_like_the_others():
    opt = sharding.zero1(adamjax.adamw(1e-3), axis="data", specs={"w": P("model")})
    assert opt == sharding.zero1(adamjax.adamw(1e-3), axis="data", specs={"w": P("model")})
    assert opt != sharding.zero1(adamjax.adamw(1e-3), axis="data")
    assert hash(opt) == hash(pickle.loads(pickle.dumps(opt)))
    assert jax.tree.leaves(opt) == jax.tree.leaves(opt.inner)
    assert not rounds_params(opt)
    assert rounds_params(sharding.offload(adamjax.kahan(opt)))
    assert may_skip(sharding.zero1_mapped(adamjax.skip_nonfinite(adamjax.adam()), axis="data"))
    assert "axis='data'" in repr(opt)


def test_a_checkpoint_goes_to_another_mesh(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    opt, mesh = sharding.zero1(adamjax.adamw(LR), axis="data"), make_mesh(AxisType.Auto)
    params, state = train(by_step(opt), *(p := some_params(mesh), opt.init(p)))
    checkpoint.save(tmp_path, opt, params, state, step=5, key=0)
    other = jax.make_mesh((2, 4), ("model", "parts"), axis_types=(AxisType.Auto,) * 2)
    elsewhere = sharding.zero1(adamjax.adamw(LR), axis="parts")
    found = checkpoint.restore(tmp_path, elsewhere, some_params(other))
    assert_equal(found.state, state)
    assert specs_of(found.state.inner[0].mu["kernel"]) == P("parts")


def test_tools_read_a_spread_state():
    mesh = make_mesh(AxisType.Auto)
    opt = sharding.offload(sharding.zero1(adamjax.adamw(LR), axis="data"))
    params = some_params(mesh)
    _, state = jax.jit(opt.step)(params, opt.init(params), params)
    adamjax.check(state)
    assert adamjax.storage.state_bytes(opt, params) == adamjax.storage.state_bytes(adamjax.adamw(LR), params)


def on(mesh, spec=WHOLE):
    return {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec))}


MESH, ADAM = make_mesh(AxisType.Auto), adamjax.adam()
ZERO1 = sharding.zero1(ADAM, axis="data")
PLAIN = {"w": jnp.ones((8, 8))}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sharding.state_sharding(ADAM, PLAIN), ValueError, "no leaf of params is on a mesh: put them there"),
        (lambda: sharding.state_sharding(ADAM, PLAIN, mesh=MESH), ValueError, r"params\['w'\] has SingleDevice"),
        (
            lambda: sharding.state_sharding(ADAM, {"a": on(MESH), "b": on(make_mesh(AxisType.Auto, (8,), ("x",)))}),
            ValueError,
            r"params\['b'\]\['w'\] is on Mesh\('x': 8.*expected all parameters on Mesh\('data'",
        ),
        (
            lambda: jax.jit(lambda p: jax.tree.map(jnp.ones_like, sharding.state_sharding(ADAM, p, mesh=MESH)))(
                on(MESH)
            ),
            ValueError,
            r"params\['w'\] has no sharding that is known here",
        ),
        (lambda: sharding.state_sharding(ADAM, on(MESH), zero_axis="x"), ValueError, "no axis 'x', it has 'data'"),
        (lambda: sharding.state_sharding(ADAM, on(MESH), zero_axis=(0,)), TypeError, "Invalid zero_axis value"),  # type: ignore[arg-type]
        (lambda: sharding.state_sharding(ADAM, on(MESH), mesh="data"), TypeError, "Invalid mesh value: 'data'"),  # type: ignore[arg-type]
        (
            lambda: sharding.state_sharding(
                ADAM, on(jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Explicit)))
            ),
            ValueError,
            "all in Auto or all in Explicit mode",
        ),
        (lambda: sharding.init_sharded(ADAM, on(MESH), {"w": 0}), ValueError, "make them with state_sharding"),
        (lambda: sharding.zero1(ADAM, axis=None), TypeError, "Invalid axis value: None"),  # type: ignore[arg-type]
        (lambda: sharding.zero1(ADAM, axis="data", specs={"w": "x"}), TypeError, "Invalid specs value"),
        (
            lambda: sharding.zero1(ADAM, mesh=MESH, axis="data").init(PLAIN),
            ValueError,
            r"params\['w'\] is on no mesh: put the parameters there, by .*\)\)$",
        ),
        (lambda: jax.jit(sharding.zero1(ADAM, axis="data").init)(PLAIN), ValueError, ", or give zero1 the mesh"),
        (lambda: sharding.zero1(ADAM, axis="data", specs={"v": P()}).init(on(MESH)), ValueError, "no tree like params"),
        (
            lambda: sharding.zero1(ADAM, axis="data", specs=P()).init(on(MESH, P("data"))),
            ValueError,
            r"params\['w'\] is sharded by P\('data',\), and zero1 was given specs that say P\(\): shard it so",
        ),
        (
            lambda: ZERO1.step(on(MESH), ZERO1.init(on(MESH, P("data"))), on(MESH)),
            ValueError,
            r"params\['w'\] is sharded by P\(\), and the state of zero1 was made where it was P\('data',\)",
        ),
        (lambda: ZERO1.update(on(MESH), ADAM.init(on(MESH)), on(MESH)), TypeError, "expected Zero1State"),
        (
            lambda: ZERO1.update([on(MESH)] * 2, ZERO1.init(on(MESH)), [on(MESH)] * 2),
            ValueError,
            "the state of zero1 is that of 1 parameters, and params has 2",
        ),
        (lambda: sharding.zero1(ADAM, axis="data").update(PLAIN, ()), ValueError, "zero1 needs the parameters"),
        (lambda: sharding.zero1(ADAM, axis="data").init({}), ValueError, "to know their mesh, and there are none"),
        (
            lambda: jax.shard_map(
                lambda p: sharding.zero1(ADAM, axis="data").init(p), mesh=MESH, in_specs=P(), out_specs=P()
            )(on(MESH)),
            ValueError,
            "inside of jax.shard_map, take zero1_mapped",
        ),
        (
            lambda: jax.shard_map(
                lambda p: sharding.zero1_mapped(ADAM, axis="data").init(p), mesh=MESH, in_specs=P(), out_specs=P()
            )(on(MESH)),
            ValueError,
            "call init of zero1_mapped outside",
        ),
        (
            lambda: sharding.zero1_mapped(adamjax.adam(nu_dtype=quantized("int8")), axis="data").init(
                on(make_mesh(AxisType.Auto, (2, 4), ("data", "model")), P(None, "model"))
            ),
            ValueError,
            "the moments at 0/nu/w are quantised in blocks of 8, of which a device has parts: 2 numbers",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Those whose step depends on a whole parameter: with factors that are seen in it.
def whole_arrays(**by):
    return {
        "cautious": adamjax.adam(LR, b1=0.5, cautious=True, **by),
        "stable": adamjax.stable_adamw(LR, b2=0.99, weight_decay=0.1, **by),
    }


WHOLE_ARRAYS = list(whole_arrays())


def two_gradients(params):
    """Of which some change their signs, and all grow."""
    rng = np.random.default_rng(5)
    signs = jax.tree.map(lambda p: np.float32(rng.choice([-3.0, 9.0], p.shape)), params)
    return [params, jax.tree.map(lambda p, s: jax.device_put(p * s, p.sharding), params, signs)]


def two_steps(opt):
    def run(params, state, grads):
        for g in grads:
            params, state = opt.step(g, state, params)
        return params, state

    return run


def alone(name):
    params = jax.tree.map(jnp.asarray, jax.device_get(some_params(make_mesh(AxisType.Auto))))
    opt, grads = whole_arrays()[name], jax.device_get(two_gradients(params))
    return jax.device_get(jax.jit(two_steps(opt))(params, opt.init(params), grads))


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("name", WHOLE_ARRAYS)
def test_steps_by_whole_parameters_that_are_sharded(name, kind):
    mesh = make_mesh(kind)
    opt, params = whole_arrays()[name], some_params(mesh, specs=SPLIT)
    with jax.set_mesh(mesh):
        for tried in (opt, sharding.zero1(opt, axis="data")):
            found, state = jax.jit(two_steps(tried))(params, tried.init(params), two_gradients(params))
            state = state.inner if tried is not opt else state
            assert_close(jax.device_get((found, state)), alone(name), RECOMPILED)


def mapped_steps(opt, mesh):
    params, specs = some_params(mesh, specs=SPLIT), SPLIT
    state, grads = opt.init(params), two_gradients(params)
    of_state = jax.tree.map(lambda x: x.sharding.spec, state)
    places = {"in_specs": (specs, of_state, [specs, specs]), "out_specs": (specs, of_state)}
    return jax.jit(jax.shard_map(two_steps(opt), mesh=mesh, **places))(params, state, grads)


@pytest.mark.parametrize("name", WHOLE_ARRAYS)
def test_steps_by_whole_parameters_inside_shard_map(name):
    mesh = make_mesh(AxisType.Auto)
    found = mapped_steps(whole_arrays(axis_name="data")[name], mesh)
    assert_close(jax.device_get(found), alone(name), RECOMPILED)
    with pytest.raises(ValueError, match=r"differs over the mapped axes 'data', .*give axis_name="):
        mapped_steps(whole_arrays()[name], mesh)


@pytest.mark.parametrize("name", WHOLE_ARRAYS)
def test_steps_of_each_device_by_itself(name):
    mesh = make_mesh(AxisType.Auto, (2,))
    opt = whole_arrays(axis_name=())[name]
    params, state = mapped_steps(opt, mesh)
    start = some_params(mesh, specs=SPLIT)
    for i in range(2):
        own = [
            jax.tree.map(lambda x, i=i: np.asarray(x.addressable_shards[i].data), tree)
            for tree in (start, *two_gradients(start), (params, state))
        ]
        expected = jax.jit(two_steps(opt))(own[0], opt.init(own[0]), own[1:3])
        assert_close(own[3], jax.device_get(expected), RECOMPILED)


@pytest.mark.parametrize("name", WHOLE_ARRAYS)
def test_steps_by_whole_parameters_with_zero1_mapped(name):
    """Each device steps its part of what all have."""
    mesh = make_mesh(AxisType.Auto)
    opt = sharding.zero1_mapped(whole_arrays(axis_name="data")[name], axis="data")
    params = some_params(mesh)
    state, grads = opt.init(params), two_gradients(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    mapped = jax.shard_map(two_steps(opt), mesh=mesh, in_specs=(P(), specs, P()), out_specs=(P(), specs))
    assert_close(jax.device_get(jax.jit(mapped)(params, state, grads)), alone(name), RECOMPILED)
