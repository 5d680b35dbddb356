"""States from torch and its kin: whose they are, which parameter is which, and numbers that no run leaves."""

import functools
import json
import os
import pickle
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal
from tolerances import TORCH_COURSE

import adamjax
from adamjax.interop import torch as optim

torch = pytest.importorskip("torch", reason="torch is not installed")

ONE = {"w": jnp.zeros(2)}
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
LAYERS = ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")
LAYER = {"weight": jnp.zeros(2), "bias": jnp.zeros(2)}


def entry(exp_avg=(0.1, 0.2), exp_avg_sq=(0.1, 0.2), step=3.0, **more):
    arrays = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    arrays = {k: np.asarray(x, np.float32) if isinstance(x, tuple) else x for k, x in arrays.items()}
    return {"step": np.float32(step) if isinstance(step, float) else step} | arrays | more


def of_one(group=ADAM, **contents):
    return {"state": {0: entry(**contents)}, "param_groups": [group | {"params": [0]}]}


def numbered(names, form):
    """A state whose first moments are 1, 2, 3 and so on, in the order of `names`."""
    entries = [entry((i, i), (1e2, 1e2)) for i in range(1, len(names) + 1)]
    if form == "param_names":
        group = ADAM | {"params": list(range(len(names))), "param_names": list(names)}
        return {"state": dict(enumerate(entries)), "param_groups": [group]}
    state = dict(zip(names, entries, strict=True))
    if form == "keys":
        return {"state": state, "param_groups": [ADAM | {"params": list(names)}]}
    flat = {f"state.{name}.{key}": x for name, e in reversed(state.items()) for key, x in e.items()}
    if form == "flat":
        flat |= {f"param_groups.{name}.{key}": x for name in names for key, x in ADAM.items()}
    return flat


def first_moments(state):
    rows = jax.tree.leaves_with_path(state[0], is_leaf=lambda x: hasattr(x, "mu"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): int(x.mu[0]) for path, x in rows}


