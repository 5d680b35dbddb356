"""The optimizers of torch in JAX: the same courses, and states that go on in the other."""

import importlib.util
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from helpers import assert_equal, assert_same_types
from tolerances import TORCH_COURSE

import adamjax
from adamjax.interop import torch as optim

pytestmark = pytest.mark.numbers

GOLDEN = np.load(Path(__file__).parent / "golden" / "torch.npz")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
ONE_OF_EACH = ("adam decoupled amsgrad", "adamw", "nadam decoupled", "radam decoupled eps", "adamax coupled maximize")


def make(name):
    function, arguments = cases.CASES[name]
    return getattr(optim, function)(**arguments)


def course(opt, p, state, grads):
    """The parameters after each step, in double, and the last state."""
    step, found = jax.jit(opt.step), []
    for g in grads:
        p, state = (opt.step if g is None else step)(None if g is None else jnp.asarray(g), state, p)
        found.append(np.asarray(p))
    return np.stack(found), state


def assert_same_course(found, expected, tolerance):
    # Relative, but for a parameter that passes through 0.
    error = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-3)
    assert np.max(error) <= tolerance


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in cases.CASES for dtype in cases.DTYPES if "complex" not in dtype or name in ONE_OF_EACH],
)
def test_courses_are_torchs(name, dtype):
    precision = {"float64": "float64", "complex128": "float64"}.get(dtype, "float32")
    with jax.enable_x64(precision == "float64"):
        opt, p = make(name), jnp.asarray(cases.start(dtype))
        state = opt.init(p)
        found, last = course(opt, p, state, cases.gradients(dtype))
        assert_same_types(last, state)
        assert_same_course(found[9::10], GOLDEN[f"{name}/{dtype}/course"], TORCH_COURSE[precision])


@needs_torch
@pytest.mark.parametrize("name", cases.CASES)
def test_the_golden_courses_are_those_of_torch_here(name):
    for dtype in cases.DTYPES:
        live, _ = cases.run_torch(name, dtype)
        precision = "float64" if dtype in ("float64", "complex128") else "float32"
        assert_same_course(live[9::10], GOLDEN[f"{name}/{dtype}/course"], TORCH_COURSE[precision] / 10)


