"""An adversary: random programs of public calls against the oracle.

Each example makes an optimizer and parameters, and then steps, saves, moves, imports and exports them in any order. A
failure prints the program, which runs as it stands.
"""

import inspect
import os
import shutil

import adversary
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabulary
from adversary import CODES, CONTAINERS, DTYPES, SCALES, SHAPES, Expected, LeafOracle, fill, limit, specs
from helpers import assert_equal, assert_same_types
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tolerances import ADVERSARY

pytestmark = pytest.mark.numbers

RATE = 0.01
HEADER = 'import jax\n\njax.config.update("jax_num_cpu_devices", 8)\n'
STEPS = {
    "eager": "params, state = opt.step(grads, state, params)",
    "compiled": "params, state = static_step(opt, grads, state, params)",
    "donated": "params, state = donated_step(opt, params, state, grads)",
    "an argument": "params, state = traced_step(opt, grads, state, params)",
    "update": "params, state = update.__wrapped__(opt, grads, state, params)",
    "compiled update": "params, state = update(opt, grads, state, params)",
    "optax": "params, state = optax_update(opt, grads, state, params)",
    "numpy": "params, state = opt.step(jax.device_get(grads), *jax.device_get((state, params)))",
    "scan": "params, state = scan(opt, [grads] * 3, state, params)",
    "vmap": "params, state = vmap(make, [1.0, RATE], grads, state, params)",
}
HOW = st.sampled_from(sorted(STEPS))
KINDS = st.sampled_from(["normal", "ones", "spread", "spike"])
FROZEN = st.sampled_from([None, None, None, 0, 1])
OTHERS = ["pickle", "flatten", "to_numpy", "to_arrays", "another_rate", "move", "save_and_restore"]
OTHERS += ["through_optax", "through_torch", "change_dtype"]


