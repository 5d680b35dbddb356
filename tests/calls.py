"""Every public callable, with arguments that are right: the grid of wrong calls is made of them."""

import ast
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bowl import Bowl
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import adamjax
from adamjax import interop, schedules, tuning

MODULES = ["", ".schedules", ".storage", ".rounding", ".interop.torch", ".interop.optax"]
MODULES += [
    ".kernels",
    ".safety",
    ".scaling",
    ".diagnostics",
    ".checkpoint",
    ".sharding",
    ".tuning",
    ".training",
    ".problems",
]


def public():
    """Functions and classes by name: what a module defines, or imports `as` the name it has, without underscore."""
    found = {}
    for suffix in MODULES:
        module = importlib.import_module("adamjax" + suffix)
        for node in ast.parse(Path(module.__file__).read_text()).body:
            names = [getattr(node, "name", "")]
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if alias.name == alias.asname]
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                x = getattr(module, name, None)
                if not name.startswith("_") and getattr(x, "__module__", "").startswith("adamjax"):
                    found.setdefault(x, f"{suffix}.{name}".removeprefix("."))
    return {name: x for x, name in found.items() if callable(x)}


class Call(NamedTuple):
    """A call that is right: the arguments that have no default, and which of all may be None."""

    arguments: dict[str, Any] = {}  # noqa: RUF012
    optional: tuple[str, ...] = ()
    cheap: bool = True  # or only wrong calls of it are made


OPT = adamjax.adamw(schedules.constant(0.1))
PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
STATE = OPT.init(PARAMS)
AVERAGING = adamjax.average_params(OPT)
MESH = AbstractMesh((1,), ("data",))
PLACED = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(MESH, PartitionSpec())), PARAMS
)
PLAN = {"opt": OPT, "params": PLACED}
TORCH = interop.torch.adamw()
TORCH_STATE = {"state": {}, "param_groups": [{"params": [0, 1], "betas": (0.9, 0.999), "amsgrad": False}]}
STATS = jax.jit(adamjax.diagnostics.measure)(PARAMS, PARAMS, STATE, PARAMS)
BOWL = Bowl()
SPACE = tuning.Space(learning_rate=tuning.Log(1e-3, 1e-1))
RATES = np.geomspace(1e-4, 1.0, 50)
RANGE = tuning.LrRange(RATES, 1 + np.log10(RATES / 0.1) ** 2)


def growing(width, seed):
    return PARAMS, lambda params: (jnp.sum(params["a"]), {"a": params["a"]}), OPT