def half_way(name):
    """The state_dict of torch after half of the steps, of NumPy arrays, and its parameter there."""
    prefix = f"{name}/float32/"
    entry = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}
    p = entry.pop("course")[cases.HALF // 10 - 1]
    key = {"adam": "amsgrad", "adamw": "amsgrad", "nadam": "momentum_decay"}.get(cases.CASES[name][0])
    group = {"betas": (0.9, 0.999)} | ({key: None} if key else {})
    return {"state": {0: entry}, "param_groups": [group | {"params": [0]}]}, p


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_run_of_torch_continues_here(name):
    opt = make(name)
    state_dict, p = half_way(name)
    state = optim.import_state(opt, jnp.asarray(p), state_dict)
    assert_same_types(state, opt.init(jnp.asarray(p)))
    assert int(state[0].count) == cases.HALF - 2
    found, _ = course(opt, jnp.asarray(p), state, cases.gradients("float32")[cases.HALF :])
    expected = GOLDEN[f"{name}/float32/course"][cases.HALF // 10 :]
    assert_same_course(found[9::10], expected, TORCH_COURSE["float32"])
    flat = {f"state.0.{key}": x for key, x in state_dict["state"][0].items()}  # as in a safetensors file
    assert_equal(optim.import_state(opt, jax.ShapeDtypeStruct(p.shape, p.dtype), flat), state)


@needs_torch
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "adam coupled maximize"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_a_run_of_ours_continues_in_torch(name, dtype):
    import torch

    opt, grads = make(name), cases.gradients(dtype)
    p = jnp.asarray(cases.start(dtype))
    found, state = course(opt, p, opt.init(p), grads[: cases.HALF])
    tensor = torch.nn.Parameter(torch.tensor(found[-1]))
    other = getattr(torch.optim, cases.CLASSES[cases.CASES[name][0]])([tensor])
    exported = optim.export_state(opt, p, state)
    assert_equal(optim.import_state(opt, p, exported), state)
    other.load_state_dict(exported)
    assert other.param_groups[0]["lr"] == cases.CASES[name][1].get("lr", other.defaults["lr"])
    for g in grads[cases.HALF :]:
        tensor.grad = None if g is None else torch.tensor(g)
        other.step()
    expected = GOLDEN[f"{name}/{dtype}/course"][-1]
    assert_same_course(tensor.detach().numpy(), expected, 2 * TORCH_COURSE["float32"])


MODEL = {"layer_0": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}, "scale": jnp.zeros(())}
ORDER = ["layer_0/kernel", "scale", "layer_0/bias"]


def transposed(path, x):
    return x.T if path.endswith("kernel") else x


@needs_torch
@pytest.mark.parametrize("opt", [optim.adamw(1e-2), adamjax.adamw(1e-2, weight_decay=1e-2)], ids=["interop", "core"])
def test_a_whole_model_with_its_order_layout_and_groups(opt):
    """The kernel of torch is ours transposed, its order another one, and it has two groups."""
    import torch

    torch.manual_seed(0)
    tensors = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (), (3,))]
    other = torch.optim.AdamW([{"params": tensors[:1]}, {"params": tensors[1:]}], lr=1e-2)
    ours = {"layer_0": {"kernel": tensors[0].detach().numpy().T, "bias": tensors[2].detach().numpy()}}
    ours = jax.tree.map(jnp.array, ours | {"scale": tensors[1].detach().numpy()})

    def torch_step():
        for p in tensors:
            p.grad = torch.randn_like(p)
        other.step()
        grads = [p.grad.numpy() for p in tensors]
        return jax.tree.map(jnp.array, {"layer_0": {"kernel": grads[0].T, "bias": grads[2]}, "scale": grads[1]})

    state = opt.init(ours)
    for _ in range(5):
        ours, state = opt.step(torch_step(), state, ours)
    imported = optim.import_state(opt, ours, other.state_dict(), order=ORDER, convert=transposed)
    for a, b in zip(jax.tree.leaves(imported), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)
    exported = optim.export_state(opt, ours, imported, order=ORDER, convert=transposed)
    for index, entry in other.state_dict()["state"].items():
        for key, x in entry.items():
            np.testing.assert_allclose(exported["state"][index][key].numpy(), x.numpy(), rtol=1e-6)
    ours, state = opt.step(torch_step(), imported, ours)
    np.testing.assert_allclose(ours["layer_0"]["kernel"], tensors[0].detach().numpy().T, rtol=1e-5)


@needs_torch
def test_a_file_of_torch(tmp_path):
    import torch

    opt, p = optim.adam(), jnp.asarray(cases.start("float32"))
    _, state = course(opt, p, opt.init(p), cases.gradients("float32")[:3])
    torch.save(optim.export_state(opt, p, state), tmp_path / "adam.pt")
    assert_equal(optim.import_state(opt, p, tmp_path / "adam.pt"), state)