class Adversary(RuleBasedStateMachine):
    """One program: its lines are run as they are noted."""

    optimizers = adversary.OPTIMIZERS

    def __init__(self):
        super().__init__()
        self.names = dict(vars(vocabulary))
        self.lines = []
        self.count, self.rate, self.moved = 0, RATE, 0

    def run(self, line):
        self.lines.append(line)
        exec(line, self.names)

    def teardown(self):
        note("\n".join([HEADER + inspect.getsource(vocabulary), *self.lines]))
        if "folder" in self.names:
            shutil.rmtree(self.names["folder"])

    @initialize(data=st.data())
    def start(self, data):
        draw = data.draw
        count = draw(st.integers(1, 3))
        container, kinds = draw(st.sampled_from(CONTAINERS[count])), draw(st.sampled_from(DTYPES))
        self.container = container
        self.shapes = [draw(st.sampled_from(SHAPES)) for _ in range(count)]
        self.dtypes = [draw(st.sampled_from(kinds)) for _ in range(count)]
        self.spec = draw(
            specs(draw(st.sampled_from(self.optimizers)), kinds, groups=container.startswith("{'a': §, 'b': §"))
        )
        rows = enumerate(zip(self.shapes, self.dtypes, strict=True))
        leaves = [f"array('normal', {i}, 0.5, {shape}, '{dtype}')" for i, (shape, dtype) in rows]
        self.run(f"make = lambda rate: {self.spec.source.replace('§', 'rate')}")
        self.run(f"opt = make({RATE})")
        self.run(f"params = {fill(container, leaves)}")
        self.run("state = opt.init(params)")
        own = [0.03 if self.spec.wrapper.groups and i == 0 else None for i in range(count)]
        params = jax.tree.leaves(self.names["params"])
        self.leaves = [LeafOracle(self.spec, p, rate) for p, rate in zip(params, own, strict=True)]

    # Steps.

    def gradients(self, kind, scale, seed, frozen=None, nan=None):
        leaves = []
        kind = "normal" if "float16" in self.spec.formats and adversary.FLOAT16_MOMENTS and kind != "nan" else kind
        for i, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
            own = "nan" if i == nan else kind
            size = limit(self.spec, own, scale, dtype) if scale else 0.0
            leaves.append("None" if i == frozen else f"array('{own}', {seed + i}, {size}, {shape}, '{dtype}')")
        self.run(f"grads = {fill(self.container, leaves)}")

    def advance(self, kind, scale, seed, how, frozen=None):
        if len(self.leaves) == 1 or how == "scan":
            frozen = None
        if how == "scan" and "coupled" in self.spec.decays:
            how = "compiled"  # which needs to know the rounded parameters between the steps
        self.gradients(kind, scale, seed, frozen)
        self.make_step(how, (kind, abs(scale)) if kind in ("normal", "ones") else None)

    @rule(kind=KINDS, scale=st.sampled_from(SCALES), seed=st.integers(0, 9), how=HOW, frozen=FROZEN)
    def step(self, kind, scale, seed, how, frozen):
        self.advance(kind, scale, seed, how, frozen)

    @rule(seed=st.integers(0, 9), how=HOW)
    def ordinary_step(self, seed, how):
        self.advance("normal", 1.0, seed, how)

    @rule(seed=st.integers(0, 9), size=st.floats(-4, 4), how=HOW, frozen=FROZEN)
    def any_step(self, seed, size, how, frozen):
        self.advance("normal", float(f"{10**size:.3g}"), seed, how, frozen)

    @rule(how=st.sampled_from(["eager", "compiled"]))
    def step_with_zeros(self, how):
        self.gradients("ones", 0.0, 0)
        self.make_step(how)

    @precondition(lambda self: self.spec.wrapper.skips)
    @rule(how=st.sampled_from(["eager", "compiled", "optax", "update"]))
    def step_with_nan(self, how):
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        nan = int(np.argmax(sizes))
        if sizes[nan] == 0:
            return
        self.gradients("normal", 1.0, 0, nan=nan)
        before = self.names["params"], self.names["state"].inner
        self.run(STEPS[how])
        assert_equal((self.names["params"], self.names["state"].inner), before)

    def make_step(self, how, even=None):
        params, state = before = jax.tree.map(np.array, (self.names["params"], self.names["state"]))
        grads = jax.tree.structure(params).flatten_up_to(self.names["grads"])
        self.run(STEPS[how].replace("RATE", repr(self.rate)))
        after = self.names["params"], self.names["state"]
        assert_same_types(after, before)
        seen, _ = adversary.wide_params(self.spec, params, state)
        found, precision = adversary.wide_params(self.spec, *after)
        steps = 3 if how == "scan" else 1
        expected = [Expected(0.0, 0.0, 0.0, 0.0)] * len(grads)
        for _ in range(steps):
            rate = self.rate
            if self.spec.scheduled:
                rate = self.rate * (1 + np.cos(np.pi * min(self.count / 20, 1))) / 2
            wide = [None if g is None else adversary.long_leaf(g, self.spec.of_torch) for g in grads]
            factor = clip_factor(wide) if self.spec.wrapper.clips else 1
            for i, (leaf, g) in enumerate(zip(self.leaves, wide, strict=True)):
                if g is None:
                    leaf.freeze()
                    continue
                made = leaf.advance(seen[i] + expected[i].change, g * factor, rate, even)
                expected[i] = Expected(*(a + b for a, b in zip(expected[i], made, strict=True)))
            self.count += 1
        for i, (leaf, g) in enumerate(zip(self.leaves, grads, strict=True)):
            p, least = jax.tree.leaves(after[0])[i], adversary.smallest(self.dtypes[i])
            if g is None:
                assert_equal(p, jnp.asarray(jax.tree.leaves(params)[i]))
                continue
            ends = seen[i], seen[i] + expected[i].change, expected[i].change
            rounding = steps * (precision[i] * np.max(np.abs(ends), axis=0) + least)
            self.compare(i, leaf, found[i] - seen[i], expected[i], rounding)
            if self.spec.wrapper.rounds in ("kahan", "master", "low_bits", "low_bits=8"):
                nearest = float(jnp.finfo(self.dtypes[i]).eps) / 2 * np.abs(found[i]) + least
                assert np.all(np.abs(adversary.long_leaf(p, self.spec.of_torch) - found[i]) <= 1.01 * nearest)

    def compare(self, i, leaf, found, expected, rounding):
        where = f"parameter {i} ({self.dtypes[i]}{list(self.shapes[i])}) at step {self.count}"
        fits = np.abs(expected.change) < float(jnp.finfo(self.dtypes[i]).max) / 4
        assert np.all(np.isfinite(found) | ~fits), f"{where} is not finite"
        found, change = np.where(fits, found, 0), np.where(fits, expected.change, 0)
        excess = np.abs(found) - expected.bound - rounding
        assert np.all(excess <= 0), (
            f"{where} moves by {worst(np.abs(found), excess) / self.rate:.4g} learning rates, where Adam moves by at "
            f"most {worst(expected.bound, excess) / self.rate:.4g}"
        )
        error = np.abs(found - change)
        if leaf.quantized:
            part = max(ADVERSARY[x] for x in leaf.formats if x in CODES)
            norms = [np.linalg.norm(np.asarray(x, float)) for x in (error, expected.size, rounding)]
            assert not leaf.even or norms[0] <= part * norms[1] + norms[2], f"{where} is off by {norms[0]}"
            return
        allowed = expected.tolerance + rounding
        assert np.all(error <= allowed), (
            f"{where} is {np.max(error) / self.rate:.3g} learning rates off: it changes by "
            f"{worst(found, error - allowed)}, expected {worst(change, error - allowed)} "
            f"+- {worst(allowed, error - allowed)}"
        )

    # Other calls, none of which may change the course.

    def unchanged(self, *lines):
        """Lines after which parameters and state are the same, bit for bit."""
        before = self.names["params"], self.names["state"]
        for line in lines:
            self.run(line)
        assert_equal((self.names["params"], self.names["state"]), before)

    @rule(name=st.sampled_from(OTHERS), number=st.integers(0, 2))
    def call(self, name, number):
        getattr(self, name)(number)

    def pickle(self, number):
        self.unchanged("opt, params, state = pickle.loads(pickle.dumps((opt, params, state)))")

    def flatten(self, number):
        self.unchanged("opt, params, state = jax.tree.map(lambda x: x, (opt, params, state))")

    def to_numpy(self, number):
        self.unchanged("params, state = jax.device_get((params, state))")

    def to_arrays(self, number):
        """The hyperparameters become arrays."""
        self.unchanged("opt = jax.tree.map(jnp.asarray, opt)")

    def another_rate(self, number):
        self.rate = [0.001, 0.01, 0.02][number]
        self.unchanged(f"opt = make({self.rate})")

    def move(self, number):
        """To another device, or to a mesh; a few times, since all programs are compiled anew."""
        if self.moved == 2:
            return
        self.moved += 1
        if number:
            self.unchanged(
                "params = placed(params, mesh_of(2))",
                "state = jax.device_put(state, adamjax.sharding.state_sharding(opt, params))",
            )
        else:
            self.unchanged("params, state = jax.device_put((params, state), jax.devices()[1])")

    def save_and_restore(self, number):
        """Once, since it takes a quarter of a second."""
        if "folder" in self.names:
            return
        self.unchanged(
            "folder = tempfile.mkdtemp()",
            "adamjax.checkpoint.save(folder, opt, params, state, step=3)",
            "_, params, state, _ = adamjax.checkpoint.restore(folder, opt, params)",
        )

    def through_optax(self, number):
        if goes_to_optax(self.spec):
            exported = "interop.optax.export_state(opt, state)"
            self.unchanged(f"state = interop.optax.import_state(opt, params, {exported})")

    def through_torch(self, number):
        if goes_to_torch(self.spec, self.dtypes):
            exported = "interop.torch.export_state(opt, params, state)"
            self.unchanged(f"state = interop.torch.import_state(opt, params, {exported})")

    def change_dtype(self, number):
        wrapper = self.spec.wrapper
        if not (wrapper.rounds or wrapper.packs or "complex64" in self.dtypes):
            dtype = ["float32", "bfloat16", "float16"][number]
            self.run(f"params = jax.tree.map(lambda p: jnp.asarray(p, '{dtype}'), params)")
            self.dtypes = [dtype] * len(self.dtypes)