DTYPES = ("mu_dtype", "nu_dtype")
KINDS_OF_TORCH = ("foreach", "fused", "capturable", "differentiable")  # `fused` may be None, others are not looked at
CALLS = {
    "adam": Call(optional=("amsgrad", "mask", "axis_name", *DTYPES)),
    "adamax": Call(optional=DTYPES),
    "adamaxw": Call(optional=("mask", *DTYPES)),
    "adamw": Call(optional=("amsgrad", "mask", "axis_name", *DTYPES)),
    "amsgrad": Call(optional=("mask", *DTYPES)),
    "nadam": Call(optional=DTYPES),
    "nadamw": Call(optional=("mask", "axis_name", *DTYPES)),
    "radam": Call(optional=DTYPES),
    "schedule_free_adamw": Call(optional=("warmup_steps", "nu_dtype", "mask")),
    "ademamix": Call(optional=("mask", "mu_slow_dtype", *DTYPES)),
    "simplified_ademamix": Call(optional=("mask", *DTYPES)),
    "adopt": Call(optional=("mask", *DTYPES)),
    "adam_atan2": Call(optional=("mask", *DTYPES)),
    "stable_adamw": Call(optional=("mask", "axis_name", *DTYPES)),
    "scale_by_adam": Call(optional=("amsgrad", "axis_name", *DTYPES)),
    "scale_by_adam_atan2": Call(optional=DTYPES),
    "scale_by_ademamix": Call(optional=("mu_slow_dtype", *DTYPES)),
    "scale_by_adopt": Call(optional=DTYPES),
    "scale_by_simplified_ademamix": Call(optional=DTYPES),
    "scale_by_stable_adam": Call(optional=("mask", "axis_name", *DTYPES)),
    "scale_by_adamax": Call(optional=DTYPES),
    "scale_by_radam": Call(optional=DTYPES),
    "learning_rate_of": Call({"opt": OPT, "state": STATE}),
    "decay_mask": Call({"params": PARAMS}, ("params", "exclude")),
    "add_decayed_weights": Call(optional=("mask",)),
    "clip_by_global_norm": Call({"max_norm": 1.0}, ("axis_name",)),
    "scale_by_learning_rate": Call({"learning_rate": 0.1}, ("learning_rate",)),
    "chain": Call({"transforms": (OPT,)}),
    "apply_updates": Call({"params": PARAMS, "updates": PARAMS}, ("updates",)),
    "scale": Call({"factor": 0.5}),
    "groups": Call({"members": {"a": OPT}, "default": OPT}, ("default",)),
    "interop.optax.muon": Call(
        optional=(
            "stacked",
            "mask",
            "consistent_rms",
            "momentum_dtype",
            "adam_learning_rate",
            "adam_weight_decay",
            *DTYPES,
        )
    ),
    "hyperball": Call({"opt": adamjax.adam(0.1)}, ("learning_rate", "mask", "axis_name")),
    "kahan": Call({"opt": OPT}),
    "master_weights": Call({"opt": OPT}),
    "stochastic_rounding": Call({"opt": OPT}),
    "packed": Call({"opt": OPT}),
    "average_params": Call({"opt": OPT}, ("dtype",)),
    "eval_params": Call({"state": AVERAGING.init(PARAMS), "params": PARAMS}),
    "quantized": Call({"format": "int8"}, ("block_size", "keep")),
    "rounding.Kahan": Call({"inner": OPT}),
    "rounding.MasterWeights": Call({"inner": OPT}),
    "rounding.StochasticRounding": Call({"inner": OPT}),
    "skip_nonfinite": Call({"opt": OPT}, ("max_consecutive", "axis_name")),
    "skip_spikes": Call({"opt": OPT}, ("max_consecutive", "axis_name")),
    "dynamic_loss_scale": Call({"opt": OPT}, ("max_consecutive", "axis_name")),
    "check": Call({"state": STATE}, ("state",)),
    "safety.SkipNonfinite": Call({"inner": OPT}, ("max_consecutive", "axis_name")),
    "safety.SkipSpikes": Call({"inner": OPT}, ("max_consecutive", "axis_name")),
    "safety.DynamicLossScale": Call({"inner": adamjax.skip_nonfinite(OPT)}),
    "diagnostics.measure": Call(
        {"grads": PARAMS, "updates": PARAMS, "state": STATE, "params": PARAMS}, ("opt", "axis_name")
    ),
    "diagnostics.explain": Call({"stats": STATS}),
    "diagnostics.scalars": Call({"stats": STATS}),
    "diagnostics.History": Call(),
    "diagnostics.coordinate_check": Call({"make": growing, "widths": [2, 4]}, cheap=False),
    "transfer": Call({"opt": OPT, "small": PARAMS, "large": PARAMS}, ("axes", "blocks", "data")),
    "schedules.Constant": Call({"value": 0.1}),
    "schedules.Linear": Call({"init": 0.1, "end": 0.2, "total_steps": 10}),
    "schedules.HalfLife": Call({"init": 0.9, "end": 0.9999, "total_steps": 10}),
    "schedules.Exponential": Call({"init": 0.1, "peak": 0.2, "total_steps": 10}),
    "schedules.range_test": Call(),
    "schedules.Cosine": Call({"peak": 0.1, "total_steps": 10}),
    "schedules.WarmupCosine": Call({"peak": 0.1, "warmup_steps": 2, "total_steps": 10}),
    "schedules.WarmupStableDecay": Call({"peak": 0.1, "warmup_steps": 2, "total_steps": 10, "decay_steps": 3}),
    "schedules.InverseSqrt": Call({"peak": 0.1, "warmup_steps": 2}),
    "schedules.OneCycle": Call({"peak": 0.1, "total_steps": 10}),
    "schedules.FromFunction": Call({"function": abs}),
    "schedules.Proportional": Call({"level": 0.1, "schedule": schedules.cosine(0.1, 10)}),
    "schedules.Scaled": Call({"factor": 0.5, "schedule": schedules.cosine(0.1, 10)}),
    "schedules.as_schedule": Call({"x": abs}),
    "schedules.reduce_on_plateau": Call(),
    "storage.Quantized": Call({"name": "int8"}, ("block_size", "keep")),
    "storage.decode": Call({"state": OPT.init(PARAMS)}),
    "storage.precision": Call({"dtype": "float16"}),
    "storage.state_bytes": Call({"opt": OPT, "params": PARAMS}, ("params",)),
    "sharding.describe": Call(PLAN, ("mesh", "zero_axis")),
    "sharding.init_sharded": Call(PLAN | {"sharding": adamjax.sharding.state_sharding(OPT, PLACED)}),
    "sharding.offload": Call({"opt": OPT}),
    "sharding.state_sharding": Call(PLAN, ("mesh", "zero_axis")),
    "sharding.zero1": Call({"opt": OPT, "axis": "data"}, ("mesh", "specs")),
    "sharding.zero1_mapped": Call({"opt": OPT, "axis": "data"}),
    "interop.torch.adam": Call(optional=KINDS_OF_TORCH),
    "interop.torch.adamw": Call(optional=KINDS_OF_TORCH),
    "interop.torch.nadam": Call(optional=KINDS_OF_TORCH),
    "interop.torch.radam": Call(optional=KINDS_OF_TORCH),
    "interop.torch.adamax": Call(optional=KINDS_OF_TORCH),
    "interop.torch.import_state": Call(
        {"opt": TORCH, "params": PARAMS, "state_dict": TORCH_STATE}, ("order", "convert")
    ),
    "interop.torch.export_state": Call(
        {"opt": TORCH, "params": PARAMS, "state": TORCH.init(PARAMS)}, ("order", "convert")
    ),
    "interop.optax.import_state": Call(
        {"opt": OPT, "params": PARAMS, "state": optax.adamw(schedules.constant(0.1)).init(PARAMS)}
    ),
    "interop.optax.export_state": Call({"opt": OPT, "state": STATE}),
    "interop.optax.wrap": Call({"opt": OPT}),
    "tuning.scale_for_batch": Call({"hparams": {"learning_rate": 0.1}, "old": 64, "new": 128}),
    "tuning.LrRange": Call({"learning_rates": RATES, "losses": 1 / RATES}),
    "tuning.lr_range_test": Call({"problem": BOWL}, ("max_lr", "mesh", "min_lr", "mode", "num_rates"), cheap=False),
    "tuning.process_pool": Call({"workers": 1}),
    "tuning.Choice": Call({"options": (1, "a", None)}, ("options",)),
    "tuning.Linear": Call({"low": 0.1, "high": 0.2}),
    "tuning.Log": Call({"low": 0.1, "high": 0.2}),
    "tuning.Space": Call({"ranges": {"learning_rate": tuning.Log(0.1, 0.2)}}),
    "tuning.sweep": Call({"problem": BOWL, "space": SPACE, "steps": 2}, ("mesh", "memory", "mode"), cheap=False),
    "tuning.tune": Call(
        {"problem": BOWL, "trials": 2, "steps": 2},
        ("steps", "mesh", "memory", "mode", "space", "storage", "confirm", "range_test", "executor", "out"),
        cheap=False,
    ),
    "tuning.Search": Call(
        {"space": SPACE, "trials": 2}, ("space", "steps", "mode", "storage", "confirm", "range_test", "out")
    ),
    "training.train": Call({"problem": BOWL, "optimizer": OPT, "steps": 2}, ("dtype", "start", "mesh")),
    "training.step_fn": Call({"loss_fn": abs, "opt": OPT}, ("accumulate_dtype",)),
    "training.keys_of": Call({"seed": 0}),
    "problems.DigitsConvnet": Call(),
    "problems.digits_convnet": Call(),
    "problems.Digits": Call(),
    "problems.digits": Call(),
    "problems.Characters": Call(),
    "problems.characters": Call(),
    "problems.check": Call({"problem": BOWL}),
    "problems.supervised": Call(
        {
            "model": (jax.random.normal, jnp.multiply),
            "loss": "mse",
            "train": (RATES, RATES),
            "valid": (RATES, RATES),
        },
        ("batch_size", "metrics", "param_shardings", "batch_axes"),
    ),
}