@pytest.mark.parametrize("form", ["param_names", "keys", "flat", "flat state"])
@pytest.mark.parametrize(
    ("params", "weight", "bias"),
    [
        ({"layers": [LAYER, LAYER]}, "layers/{}/weight", "layers/{}/bias"),
        ({"layers": {"0": LAYER, "1": LAYER}}, "layers/{}/weight", "layers/{}/bias"),
        ({"layers_0": LAYER, "layers_1": LAYER}, "layers_{}/weight", "layers_{}/bias"),
        (dict.fromkeys(LAYERS, jnp.zeros(2)), "layers.{}.weight", "layers.{}.bias"),
        (
            {"params": {f"layers_{i}": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)} for i in (1, 0)}},
            "params/layers_{}/kernel",
            "params/layers_{}/bias",
        ),
        ([LAYER, LAYER], "{}/weight", "{}/bias"),
        (
            {"layers": [{"scale": {"value": jnp.zeros(2)}, "b": jnp.zeros(2)}] * 2},
            "layers/{}/scale/value",
            "layers/{}/b",
        ),
    ],
    ids=["list", "dict", "layers_0", "flat", "flax", "part", "nnx"],
)
def test_names_decide(form, params, weight, bias):
    expected = {weight.format(0): 1, bias.format(0): 2, weight.format(1): 3, bias.format(1): 4}
    for prefix in ("", "module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        names = [prefix + name for name in LAYERS]
        assert first_moments(optim.import_state(optim.adam(), params, numbered(names, form))) == expected


def test_layer_norm_of_named_parameters():
    layer = torch.nn.LayerNorm(2)
    other = torch.optim.AdamW(layer.named_parameters(), weight_decay=0.1)
    layer.weight.grad, layer.bias.grad = torch.full((2,), 1.0), torch.full((2,), 2.0)
    other.step()
    opt = optim.adamw(weight_decay=0.1)
    for params in ({"weight": jnp.ones(2), "bias": jnp.ones(2)}, {"scale": jnp.ones(2), "bias": jnp.ones(2)}):
        state = optim.import_state(opt, params, other.state_dict())[0]
        weight = state.get("weight", state.get("scale"))
        np.testing.assert_allclose([weight.mu[0], state["bias"].mu[0]], [0.1, 0.2], rtol=1e-6)


def test_states_of_torch_distributed():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    other = torch.optim.AdamW(net.named_parameters())
    net(torch.randn(3, 2)).square().sum().backward()
    other.step()
    params = [{name: jnp.asarray(p.detach().numpy()) for name, p in layer.named_parameters()} for layer in net]
    order = ["0/weight", "0/bias", "1/weight", "1/bias"]
    expected = optim.import_state(optim.adamw(), params, other.state_dict(), order=order)
    for flat in (False, True):
        # With param_names of their own, which a wrapper has changed.
        other.param_groups[0]["param_names"] = [f"module.{name}" for name, _ in net.named_parameters()]
        found = get_optimizer_state_dict(net, other, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        assert_equal(optim.import_state(optim.adamw(), params, found), expected)


@pytest.mark.parametrize("form", ["param_names", "keys"])
def test_position_decides_only_where_there_are_no_names_to_go_by(form):
    state_dict = numbered(LAYERS, form)
    found = optim.import_state(optim.adam(), [jnp.zeros(2)] * 4, state_dict)
    assert first_moments(found) == {"0": 1, "1": 2, "2": 3, "3": 4}
    assert first_moments(optim.import_state(optim.adam(), ONE, numbered(["fc.weight"], form))) == {"w": 1}
    with pytest.raises(ValueError, match=r"named layers\.1\.weight, layers\.1\.bias, and params has b/bias, b/weight"):
        optim.import_state(optim.adam(), {"layers_0": LAYER, "b": LAYER}, state_dict)
    order = ["layers_0/weight", "layers_0/bias", "b/weight", "b/bias"]
    found = optim.import_state(optim.adam(), {"layers_0": LAYER, "b": LAYER}, state_dict, order=order)
    assert first_moments(found) == dict(zip(order, (1, 2, 3, 4), strict=True))
    order = ["layers/1/weight", "layers/0/bias", "layers/0/weight", "layers/1/bias"]
    with pytest.raises(
        ValueError, match=r"^order says .* 0 .*'layers/1/weight', but its name there is 'layers.0.weight'"
    ):
        optim.import_state(optim.adam(), {"layers": [LAYER, LAYER]}, state_dict, order=order)


TWO = numbered(["a", "b"], "param_names")
GROUP = TWO["param_groups"][0]


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (TWO | {"param_groups": [GROUP | {"param_names": ["a", "a"]}]}, r"names 'a' 2 times"),
        (
            TWO | {"param_groups": [GROUP | {"param_names": ["a"]}]},
            r"^param_groups\[0\] .* 2 params, but 1 param_names",
        ),
        (TWO | {"param_groups": [GROUP | {"params": [1, 1]}]}, r"lists parameter 1 2 times"),
        (TWO | {"state": {0: entry(), 7: entry()}}, r"has a state of 7, but its param_groups list only 0, 1"),
        (TWO | {"state": {0: entry(), "0": entry()}}, r"has the state of parameter 0 2 times"),
        (
            TWO | {"param_groups": [{"params": [0], "param_names": ["a"]}, {"params": [1]}]},
            r"^some param_groups of the state_dict have param_names and others have none",
        ),
        (
            numbered(["a", "c"], "flat state"),
            r"^the state_dict has parameters named c, and params has b .* rename the keys",
        ),
        (numbered(["a"], "flat state"), r"too few for the 2 of params: a, b; it has a$"),
        (numbered(["_flat_param"], "keys"), r"Its arrays are flat, .*full_state_dict=True"),
        ({"a.weight": np.ones(2)}, r"has 'a.weight', and no moments: it looks like the parameters of a model"),
        ({"optimizer": TWO}, r"has 'optimizer', and no \"state\": .* here \['optimizer'\]$"),
        (
            {"epoch": 1, "optimizer_states": [TWO]},
            r"has 'epoch', 'optimizer_states', .* here \['optimizer_states'\]\[0\]$",
        ),
        ({"optimizer_state_dict": {"base_optimizer_state": {}}}, r"DeepSpeed's ZeRO.*ds_to_universal.py"),
    ],
)
def test_contradictions_in_a_state_dict(state_dict, message):
    with pytest.raises(ValueError, match=message) as caught:
        optim.import_state(optim.adam(), {"a": jnp.zeros(2), "b": jnp.zeros(2)}, state_dict)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"exp_avg": (1e-4, 0.0), "exp_avg_sq": (0.0, 0.0)}, r"^exp_avg_sq of w is 0 at \[0\] where .*half precision"),
        ({"exp_avg": (1.0, 1.0), "exp_avg_sq": (1.0, 1e-12)}, r"^exp_avg_sq of w is 1e-12 at \[1\] where exp_avg is 1"),
        ({"exp_avg_sq": (-0.5, -0.5)}, r"^exp_avg_sq of w is -0\.5 at \[0\] and at 1 more, .*mixed up"),
        ({"exp_avg": (0.0, np.nan)}, r"^exp_avg of w is nan at \[1\]: the run had diverged"),
        ({"exp_avg_sq": (np.inf, 0.0)}, r"^exp_avg_sq of w is inf at \[0\]"),
        ({"exp_avg": np.array([True, False])}, r"^exp_avg of w is bool, and moments are floats"),
        ({"exp_avg_sq": np.array([1, 2])}, r"^exp_avg_sq of w is int64, and moments are floats"),
        ({"exp_avg": torch.ones(2).to_sparse()}, r"^exp_avg of w is a Tensor, and no plain array"),
        ({"exp_avg": None}, r"^exp_avg of w is None"),
        ({"step": -3.0}, r"^step of w is -3\.0, expected a whole number of steps"),
        ({"step": 7.5}, r"^step of w is 7\.5"),
        ({"step": "3"}, r"^step of w is '3'"),
        ({"step": None}, r"^step of w is None"),
        ({"step": np.nan}, r"^step of w is nan"),
        ({"step": 3e9}, r"^step of w is 3000000000\.0, .*to 2147483647"),
        ({"step": np.ones(1, np.float32)}, r"^step of w is float32 of shape \(1,\)"),
        ({"step": True}, r"^step of w is bool"),
        ({"step": 0.0}, r"^step of w is 0, but its moments are not"),
    ],
)
@pytest.mark.parametrize("opt", [optim.adamw(weight_decay=0.0), adamjax.adam()], ids=["interop", "core"])
def test_numbers_that_no_run_leaves(opt, contents, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        optim.import_state(opt, ONE, of_one(**contents))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("contents", "betas"),
    [
        ({"exp_avg": (1e-18, 0.0), "exp_avg_sq": (0.0, 0.0)}, (0.9, 0.999)),  # the squares underflow
        ({"exp_avg": (1e-4, 0.0), "exp_avg_sq": (0.0, 0.0)}, (0.99, 0.9)),  # the second moment decays before the first
        ({"exp_avg_sq": np.array([0.1, 0.2], np.float16)}, (0.9, 0.999)),
        ({"step": 5}, (0.9, 0.999)),
        ({"step": torch.tensor(5)}, (0.9, 0.999)),
        ({"step": 2147483647}, (0.9, 0.999)),
    ],
)
def test_numbers_that_a_run_may_leave(contents, betas):
    state = optim.import_state(optim.adam(betas=betas), ONE, of_one(ADAM | {"betas": betas}, **contents))
    assert int(state[0]["w"].count) == int(contents.get("step", 3))