def worst(x, excess):
    """The number where the excess is largest."""
    return np.broadcast_to(x, np.shape(excess)).flat[np.argmax(excess)]


def clip_factor(grads):
    """Of a norm of 1."""
    norm = np.sqrt(sum(np.sum(np.abs(g) ** 2) for g in grads if g is not None))
    return 1 / norm if norm > 1 else 1


def goes_to_optax(spec):
    plain = spec.wrapper.source == "§" and not spec.of_torch and not spec.quantized
    return plain and spec.rule.get("amsgrad") != "torch" and not {*spec.decays} & {"coupled", "maximize"}


def goes_to_torch(spec, dtypes):
    if spec.of_torch:
        return spec.wrapper.source == "§"
    ours = spec.name in ("adam", "adamw", "amsgrad", "adamax", "adamaxw") and not spec.rule.get("nesterov")
    plain = spec.wrapper.source == "§" and spec.formats == (None, None) and "complex64" not in dtypes
    return ours and plain and spec.rule.get("amsgrad") in (None, "torch")


IN_CI = 60
EXAMPLES = int(os.environ.get("ADAMJAX_ADVERSARY", IN_CI))


def look(machine, examples, steps, **options):
    """Run that many programs."""
    every = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=every, **options
        ),
    )


def test_a_few_programs():
    look(Adversary, 3, 8, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", adversary.OPTIMIZERS, ids=lambda x: " ".join(filter(None, x[:3])))
def test_many_programs(optimizer):
    """`ADAMJAX_ADVERSARY` says how many for all optimizers together; except in CI, they are others each time."""

    class OfOneOptimizer(Adversary):
        optimizers = (optimizer,)

    look(OfOneOptimizer, max(EXAMPLES // len(adversary.OPTIMIZERS), 1), 12, derandomize=EXAMPLES == IN_CI)