HISTORY = adamjax.diagnostics.History()
HISTORY.append(STATS)
TRANSFERRED = adamjax.transfer(OPT, PARAMS, PARAMS)

# Methods that take arguments of users.
METHODS = {
    "init": (OPT.init, Call({"params": PARAMS}, ("params",))),
    "update": (OPT.update, Call({"updates": PARAMS, "state": STATE, "params": PARAMS}, ("updates",))),
    "step": (OPT.step, Call({"grads": PARAMS, "state": STATE, "params": PARAMS}, ("grads",))),
    "groups.describe": (adamjax.groups({"a": OPT}, default=OPT).describe, Call({"params": PARAMS}, ("params",))),
    "schedules.Linear.__call__": (schedules.linear(0.1, 0.2, 10), Call({"count": 3})),
    "schedules.Constant.__call__": (schedules.constant(0.1), Call({"count": 3})),
    "diagnostics.History.append": (adamjax.diagnostics.History().append, Call({"stats": STATS})),
    "scaling.Transferred.check_init": (TRANSFERRED.check_init, Call({"small": PARAMS, "large": PARAMS})),
    "scaling.Transferred.rescale": (TRANSFERRED.rescale, Call({"small": PARAMS, "large": PARAMS})),
    "diagnostics.History.plot": (HISTORY.plot, Call(optional=("path",))),
    "tuning.Space.points": (SPACE.points, Call({"count": 3})),
    "tuning.LrRange.suggestion": (RANGE.suggestion, Call()),
}