@pytest.mark.parametrize("make", [optim.adam, optim.nadam, optim.radam, optim.adamax])
def test_real_runs_are_never_refused(make):
    """Gradients over eighty decades, zero for long, and large once: the bounds of the check hold."""
    rng = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.zeros(64))
    other = getattr(
        torch.optim, {"adam": "Adam", "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax"}[make.__name__]
    )([p])
    opt, size = make(), 10.0 ** rng.uniform(-60, 18, 64)
    for t in range(300):
        p.grad = torch.tensor((size if t % 100 == 0 else 0.0) * rng.normal(size=64), dtype=torch.float32)
        other.step()
        if t % 50 in (0, 49):
            optim.import_state(opt, jnp.zeros(64), other.state_dict())


def test_moments_of_nadam_by_old_versions():
    p = torch.nn.Parameter(torch.zeros(2))
    other = torch.optim.NAdam([p])
    p.grad = torch.ones(2)
    other.step()
    state_dict = other.state_dict()
    expected = optim.import_state(optim.nadam(), ONE, state_dict)
    state_dict["state"][0]["mu_product"] = float(state_dict["state"][0]["mu_product"])
    assert_equal(optim.import_state(optim.nadam(), ONE, state_dict), expected)
    state_dict["state"][0]["mu_product"] = 1.0
    with pytest.raises(
        ValueError, match=r"^mu_product of w is 1\.0, expected a product of rates below 1 after 1 steps"
    ):
        optim.import_state(optim.nadam(), ONE, state_dict)


