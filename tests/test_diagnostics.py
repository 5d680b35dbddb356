"""The figures against others' arithmetic; the findings against runs that have the illness, and runs that have not."""

import base64
import html
import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowl import BOWL
from helpers import assert_close, assert_equal, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import ROUNDED, SPECS, STORED
from tolerances import RECOMPILED, STORAGE_ERROR

import adamjax
from adamjax import training
from adamjax.cli import main
from adamjax.diagnostics import History, LogWriter, explain, measure, scalars

pytestmark = pytest.mark.numbers

STEPS = 150
WEIGHTS = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)


class Knobs(NamedTuple):
    """What makes a run ill, or nothing."""

    scale: float = 1.0  # of the loss
    connected: float = 1.0  # how much of the bias gets through to the loss
    poison: int = -1  # the step whose loss is NaN
    spread: float = 0.0  # decades from the first output to the last


def healthy_params(dtype):
    return {"kernel": jnp.asarray(0.3 * WEIGHTS[::-1], dtype), "bias": jnp.zeros(8, dtype)}


@partial(jax.jit, static_argnames="dtype")
def course(opt, knobs, dtype="float32"):
    """Linear regression; the figures of each step."""
    params = healthy_params(dtype)
    state = opt.init(params)

    def loss(params, state, step):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (32, 16))
        bias = params["bias"] * knobs.connected + jax.lax.stop_gradient(params["bias"]) * (1 - knobs.connected)
        y = x.astype(dtype) @ params["kernel"] + bias.astype(dtype)[None]
        wrong = y - (x @ WEIGHTS + 1).astype(dtype)
        wrong = wrong * (10.0 ** jnp.linspace(0, -knobs.spread / 2, 8)).astype(dtype)[None]
        # The loss is scaled where a model would do it: in its own precision.
        found = jnp.mean((wrong * wrong * jnp.asarray(knobs.scale, dtype)).astype("float32"))
        found = found * jnp.where(step == knobs.poison, jnp.nan, 1.0)
        return opt.scale(found, state) if isinstance(opt, adamjax.safety.DynamicLossScale) else found

    def body(carry, step):
        params, state = carry
        grads = jax.grad(loss)(params, state, step)
        updates, after = opt.update(grads, state, params)
        if isinstance(opt, adamjax.safety.DynamicLossScale):
            grads = opt.unscale(grads, state)
        stats = measure(grads, updates, after, params, opt=opt)
        return (adamjax.apply_updates(params, updates), after), stats

    return jax.lax.scan(body, (params, state), jnp.arange(STEPS))[1]


def findings(opt, dtype="float32", **knobs):
    stats = jax.device_get(course(opt, Knobs(**knobs), dtype))
    return explain(jax.tree.map(lambda x, i=i: x[i], stats) for i in range(STEPS))