@needs_torch
def test_tensors_are_hyperparameters():
    """As torch takes them; the number is that of the tensor now."""
    import torch

    rate = torch.tensor(0.1, dtype=torch.float64)
    one = torch.tensor([0.1], dtype=torch.float64)
    decay = torch.nn.Parameter(rate.clone())
    assert optim.adamw(rate, (rate, one), weight_decay=decay) == optim.adamw(0.1, (0.1, 0.1), weight_decay=0.1)
    schedule = adamjax.schedules.cosine(rate, torch.tensor(10))
    assert adamjax.adam(schedule, b2=one) == adamjax.adam(adamjax.schedules.cosine(0.1, 10), b2=0.1)
    assert adamjax.adam(torch.tensor(0.1)).transforms[1].learning_rate == np.float32(0.1)
    rate.mul_(0.5)
    assert float(schedule(0)) == pytest.approx(0.1)
    for x, message in (
        (torch.ones(2), r"^Invalid learning rate: a torch\.Tensor of shape \(2,\); .*jnp\.asarray"),
        (-rate, r"^Invalid learning rate: -0\.05; learning_rate must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            adamjax.adam(x)


@needs_torch
@pytest.mark.parametrize("adamw", [optim.adamw, adamjax.adamw], ids=["interop", "core"])
def test_param_groups(adamw):
    """The usual two groups: weight decay for kernels, none for the rest."""
    import torch

    opt = adamjax.groups({"kernel": {"weight_decay": 0.1}}, default=adamw(1e-2, weight_decay=0.0))
    params = jax.tree.map(lambda x: x + 1, MODEL)
    state = opt.init(params)
    for g in range(1, 4):
        params, state = opt.step(jax.tree.map(lambda x, g=g: x / g, params), state, params)
    exported = optim.export_state(opt, params, state)
    assert [group["params"] for group in exported["param_groups"]] == [[0], [1, 2]]
    assert [group["weight_decay"] for group in exported["param_groups"]] == [0.1, 0.0]
    assert_equal(optim.import_state(opt, params, exported), state)

    ours = dict(zip(["bias", "kernel", "scale"], jax.tree.leaves(params), strict=True))
    tensors = [torch.nn.Parameter(torch.tensor(np.array(ours[name]))) for name in ("kernel", "bias", "scale")]
    other = torch.optim.AdamW([{"params": tensors[:1]}, {"params": tensors[1:]}])
    other.load_state_dict(exported)
    for p in tensors:
        p.grad = p.detach() / 4
    other.step()
    params, _ = opt.step(jax.tree.map(lambda x: x / 4, params), state, params)
    for p, x in zip(tensors, [params["layer_0"]["kernel"], params["layer_0"]["bias"], params["scale"]], strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-6)


@needs_torch
@pytest.mark.parametrize("adamw", [optim.adamw, adamjax.adamw], ids=["interop", "core"])
def test_param_groups_of_overlapping_patterns(adamw):
    """Each combination is a group of torch, with its rate and its decay."""
    patterns = {"layer_0": {"learning_rate": adamjax.scale(0.5)}, "kernel|scale": {"weight_decay": 0.1}}
    opt = adamjax.groups(patterns, default=adamw(1e-2, weight_decay=0.0))
    params = jax.tree.map(lambda x: x + 1, MODEL | {"head": jnp.zeros(2)})
    params, state = opt.step(params, opt.init(params), params)
    exported = optim.export_state(opt, params, state)
    groups = [(g["params"], round(g["lr"], 9), g["weight_decay"]) for g in exported["param_groups"]]
    assert groups == [([0], 5e-3, 0.0), ([1], 1e-2, 0.1), ([2], 1e-2, 0.0), ([3], 5e-3, 0.1)]
    assert_equal(optim.import_state(opt, params, exported), state)


def test_a_safetensors_file(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    opt, (state_dict, p) = make("adamw"), half_way("adamw")
    arrays = {f"state.0.{key}": x for key, x in state_dict["state"][0].items()}
    save_file(arrays, tmp_path / "adamw.safetensors")
    found = optim.import_state(opt, jnp.asarray(p), tmp_path / "adamw.safetensors")
    assert_equal(found, optim.import_state(opt, jnp.asarray(p), state_dict))


def test_parameters_without_gradient_fall_behind():
    opt = optim.adam(1e-2, weight_decay=0.1, decoupled_weight_decay=True)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = opt.init(params)
    for g in (params, params | {"b": None}, params):
        params, state = jax.jit(opt.step)(g, state, params)
    assert (int(state[0]["a"].count), int(state[0]["b"].count)) == (3, 2)
    alone = {"b": jnp.ones(2)}
    expected, other = alone, opt.init(alone)
    for g in (alone, {"b": params["b"]}):
        expected, other = opt.step(g, other, expected)
    np.testing.assert_allclose(params["b"], expected["b"], rtol=1e-3)


def test_schedules_go_on_from_the_imported_step():
    schedule = adamjax.schedules.linear(1.0, 0.0, 100)
    opt = optim.adam(schedule)
    state_dict, p = half_way("adam")
    state = optim.import_state(opt, jnp.asarray(p), state_dict)
    assert int(state[1].count) == int(state[0].count) == cases.HALF - 2


def test_values_like_all_others():
    assert optim.nadam(1e-2) == optim.nadam(1e-2)
    assert hash(optim.radam(1e-2)) == hash(optim.radam(1e-2))
    p = jnp.ones(3)
    population = jax.vmap(lambda lr: optim.nadam(lr))(jnp.array([1e-2, 1e-1]))
    stepped = jax.vmap(lambda opt: opt.step(p, opt.init(p), p)[0])(population)
    np.testing.assert_allclose(stepped[1], optim.nadam(1e-1).step(p, optim.nadam(1e-1).init(p), p)[0], rtol=1e-6)
    traces = []
    step = jax.jit(lambda opt, p: (traces.append(1), opt.step(p, opt.init(p), p))[1])
    for lr in (1e-3, 1e-2):
        step(optim.radam(lr), p)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adam(lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda: optim.adamw(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
        (lambda: optim.nadam(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
        (lambda: optim.radam(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (lambda: optim.adamax(weight_decay=-1), "Invalid weight_decay value: -1"),
        (lambda: optim.nadam(momentum_decay=-0.5), "Invalid momentum_decay value: -0.5"),
        (lambda: optim.adam(betas=cast(Any, 0.9)), "Invalid betas: 0.9, expected a pair of numbers"),
    ],
)
def test_bad_hyperparameters_in_torchs_words(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message


def entry(shape=(4, 3), step=3.0, **more):
    return {
        "step": np.float32(step),
        "exp_avg": np.zeros(shape, np.float32),
        "exp_avg_sq": np.zeros(shape, np.float32),
    } | more


def group(count=1, **more):
    return [{"betas": (0.9, 0.999), "amsgrad": False, "params": list(range(count))} | more]


P = jnp.zeros((4, 3))
BAD = {
    "too many": (optim.adam(), P, {"state": {}, "param_groups": group(2)}, {}, r"has 2 parameters, too many for the 1"),
    "too few": (
        optim.adam(),
        MODEL,
        {"state": {}, "param_groups": group(1)},
        {},
        r"too few for the 3 .*layer_0/bias, layer",
    ),
    "within another": (
        optim.adam(),
        P,
        {"model": {}, "optimizer": {"state": {0: entry()}, "param_groups": group()}},
        {},
        r"^the state_dict has 'model', 'optimizer', and no \"state\": give the part of it",
    ),
    "shape": (
        optim.adam(),
        {"w": P},
        {"state": {0: entry((3, 4))}, "param_groups": group()},
        {},
        r"^exp_avg of w has shape \(3, 4\), expected \(4, 3\); convert= changes layouts, and order=",
    ),
    "other": (
        optim.nadam(),
        P,
        {"state": {0: entry()}, "param_groups": group()},
        {},
        r"is of torch\.optim\.Adam, but opt is like torch\.optim\.NAdam",
    ),
    "no amsgrad": (
        optim.adam(amsgrad=True),
        {"w": P},
        {"state": {0: entry()}, "param_groups": group()},
        {},
        r"^the state of w lacks max_exp_avg_sq: it was made without amsgrad",
    ),
    "amsgrad": (
        optim.adam(),
        {"w": P},
        {"state": {0: entry(max_exp_avg_sq=0)}, "param_groups": group()},
        {},
        r"has max_exp_avg_sq, which opt has no place for: it was made with",
    ),
    "steps": (
        adamjax.adam(),
        {"a": P, "b": P},
        {"state": {0: entry(), 1: entry(step=2.0)}, "param_groups": group(2)},
        {},
        r"^b has done 2 steps and a 3, .*adamjax\.interop\.torch",
    ),
    "order": (
        optim.adam(),
        {"w": P},
        {"state": {}, "param_groups": group()},
        {"order": ["v"]},
        r"^order names 'v', which is no parameter; those are w",
    ),
    "order twice": (
        optim.adam(),
        MODEL,
        {"state": {}, "param_groups": group(3)},
        {"order": ["scale", "scale", "layer_0/bias"]},
        r"names '.*' (0|2) times",
    ),
    "wider": (
        optim.adam(),
        {"w": P},
        {"state": {0: entry(exp_avg=np.zeros((4, 3)))}, "param_groups": group()},
        {},
        r"^exp_avg of w is float64, and opt keeps float32: convert=",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    opt, params, state_dict, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        optim.import_state(opt, params, state_dict, **options)


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (adamjax.nadam(), "another Nesterov momentum"),
        (adamjax.adam(eps_root=1e-8), "torch has no eps_root"),
        (adamjax.radam(), r"torch has nothing like ScaleByRAdam"),
        (adamjax.amsgrad(variant="paper"), "AMSGrad in one form only"),
        (adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam()), "has no counterpart in torch"),
        (adamjax.adamw(mask={"w": True}), "torch has nothing like AddDecayedWeights"),
        (adamjax.adam(weight_decay=0.1, mask={"w": True}), "its weight decay has a mask"),
        (adamjax.chain(adamjax.scale_by_adam(), adamjax.scale_by_adam()), "it is another chain than moments"),
        (adamjax.scale_by_adam(), "it is not one of adamjax.interop.torch"),
        (adamjax.kahan(adamjax.scale_by_adam()), "it is not one of adamjax.interop.torch"),
    ],
)
def test_optimizers_that_torch_has_not(opt, message):
    with pytest.raises(TypeError, match=message):
        optim.import_state(opt, P, {"state": {}, "param_groups": group()})


def test_other_bad_input():
    with pytest.raises(TypeError, match=r"^state_dict is a list, expected what optimizer\.state_dict\(\) returns"):
        optim.import_state(optim.adam(), P, [])
    int8 = adamjax.quantized("int8", min_size=1)
    with pytest.raises(TypeError, match=r"^exp_avg of w cannot be imported into Quantized.*moments in float32"):
        optim.import_state(
            adamjax.adam(mu_dtype=int8),
            {"w": jnp.zeros((4, 8))},
            {"state": {0: entry((4, 8))}, "param_groups": group()},
        )
    z = {"z": jnp.zeros((4, 3), jnp.complex64)}
    with pytest.raises(TypeError, match=r"^z is complex, and torch keeps a second moment for each part"):
        optim.import_state(adamjax.adam(), z, {"state": {0: entry()}, "param_groups": group()})
    opt = optim.adam()
    with pytest.raises(ValueError, match=r"^the gradients lack state\['b'\]"):
        opt.update({"a": P}, opt.init({"a": P, "b": P}))


# Errors of torch that are none here, by their descriptions in its database.
ACCEPTED = {
    "invalid param type": "an array is a tree",
    "a param group cannot have duplicate parameters": "each place in a tree is a parameter",
    "duplicate parameters should not occur across param groups either": "each place in a tree is a parameter",
    "betas must be either both floats or both Tensors": "a tensor is read as one number",
    "lr as Tensor doesn't work with foreach & not capturable": "foreach is ignored",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "foreach is ignored",
}


@pytest.fixture(scope="module")
def database():
    """The OptimizerInfo, by our names, of torch's optimizers that are here."""
    for name in ("torch", "expecttest"):
        pytest.importorskip(name)
    from torch.testing._internal.common_optimizers import optim_db

    names = {name: function for function, name in cases.CLASSES.items()}
    found = {names[info.optim_cls.__name__]: info for info in optim_db if info.optim_cls.__name__ in names}
    assert len(found) == 5
    return found


@pytest.mark.slow
def test_every_configuration_in_the_database_of_torch(database):
    import torch

    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(12, 2, 3)).astype(np.float32)

    @jax.jit
    def run(opt, p):
        return jax.lax.scan(lambda carry, g: (opt.step(g, carry[1], carry[0]), None), (p, opt.init(p)), grads)[0][0]

    count = 0
    for name, info in database.items():
        # Those for accelerators have tensors for numbers, and `capturable`, which torch refuses on a CPU.
        inputs = [each for device in ("cpu", "cuda", "mps") for each in info.optim_inputs_func(device=device)]
        for given in {str(each): each for each in inputs}.values():
            tensor = torch.nn.Parameter(torch.tensor(start))
            other = info.optim_cls([tensor], **given.kwargs | {"capturable": False})
            for g in grads:
                tensor.grad = torch.tensor(g)
                other.step()
            found = run(getattr(optim, name)(**given.kwargs), jnp.asarray(start))
            assert_same_course(np.asarray(found), tensor.detach().numpy(), TORCH_COURSE["float32"])
            count += 1
    assert count > 50


def test_every_error_in_the_database_of_torch(database):
    import torch

    for name, info in database.items():
        make = getattr(optim, name)
        for expected in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            given = expected.optimizer_error_input
            if given.params is None:
                if given.desc in ACCEPTED:
                    make(**given.kwargs)
                    continue
                message = "torch.Tensor of shape" if "1-element" in given.desc else expected.error_regex
                with pytest.raises(ValueError, match=message):
                    make(**given.kwargs)
                continue
            with pytest.raises(TypeError, match=r"is 'weight'|convert it, as in jnp\.asarray"):
                make().init(given.params)
            arrays = jax.tree.map(lambda x: jnp.asarray(x.detach()) if isinstance(x, torch.Tensor) else x, given.params)
            if given.desc in ACCEPTED:
                make().init(arrays)
                continue
            with pytest.raises(TypeError, match=r"'weight' \(str\)|\['lr'\]"):
                make().init(arrays)