NO_DECAY = {name: x for name, x in ADAM.items() if name not in ("weight_decay", "amsgrad")}
FUSED = NO_DECAY | {"weight_decay": 0.0, "bias_correction": True}
TRANSFORMERS = NO_DECAY | {"weight_decay": 0.0, "correct_bias": True}
CODES = {"step": 3, "state1": np.zeros(2, np.uint8), "state2": np.zeros(2, np.uint8), "absmax1": np.ones(1)}


@pytest.mark.parametrize(
    ("group", "state", "name"),
    [
        (NO_DECAY, entry(), r"torch\.optim\.SparseAdam"),
        (TRANSFORMERS | {"correct_bias": False}, entry(), "transformers' AdamW with correct_bias=False"),
        (FUSED | {"bias_correction": False}, entry(), "FusedAdam with bias_correction=False"),
        (FUSED | {"grad_averaging": True}, entry(), "LAMB"),
        (NO_DECAY | {"weight_decay": 0.0}, CODES, "bitsandbytes.*dequantize_blockwise"),
        (NO_DECAY | {"weight_decay": 0.0}, {"exp_avg": np.ones(2)}, "an optimizer with the state exp_avg"),
        ({"lr": 1e-3, "dampening": 0}, {}, r"torch\.optim\.SGD"),
        ({"lr": 1e-3, "rho": 0.9}, {"square_avg": np.ones(2), "acc_delta": np.ones(2)}, r"torch\.optim\.Adadelta"),
        (ADAM | {"rho": 0.05, "adaptive": False}, entry(), "SAM"),
        (NO_DECAY | {"weight_decay": 0.0, "rho": 0.04}, {"exp_avg": np.ones(2), "hessian": np.ones(2)}, "Sophia"),
        (NO_DECAY | {"weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1}, entry(), "AdamP"),
        (NO_DECAY | {"weight_decay": 0.0, "decouple": True}, entry(), "an optimizer with the hyperparameter decouple"),
        (ADAM, {"step": 3, "exp_avg": np.ones(2), "exp_inf": np.ones(2)}, r"torch\.optim\.Adamax"),
    ],
)
def test_states_of_other_optimizers_are_named(group, state, name):
    state_dict = {"state": {0: state}, "param_groups": [group | {"params": [0]}]}
    with pytest.raises(ValueError, match=name):
        optim.import_state(optim.adam(), ONE, state_dict)


@pytest.mark.parametrize("group", [TRANSFORMERS, FUSED, ADAM], ids=["transformers", "FusedAdam", "torch"])
def test_a_state_of_adam_is_none_of_radam(group):
    with pytest.raises(
        ValueError, match=r"of (transformers' AdamW|FusedAdam|torch.optim.Adam), .*like torch.optim.RAdam"
    ):
        optim.import_state(optim.radam(), ONE, of_one(group))


def test_radam_is_known_without_names_of_its_own():
    """Before torch 2.1, it had no hyperparameter that others lack; schedulers add theirs."""
    group = NO_DECAY | {"weight_decay": 0.0}
    for more in ({}, {"initial_lr": 1e-3}, {"decoupled_weight_decay": False, "mine": 1}):
        assert int(optim.import_state(optim.radam(), ONE, of_one(group | more))[0]["w"].count) == 3
    with pytest.raises(ValueError, match=r"with the hyperparameter delta, but opt is like torch\.optim\.RAdam"):
        optim.import_state(optim.radam(), ONE, of_one(group | {"delta": 0.1}))


def test_a_maximum_is_not_below_what_it_is_the_maximum_of():
    amsgrad = optim.adam(amsgrad=True)
    kept = of_one(ADAM | {"amsgrad": True}, max_exp_avg_sq=entry()["exp_avg_sq"])
    assert int(optim.import_state(amsgrad, ONE, kept)[0]["w"].count) == 3
    lost = of_one(ADAM | {"amsgrad": True}, max_exp_avg_sq=np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"^max_exp_avg_sq of w is 0 at \[0\] .* where exp_avg_sq is larger"):
        optim.import_state(amsgrad, ONE, lost)


def test_fused_adam_counts_in_the_group():
    state = {name: x for name, x in entry().items() if name != "step"}
    for step in (7, torch.tensor([7], dtype=torch.int32)):
        group = FUSED | {"step": step, "params": [0]}
        found = optim.import_state(optim.adam(), ONE, {"state": {0: state}, "param_groups": [group]})
        assert int(found[0]["w"].count) == 7
    group, state = FUSED | {"step": 7, "params": [0]}, state | {"master_param": np.ones(2)}
    with pytest.warns(UserWarning, match="master_param, the parameters in float32"):
        optim.import_state(optim.adam(), ONE, {"state": {0: state}, "param_groups": [group]})


def test_transformers_adamw_is_adam_but_for_the_place_of_eps():
    with pytest.warns(UserWarning, match="eps added to the uncorrected root") as caught:
        state = optim.import_state(optim.adam(), ONE, of_one(TRANSFORMERS, step=3))
    assert len(caught) == 1
    assert int(state[0]["w"].count) == 3


def test_other_hyperparameters_are_said_in_one_warning():
    p = torch.nn.Parameter(torch.zeros(2))
    other = torch.optim.AdamW([p], maximize=True, betas=(0.8, 0.99), lr=torch.tensor(1e-2))
    p.grad = torch.ones(2)
    other.step()
    with pytest.warns(UserWarning, match="was made with") as caught:
        optim.import_state(optim.adam(), ONE, other.state_dict())
    (said,) = [str(x.message) for x in caught]
    assert said == (
        "the state_dict was made with lr=0.01 where opt has 0.001; betas=(0.8, 0.99) where opt has (0.9, 0.999); "
        "weight_decay=0.01 where opt has 0; maximize=True where opt has False; decoupled_weight_decay=True where opt "
        "has False. The run goes on with those of opt"
    )
    assert caught[0].filename == __file__
    same = optim.adamw(np.float32(1e-2), (0.8, jnp.float32(0.99)), maximize=True)
    optim.import_state(same, ONE, other.state_dict())
    # The learning rate of a schedule, on either side, is none to compare.
    scheduled = optim.adamw(adamjax.schedules.cosine(1.0, 10), (0.8, 0.99), maximize=True)
    optim.import_state(scheduled, ONE, other.state_dict())


def test_hyperparameters_are_compared_by_group():
    groups = [ADAM | {"weight_decay": 0.1, "params": [0]}, ADAM | {"params": [1]}]
    state_dict = TWO | {"param_groups": groups}
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    with pytest.warns(UserWarning, match=r"with weight_decay=0\.1 where opt has 0 \(a\)\. The run"):
        optim.import_state(optim.adam(), params, state_dict)
    fitting = adamjax.groups({"a": {"weight_decay": 0.1}}, default=optim.adam(weight_decay=1e-9))
    with pytest.warns(UserWarning, match=r"with weight_decay=0 where opt has 1e-09 \(b\)\. The run"):
        optim.import_state(fitting, params, state_dict)


def saved(tmp_path, contents, **options):
    path = tmp_path / "adam.pt"
    torch.save(contents, path, **options)
    return path


class Unsafe:
    def __reduce__(self):
        return (os.mkdir, ("made-by-a-pickle",))


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_files_that_are_none_of_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = functools.partial(optim.import_state, optim.adam(), {"w": jnp.zeros(256)})
    wide = {
        "state": {0: entry(np.ones(256, np.float32), np.ones(256, np.float32))},
        "param_groups": [ADAM | {"params": [0]}],
    }
    tensors = jax.tree.map(torch.as_tensor, wide["state"][0])
    path = saved(tmp_path, wide | {"state": {0: tensors}})
    expected = read(wide)
    assert_equal(read(path), expected)
    assert_equal(
        read(str(saved(tmp_path, wide | {"state": {0: tensors}}, _use_new_zipfile_serialization=False))), expected
    )
    whole = saved(tmp_path, wide | {"state": {0: tensors}}).read_bytes()
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("adam/data/0").header_offset
    text = json.dumps({"state": {}}).encode()
    for data in (b"", text, b"not a state\n" * 9, whole[: len(whole) // 2], flipped(whole, begin + 400)):
        path.write_bytes(data)
        with pytest.raises(
            adamjax.DamagedFileError, match=r"adam\.pt is damaged, or not a file of torch\.save or safetensors: give"
        ):
            read(path)
    saved(tmp_path, {"state": Unsafe()})
    with pytest.raises(ValueError, match=r"adam\.pt would run code of its own .*mkdir.*torch\.load"):
        read(path)
    path.write_bytes(pickle.dumps(Unsafe(), protocol=2))
    with pytest.raises(ValueError, match=r"adam\.pt would run code"):
        read(path)
    assert not os.path.exists("made-by-a-pickle")
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"is a folder: .*dcp_to_torch"):
        read(tmp_path)


def test_safetensors_files(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    params = {"l1": {"weight": jnp.zeros(2)}, "l2": {"weight": jnp.zeros(2)}}
    flat = numbered(["l1.weight", "l2.weight"], "flat state")
    path = tmp_path / "adam.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        save_file({key: torch.as_tensor(x).to(dtype) for key, x in flat.items()}, path)
        assert first_moments(optim.import_state(optim.adam(), params, path)) == {"l1/weight": 1, "l2/weight": 2}
    other = path.rename(tmp_path / "adam.bin")
    assert first_moments(optim.import_state(optim.adam(), params, other)) == {"l1/weight": 1, "l2/weight": 2}
    for data in (b"", b"text" * 9, other.read_bytes()[:-1]):
        path.write_bytes(data)
        with pytest.raises(adamjax.DamagedFileError, match=r"^\S+ is damaged, or not a safetensors file"):
            optim.import_state(optim.adam(), params, path)


def test_square_kernels_of_flax():
    names, square = ["fc.weight", "fc.bias"], np.arange(4, dtype=np.float32).reshape(2, 2)
    state_dict = numbered(names, "param_names")
    state_dict["state"][0] |= {"exp_avg": square, "exp_avg_sq": square + 1}
    params = {"fc": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    with pytest.warns(
        UserWarning, match=r"^fc/kernel is square, and torch's weights are .* transposed: .* give convert="
    ):
        optim.import_state(optim.adam(), params, state_dict)
    transposed = optim.import_state(
        optim.adam(), params, state_dict, convert=lambda path, x: x.T if path.endswith("kernel") else x
    )
    np.testing.assert_array_equal(transposed[0]["fc"]["kernel"].mu, square.T)


def test_messages_are_short():
    """Even about large models with long names, and many groups that differ."""
    names = [f"model.decoder.layers.{i}.self_attention.query_projection.weight" for i in range(60)]
    params, state_dict = dict.fromkeys(names, jnp.zeros(2)), numbered(names, "param_names")
    groups = [
        ADAM | {"lr": 1.0 + i, "weight_decay": 0.1 + i, "params": [i], "param_names": [name]}
        for i, name in enumerate(names)
    ]
    with pytest.warns(UserWarning, match="and 116 more") as caught:
        optim.import_state(optim.adam(), params, state_dict | {"param_groups": groups})
    assert len(str(caught[0].message)) < 600
    for other in (names[1:], [name + "s" for name in names]):
        with pytest.raises(ValueError, match="the state_dict has") as error:
            optim.import_state(optim.adam(), params, numbered(other, "keys"))
        assert len(str(error.value)) < 600


def test_an_imported_state_is_a_copy():
    big = torch.zeros(1 << 16)
    state_dict = {
        "state": {0: {"step": 1, "exp_avg": big, "exp_avg_sq": big}},
        "param_groups": [ADAM | {"params": [0]}],
    }
    state = optim.import_state(optim.adam(), jnp.zeros(1 << 16), state_dict)
    big.fill_(7.0)
    assert not np.any(state[0].mu)


INT8, INT4 = (adamjax.quantized(bits, min_size=1) for bits in ("int8", "int4"))
EXPORTS = {
    "bfloat16": adamjax.adamw(1e-2, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16),
    "float16": adamjax.adamw(1e-2, mu_dtype=jnp.float16),
    "int8": adamjax.adamw(1e-2, mu_dtype=INT8, nu_dtype=INT8),
    "int4": adamjax.adamw(1e-2, mu_dtype=INT4, nu_dtype=INT4),
    "packed": adamjax.packed(adamjax.adamw(1e-2)),
    "packed bfloat16": adamjax.packed(adamjax.adamw(1e-2, mu_dtype=jnp.bfloat16)),
    "skip_nonfinite": adamjax.skip_nonfinite(optim.adamw(1e-2)),
    "skip_spikes": adamjax.skip_spikes(optim.adamw(1e-2)),
    "dynamic_loss_scale": adamjax.dynamic_loss_scale(adamjax.adamw(1e-2), initial=1.0),
    "offload": adamjax.sharding.offload(adamjax.adamw(1e-2)),
    "kahan": adamjax.kahan(adamjax.adamw(1e-2)),
    "master_weights": adamjax.master_weights(adamjax.packed(adamjax.adamw(1e-2))),
    "groups": adamjax.skip_nonfinite(adamjax.groups({"b": {"weight_decay": 0.0}}, default=adamjax.adamw(1e-2))),
}


@pytest.mark.numbers
@pytest.mark.parametrize("name", EXPORTS)
def test_every_format_and_wrapper_goes_on_in_torch(name):
    opt, rng = EXPORTS[name], np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 64)), jnp.float32), "b": jnp.ones(64)}
    state, step = opt.init(params), jax.jit(opt.step)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(4)]
    for g in grads[:3]:
        params, state = step(g, state, params)
    order = ["b", "a"] if name == "groups" else ["a", "b"]  # group after group
    exported = optim.export_state(opt, params, state, order=order)
    if not name.startswith("int"):
        back = optim.import_state(opt, params, exported, order=order)
        assert jax.tree.structure(back) == jax.tree.structure(state)
        assert_equal(optim.export_state(opt, params, back, order=order), exported)
    tensors = [torch.nn.Parameter(torch.tensor(np.array(params[path]))) for path in order]
    groups = [{"params": [tensors[i] for i in group["params"]]} for group in exported["param_groups"]]
    other = torch.optim.AdamW(groups, lr=5.0)
    other.load_state_dict(exported)
    for p, path in zip(tensors, order, strict=True):
        p.grad = torch.tensor(np.array(grads[3][path]))
    other.step()
    params, _ = step(grads[3], state, params)
    # A moment in half precision is rounded before its step.
    tolerance = 2**-6 * 1e-2 if "float16" in name else TORCH_COURSE["float32"]
    for p, path in zip(tensors, order, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), params[path], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax"])