adam = partial(adamjax.adamw, 1e-2)
HEALTHY = {
    "adamw": (adam, {}),
    "bfloat16": (lambda: adamjax.stochastic_rounding(adamjax.adamw(1e-4)), {"dtype": "bfloat16"}),
    "float16": (
        lambda: adamjax.dynamic_loss_scale(adamjax.master_weights(adamjax.adamw(1e-2, eps=1e-12))),
        {"dtype": "float16", "scale": 1e-6},
    ),
    "int8": (
        lambda: adam(mu_dtype=adamjax.quantized("int8", min_size=1), nu_dtype=adamjax.quantized("int8", min_size=1)),
        {"spread": 2.0},
    ),
}
# By rule: the optimizer, the knobs, the paths found, and what stands in the words.
ILL = {
    "eps": (adam, {"scale": 1e-10}, {"kernel", "bias"}, "lower eps, or scale the loss"),
    "eps 1": (lambda: adam(eps=1.0), {}, {"kernel", "bias"}, "eps (1e+00) dominates 100 % of kernel"),
    "rate_high": (lambda: adamjax.adamw(3.0), {}, {"all parameters"}, "x too high"),
    "rate_low": (lambda: adamjax.adamw(1e-9), {}, {"all parameters"}, "x too low"),
    "warm_up": (
        lambda: adam(b2=0.9999),
        {},
        {"all parameters"},
        "b2=0.9999 needs about 10000 steps, the run has 150",
    ),
    "uphill": (lambda: adam(maximize=True), {}, {"all parameters"}, "updates point uphill"),
    "no_gradient": (adam, {"connected": 0.0}, {"bias"}, "never got a gradient but 0"),
    "nonfinite": (adam, {"poison": 70}, {"kernel", "bias"}, "not finite in 80 of 150 measured steps, first at step 71"),
    "rounding": (
        lambda: adamjax.adamw(1e-4),
        {"dtype": "bfloat16"},
        {"kernel"},
        "rounding to bfloat16 discards",
    ),
    "underflow": (
        lambda: adamjax.master_weights(adamjax.adamw(1e-2, eps=1e-12)),
        {"dtype": "float16", "scale": 1e-6},
        {"kernel", "bias"},
        "dynamic_loss_scale",
    ),
    "storage": (
        lambda: adam(nu_dtype=adamjax.quantized("int4", min_size=1, keep=lambda path: path == "bias")),
        {"spread": 5.0},
        {"kernel"},
        "changes its direction by",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_run(name):
    make, knobs = HEALTHY[name]
    assert findings(make(), **knobs) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ILL)
def test_an_illness_is_found(name):
    make, knobs, paths, words = ILL[name]
    found = findings(make(), **knobs)
    rule = name.split()[0]
    assert {finding.path for finding in found if finding.rule == rule} == paths
    assert any(words in str(finding) for finding in found)
    # And no other one, but for what such an illness brings with it.
    assert {finding.rule for finding in found} <= {rule, *BRINGS.get(rule, ())}


BRINGS = {"rate_low": ("rounding",), "uphill": ("rate_high",)}


PARAMS = {"a": gradients((6, 5), 1, seed=3)[0], "b": {"c": gradients((7,), 1, seed=4)[0], "d": np.float32(2.0)}}
GRADS = [
    {"a": a, "b": {"c": c, "d": d}}
    for a, c, d in zip(*(gradients(np.shape(x), 3, i) for i, x in enumerate(jax.tree.leaves(PARAMS))), strict=True)
]
GRADS[2]["a"][0] = 0.0


def measured(optimizer, params=None, steps=3, opt=None):
    """The figures of the last step, with the gradients, updates, state and parameters that they are of."""
    params = jax.tree.map(jnp.asarray, PARAMS if params is None else params)
    all_grads = [
        {name: jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), grads[name], p) for name, p in params.items()}
        for grads in GRADS[3 - steps :]
    ]

    @jax.jit
    def run(params, all_grads):
        state = optimizer.init(params)
        for i, grads in enumerate(all_grads):
            updates, state = optimizer.update(grads, state, params)
            if i + 1 < steps:
                params = adamjax.apply_updates(params, updates)
        return measure(grads, updates, state, params, opt=opt), grads, updates, state, params

    return run(params, all_grads)