# Not called with arguments of users: what they get and look at, or derive from, and the insides of steps and runs.
HELD = [
    "HyperballState",
    "interop.optax.MuonState",
    "AdamState",
    "AdEMAMixState",
    "ScheduleState",
    "ScheduleFreeState",
    "AverageState",
    "rounding.RoundingState",
    "storage.QuantizedArray",
    "storage.Precision",
]
HELD += ["storage.PackedTree"]
HELD += ["tuning.Best", "tuning.Confirmed", "tuning.Report", "tuning.Sweep", "tuning.Trial", "tuning.TrialRecord"]
HELD += ["tuning.Pruned", "DamagedFileError", "FolderInUseError"]
HELD += ["training.Report", "training.TrainStep", "training.Keys", "checkpoint.Checkpoint", "kernels.Kernel"]
HELD += ["diagnostics.AdamStats", "diagnostics.LeafStats", "diagnostics.Finding", "diagnostics.CoordinateCheck"]
HELD += ["scaling.Factors", "scaling.ParameterScaling", "scaling.Transferred"]
HELD += ["schedules.PlateauState", "sharding.Zero1State", "interop.torch.NAdamState"]
HELD += ["safety.SkipState", "safety.LossScaleState", "safety.LeafCounts", "safety.SpikeState", "safety.RunningStats"]
BASES = ["Transformation", "schedules.Schedule", "rounding.Rounding", "tuning.Problem"]
INNER = [f"training.{name}" for name in ("train_step", "measured_step", "gradients", "data_mesh", "evaluator")]
INNER += [
    f"training.{name}"
    for name in (
        "evaluated_model",
        "first_model",
        "initial",
        "model_like",
        "model_shardings",
        "update_model",
        "ShardedTask",
    )
]
INNER += ["kernels.Fused", "safety.check_skipped", "safety.skipped", "safety.was_skipped"]
FILES = [
    "kernels.build",
    "kernels.status",
    "kernels.clear",
    "checkpoint.save",
    "checkpoint.restore",
    "checkpoint.steps",
    "diagnostics.LogWriter",
    "training.stop_on_signals",
]  # see their own tests