def test_a_complex_scalar_goes_on_in_torch(name):
    opt, z, g = getattr(optim, name.lower())(), jnp.asarray(1 + 2j, jnp.complex64), jnp.asarray(0.5 - 1j, jnp.complex64)
    z, state = opt.step(g, opt.init(z), z)
    exported = optim.export_state(opt, z, state)
    assert_equal(optim.import_state(opt, z, exported), state)
    p = torch.nn.Parameter(torch.tensor(np.array(z)))
    other = getattr(torch.optim, name)([p])
    other.load_state_dict(exported)
    p.grad = torch.tensor(np.array(g))
    other.step()
    np.testing.assert_allclose(p.detach().numpy(), opt.step(g, state, z)[0], rtol=TORCH_COURSE["float32"])


@pytest.mark.parametrize("make", [optim.adamw, optim.nadam, optim.radam, optim.adamax])
def test_hyperparameters_of_one_element(make):
    """Torch takes arrays of shape (1,), too."""
    p, g = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.1])
    one = make(jnp.array([1e-2]), (np.array([0.8]), jnp.array([0.99])), np.array([1e-6]), jnp.array([0.1]))
    number = make(1e-2, (0.8, 0.99), 1e-6, 0.1)
    (found, state), (expected, _) = one.step(g, one.init(p), p), number.step(g, number.init(p), p)
    assert found.shape == p.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(optim.export_state(one, p, state)["param_groups"][0]["betas"], (0.8, 0.99), rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(2,\), a step takes one number"):
        make(jnp.ones(2)).step(g, make().init(p), p)


def test_master_weights_need_the_parameters():
    params, opt = jax.ShapeDtypeStruct((2,), jnp.bfloat16), adamjax.master_weights(optim.adam())
    with pytest.raises(ValueError, match=r"^params are abstract, and master_weights keeps a copy"):
        optim.import_state(opt, {"w": params}, of_one())
    weights = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    state = optim.import_state(opt, weights, of_one())
    np.testing.assert_array_equal(state.kept["w"], [1, 2])
    assert int(state.inner[0]["w"].count) == 3


def test_moments_that_do_not_fit_into_float16():
    with pytest.raises(ValueError, match=r"^exp_avg of w has numbers that float16 cannot hold: import into .* float32"):
        optim.import_state(adamjax.adam(mu_dtype=jnp.float16), ONE, of_one(exp_avg=(1e6, 0.0), exp_avg_sq=(1e12, 0.0)))


def test_nothing_is_said_where_nothing_differs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.import_state(optim.adam(), ONE, of_one())
        for part in ({"betas": None, "amsgrad": False}, {"lr": 1e-3}, {"betas": (0.9, 0.999)}):
            optim.import_state(optim.adam(), ONE, of_one(part))