def in_double(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def parts_of(name, member, adam, tree, t=3):
    """The first moment and the root of the second, as they are in the direction."""
    m, v = in_double(tree(adam.mu)), in_double(tree(adam.nu))
    if name == "adopt":
        return m, np.ones_like(v)
    if getattr(adam, "nu_max", None) is not None:
        v = in_double(tree(adam.nu_max))
    m_hat = m / (1 - member.b1 ** (1 if name == "simplified_ademamix" else t))
    if name.startswith("ademamix"):
        alpha = member.alpha(t - 1) if callable(member.alpha) else member.alpha
        m_hat = m_hat + float(alpha) * in_double(tree(adam.mu_slow))
    c2 = 1.0 if name == "amsgrad corrected" else 1 - member.b2**t
    return m_hat, v - member.eps if name == "adamax" else np.sqrt(v / c2 + member.eps_root)


@pytest.mark.parametrize(
    "name",
    [
        *("adam eps", "amsgrad torch", "amsgrad corrected", "adamax", "radam", "adamw schedules"),
        *("adam cautious update", "ademamix", "ademamix schedules", "simplified_ademamix", "adopt", "adam_atan2"),
        "stable_adamw",
    ],
)
def test_figures_are_what_they_are_called(name):
    opt = SPECS[name].make()
    stats, grads, updates, (adam, *_), params = measured(opt, opt=opt)
    member = opt.transforms[0]
    for path, tree in [("all", lambda x: x), ("a", lambda x: x["a"]), ("b/c", lambda x: x["b"]["c"])]:
        g, u, p = (in_double(tree(x)) for x in (grads, updates, params))
        m_hat, root = parts_of(name, member, adam, tree)
        found = stats.overall if path == "all" else stats[path]
        expected = {
            "size": g.size,
            "gradient_norm": np.linalg.norm(g),
            "update_norm": np.linalg.norm(u),
            "parameter_norm": np.linalg.norm(p),
            "update_ratio": np.linalg.norm(u) / np.linalg.norm(p),
            "eps_dominated": np.mean(root < member.eps),
            "lost": 0.0,
            "zero_gradients": np.mean(g == 0),
            "nonfinite_gradients": 0.0,
            "storage_error": 0.0,
            "signal_to_noise": np.linalg.norm(m_hat) / np.linalg.norm(root),
            "cosine": g @ u / np.linalg.norm(g) / np.linalg.norm(u),
            "b2": member.b2,
            "eps": member.eps,
        }
        if path != "all":
            rates = np.sort(np.abs(u) / np.abs(m_hat))
            names = ("rate_low", "rate_median", "rate_high")
            expected |= dict(zip(names, np.quantile(rates, (0.05, 0.5, 0.95), method="nearest"), strict=True))
        for name_of_figure, x in expected.items():
            np.testing.assert_allclose(getattr(found, name_of_figure), x, rtol=1e-5, err_msg=name_of_figure)
    assert int(stats.count) == 3
    assert (stats.paths, stats.dtypes) == (("a", "b/c", "b/d"), ("float32",) * 3)


@pytest.mark.parametrize("name", ["ademamix schedules", "simplified_ademamix", "adopt"])
def test_parts_are_those_of_the_direction(name):
    """Whose rate is 1, without weight decay."""
    options = {"b3": adamjax.schedules.half_life(0.9, 0.99, 9)} if name == "ademamix schedules" else {}
    opt = getattr(adamjax, name.removesuffix(" schedules"))(1.0, **options)
    _, _, updates, (adam, *_), _ = measured(opt, opt=opt)
    m, v, third = (in_double(x) for x in (adam.mu, adam.nu, getattr(adam, "mu_slow", adam.nu)))
    parts = opt.transforms[0].parts(*(jnp.asarray(x, "float32") for x in (m, v, third)), jnp.float32(3))
    np.testing.assert_allclose(-in_double(updates), parts.m_hat / (parts.root + parts.eps), rtol=1e-5)


def test_without_the_optimizer_a_slow_mean_has_its_defaults():
    opt = adamjax.ademamix()
    given, without = (measured(opt, opt=given)[0] for given in (opt, None))
    assert_equal((given.overall, given.leaves), (without.overall, without.leaves))
    assert_equal((given.learning_rate, without.learning_rate), (jnp.float32(1e-3), None))


def test_lost_and_not_finite_elements_are_counted():
    p = jnp.asarray([1.0, 1.0, 1.0, 0.0], jnp.bfloat16)
    u = jnp.asarray([1e-4, 0.5, 0.0, 1e-4], jnp.bfloat16)
    g = jnp.asarray([jnp.nan, jnp.inf, 1.0, 0.0], jnp.bfloat16)
    stats = jax.jit(measure)(g, u, adamjax.scale_by_adam().init(p), p)
    assert_close(stats.overall.lost, jnp.float32(1 / 3), RECOMPILED)
    assert (float(stats.overall.nonfinite_gradients), float(stats.overall.zero_gradients)) == (0.5, 0.25)


def int8():
    return adamjax.quantized("int8", min_size=1, block_size=64)


@pytest.mark.parametrize(("size", "warns"), [(1e-7, True), (1.0, False), (1e6, True)])
def test_float16_moments_that_their_gradients_do_not_fit(size, warns):
    opt = adamjax.adam(1e-3, mu_dtype=jnp.float16)
    params, grads = jnp.ones((8, 8)), jnp.full((8, 8), size)
    updates, state = opt.update(grads, opt.init(params), params)
    found = explain(measure(grads, updates, state, params, opt=opt))
    assert ("storage" in [finding.rule for finding in found]) == warns


def test_the_storage_error_of_a_slow_mean():
    stored = adamjax.scale_by_ademamix(b3=0.9, mu_slow_dtype=int8())
    grads = jnp.asarray(gradients((64, 256), 1)[0])
    states = [opt.update(grads, opt.init(grads))[1] for opt in (adamjax.scale_by_ademamix(b3=0.9), stored)]
    slow = [adamjax.storage.decode(x).mu_slow for x in states]
    root = jnp.sqrt(states[0].nu / 0.001)
    wrong, right = 5 * (slow[1] - slow[0]) / root, (10 * states[0].mu + 5 * slow[0]) / root
    found = measure(grads, grads, states[1], grads, opt=stored).overall.storage_error
    np.testing.assert_allclose(found, jnp.linalg.norm(wrong) / jnp.linalg.norm(right), rtol=STORAGE_ERROR)


@pytest.mark.parametrize("formats", [(int8(), int8()), (int8(), None), (None, int8()), (jnp.bfloat16, jnp.bfloat16)])
def test_the_storage_error_is_what_storing_does(formats):
    stored = adamjax.scale_by_adam(mu_dtype=formats[0], nu_dtype=formats[1])

    @jax.jit
    def run(grads):
        directions = []
        for opt in (adamjax.scale_by_adam(), stored):
            _, state = opt.update(grads, opt.init(grads), grads)
            moments = adamjax.storage.decode(state)
            directions.append(moments.mu.astype(jnp.float32) / jnp.sqrt(moments.nu.astype(jnp.float32)))
        actual = jnp.linalg.norm(directions[1] - directions[0]) / jnp.linalg.norm(directions[0])
        return actual, measure(grads, grads, state, grads, opt=stored).overall.storage_error

    actual, estimate = run(jnp.asarray(gradients((64, 256), 1)[0]))
    np.testing.assert_allclose(estimate, actual, rtol=STORAGE_ERROR)


WRAPPED = {
    "optax": lambda: optax.adamw(1e-3),
    "in a chain": lambda: adamjax.chain(adamjax.clip_by_global_norm(1e9), adamjax.adamw(1e-3)),
    "groups": lambda: adamjax.groups({"b/": {"b2": 0.9, "eps": 1e-3}}, default=adamjax.adam()),
    "groups that overlap": lambda: adamjax.skip_nonfinite(
        adamjax.groups({"b/": {"eps": 1e-3}, "b/|x": {"b2": 0.9}}, default=adamjax.adam())
    ),
    "skip_nonfinite": lambda: adamjax.skip_nonfinite(adamjax.adam()),
    "skip_spikes": lambda: adamjax.skip_spikes(adamjax.adam()),
    "interop.torch": lambda: adamjax.interop.torch.adam(),
    **{name: STORED[name].make for name in ("torch's nadam", "amsgrad int8", *ROUNDED)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_moments_are_found_wherever_they_are(name, lenient):
    opt, params = WRAPPED[name](), PARAMS if name.startswith("groups") else {"a": PARAMS["a"]}
    params = jax.tree.map(lambda p: jnp.asarray(p, "bfloat16" if name in ROUNDED else "float32"), params)
    stats, *_ = measured(opt, params, steps=1, opt=opt)
    # At the first step, the moments are the gradient and its square.
    np.testing.assert_allclose(stats.leaves.signal_to_noise, 1.0, rtol=0.05 if "int8" in name else 1e-2)
    assert int(stats.count) == 1
    if name.startswith("groups"):
        assert_close(np.asarray(stats.leaves.b2), np.float32([0.999, 0.9, 0.9]), RECOMPILED)


def test_complex_parameters_of_torch():
    p = jnp.asarray(gradients((4, 3), 1, dtype=np.complex64)[0])
    opt = adamjax.interop.torch.adam()
    updates, state = opt.update(p, opt.init(p), p)
    stats = jax.jit(partial(measure, opt=opt))(p, updates, state, p)
    assert_close(stats.overall.size, jnp.float32(24), RECOMPILED)
    assert_close(stats.overall.gradient_norm, jnp.linalg.norm(p), RECOMPILED)


def sharded(axis_type, spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params = jnp.asarray(WEIGHTS)
    with jax.set_mesh(mesh):
        place = partial(jax.device_put, device=NamedSharding(mesh, spec))
        return jax.jit(_first_step)(place(params), place(params))


def _first_step(params, grads, **options):
    opt = adamjax.adamw(1e-2)
    updates, state = opt.update(grads, opt.init(params), params)
    return measure(grads, updates, state, params, opt=opt, **options)


@pytest.mark.parametrize("check_vma", [True, False])
def test_figures_of_shards_are_those_of_the_whole(check_vma):
    expected = jax.jit(_first_step)(jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    found = jax.jit(
        jax.shard_map(
            partial(_first_step, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
    )(WEIGHTS, WEIGHTS)
    exact = [name for name in expected.overall._fields if not name.startswith("rate")]
    assert_close(*([getattr(x.overall, name) for name in exact] for x in (found, expected)), RECOMPILED)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        assert_close(sharded(axis_type, P("data")), expected, RECOMPILED)


@pytest.mark.usefixtures("lenient")
def test_parameters_that_adam_does_not_train():
    opt = optax.masked(adamjax.adam(0.1), {"a": True, "b": False})
    updates, state = jax.jit(opt.update)(GRADS[2], opt.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"no moments of params\['b'\]\['c'\]: .*the gradient should be None"):
        measure(GRADS[2], updates, state, PARAMS)
    none = {"b": {"c": None, "d": None}}
    stats = jax.jit(measure)(GRADS[2] | none, updates | none, state, PARAMS)
    assert stats.paths == ("a",)
    assert_close(stats["a"], measured(adamjax.adam(0.1), steps=1)[0]["a"], RECOMPILED)


@cache
def first_stats():
    return measured(adamjax.adam())[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measure(GRADS[0], GRADS[0], (), PARAMS), ValueError, "there are no moments in the state"),
        (
            lambda: measure({"a": np.ones(2)}, {"a": np.ones(2)}, adamjax.adam().init(PARAMS), {"a": np.ones(2)}),
            ValueError,
            "the moments of params",
        ),
        (
            lambda: measured(adamjax.adam(), opt=adamjax.groups({"a": adamjax.adam()}, default=adamjax.adam())),
            ValueError,
            "has 2 members with b1, b2 and eps, and the state has moments at 1 places",
        ),
        (lambda: measure({"a": None}, {"a": None}, adamjax.adam().init(PARAMS), PARAMS), ValueError, "lack"),
        (
            lambda: measure({"a": None}, {"a": None}, adamjax.adam().init({"a": np.ones(2)}), {"a": np.ones(2)}),
            ValueError,
            "there are no gradients to measure",
        ),
        (lambda: first_stats()["c"], KeyError, "no parameter 'c'; there are a, b/c, b/d"),
        (lambda: explain([]), ValueError, "nothing has been measured"),
        (lambda: History().plot(), ValueError, "nothing has been measured"),
        (
            lambda: explain(jax.tree.map(lambda x: jnp.stack([x, x]), first_stats())),
            ValueError,
            "runs at once: take those of one",
        ),
        (
            lambda: explain([first_stats(), jax.jit(_first_step)(WEIGHTS, WEIGHTS)]),
            ValueError,
            "figures of other parameters: ",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_holds_for_many_parameters_is_said_of_a_few():
    params = {f"layer_{i:02}": jnp.ones(3) for i in range(20)}
    grads = jax.tree.map(jnp.zeros_like, params)
    opt = adamjax.adam()
    updates, state = jax.jit(opt.update)(grads, opt.init(params), params)
    stats = jax.jit(measure)(grads, updates, state, params)
    found = [finding for finding in explain(stats) if finding.rule == "no_gradient"]
    assert [finding.path for finding in found] == [*list(params)[:5], "15 other parameters"]
    assert "the same holds for 15 other parameters" in str(found[-1])
    seen = History()
    seen.append(stats)
    labels = [text.get_text() for text in seen.plot().legends[0].get_texts()]
    assert labels == ["layer_00", "layer_19", "all parameters"]


def history(opt=None, steps=5):
    stats = jax.device_get(course(adam() if opt is None else opt, Knobs()))
    found = History()
    for i in range(steps):
        found.append(jax.tree.map(lambda x, i=i: x[i], stats))
    return found


def test_a_history_is_drawn(tmp_path):
    found = history()
    figure = found.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["bias", "kernel", "all parameters"]
    np.testing.assert_array_equal(lines[0].get_xdata(), range(1, 6))
    np.testing.assert_allclose(lines[0].get_ydata(), [x["bias"].gradient_norm for x in found], rtol=1e-6)
    assert found.explain() == explain(found)


def test_paths_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    name = r"$\frac{$"
    params = {name: jnp.ones(2)}
    opt = adam()
    found = History()
    found.append(jax.jit(measure)(params, params, opt.init(params), params))
    figure = found.plot(tmp_path / "history.png")
    assert figure.axes[0].lines[0].get_label() == r"\$\frac{\$"


def test_figures_are_logged(tmp_path):
    pytest.importorskip("tensorboardX")
    stats = next(iter(history(steps=1)))
    with LogWriter(tmp_path) as log:
        log.write(stats)
    (file,) = tmp_path.iterdir()
    tags = scalars(stats)
    assert tags["learning_rate"] == np.float32(1e-2)
    assert all(tag.encode() in file.read_bytes() for tag in tags)
    assert tags["gradient_norm/kernel"] == float(stats["kernel"].gradient_norm)
    assert tags["update_ratio/all"] == float(stats.overall.update_ratio)


def test_a_page_has_findings_picture_and_figures(tmp_path):
    found = history(adamjax.adamw(1e-9), steps=STEPS)
    found.save(tmp_path, title="Mine & <yours>")
    page = (tmp_path / "diagnostics.html").read_text()
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in page
    assert page.count("<li>") == len(found.explain()) > 0
    assert all(html.escape(str(finding)) in page for finding in found.explain())
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(png) == (tmp_path / "diagnostics.png").read_bytes()
    assert base64.b64decode(png).startswith(b"\x89PNG")
    *_, last = found
    assert page.count("<tr>") == 2 + len(last.paths)
    assert f"<td>{float(last['kernel'].gradient_norm):.3g}</td>" in page
    assert not re.search("https?:|<script", page)


@pytest.mark.slow
def test_a_run_that_is_measured_is_the_same_run(tmp_path, capsys):
    opt = adamjax.adam(0.1)
    *_, plain = training.train(BOWL, opt, steps=30)
    reports = list(training.train(BOWL, opt, steps=30, diagnose=True))
    assert_equal((reports[-1].params, reports[-1].state), (plain.params, plain.state))
    assert [int(report.stats.count) for report in reports[:-1]] == [1, 11, 21]
    flags = ["bowl:BOWL", "--steps", "20", "--out", str(tmp_path), "--learning-rate", "1e-9"]
    assert main(["train", *flags, "--diagnose", "--tensorboard", "--schedule", "constant"]) == 0
    assert "no update is more than" in capsys.readouterr().out
    assert (tmp_path / "diagnostics.png").exists()
    assert "<h1>Diagnosis of bowl:BOWL, adamw</h1>" in (tmp_path / "diagnostics.html").read_text()
    logs = list((tmp_path / "tensorboard").iterdir())
    assert logs
    assert main(["train", *flags, "--tensorboard"]) == 2  # the folder holds a run already, which gets no other log
    assert list((tmp_path / "tensorboard").iterdir()) == logs


def normalized(h):
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)


def findings_of(loss, params, steps=20):
    opt = adamjax.adam(1e-3)
    state, history = opt.init(params), adamjax.diagnostics.History()

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = opt.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, measure(grads, updates, state, params, opt=opt)

    for i in range(steps):
        params, state, stats = step(params, state, jax.random.normal(jax.random.key(i), (64, 16)))
        history.append(stats)
    return [(finding.rule, finding.path) for finding in history.explain()]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_a_bias_before_a_normalization(scale):
    """Its gradient is 0 but for rounding: eps is no remedy. Where all gradients are small, it is."""

    def loss(params, x):
        first, norm, last = (params[name] for name in ("first", "norm", "last"))
        hidden = jax.nn.relu(normalized(x @ first["kernel"] + first["bias"]) * norm["scale"] + norm["bias"])
        return scale * jnp.mean((hidden @ last["kernel"] + last["bias"] - jnp.sin(x[:, :2])) ** 2)

    params = {
        "first": {"kernel": jax.random.normal(jax.random.key(0), (16, 32)) / 4, "bias": jnp.zeros(32)},
        "norm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)},
        "last": {"kernel": jax.random.normal(jax.random.key(1), (32, 2)) / 6, "bias": jnp.zeros(2)},
    }
    found = findings_of(loss, params)
    others = {("eps", "first/kernel"), ("eps", "last/kernel")} if scale < 1 else set()
    assert ("zero_but_for_rounding", "first/bias") in found
    assert others <= set(found)
    assert scale < 1 or len(found) == 1


@pytest.mark.usefixtures("lenient")
def test_the_bias_of_the_keys():
    def loss(params, x):
        x = x.reshape(8, 8, 16)
        q, k, v = (x @ params[name]["kernel"] + params[name]["bias"] for name in "qkv")
        # So small that rounding errors are below eps on any processor.
        return 0.1 * jnp.mean((jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k) / 4) @ v - jnp.sin(x)) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(key, (16, 16)) / 4 for key in keys]
    params = {n: {"kernel": kernel, "bias": jnp.ones(16)} for n, kernel in zip("qkv", kernels, strict=True)}
    assert findings_of(loss, params) == [("zero_but_for_rounding", "k/bias")]


def test_eps_is_not_blamed_for_parameters_that_died():
    opt = adamjax.adam(1e-3, b2=0.5)
    params = {"w": jnp.ones((4, 4))}
    state = opt.init(params)
    _, state = opt.update({"w": jnp.ones((4, 4))}, state, params)
    history = []
    for _ in range(80):
        grads = {"w": jnp.zeros((4, 4))}
        updates, state = opt.update(grads, state, params)
        history.append(measure(grads, updates, state, params, opt=opt))
    assert "eps" not in {finding.rule for finding in explain(history[60:])}
