"""Every public optimizer and option, with what the oracle calls it: the grid that tests are made of."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import oracle

import adamjax
from adamjax import interop, schedules

# Where all optimizers share the code in question, one of each kind stands for them.
KINDS = ("adamw schedules", "amsgrad torch", "radam", "adamaxw", "adam coupled")


class Spec(NamedTuple):
    make: Any  # () -> optimizer
    oracle: dict[str, Any]
    needs_params: bool = False


LR = 1e-2
RISE_AND_FALL = schedules.warmup_cosine(LR, warmup_steps=5, total_steps=40, end=1e-3)
RISE_AND_FALL_ORACLE = oracle.warmup_cosine(LR, 5, 40, 1e-3)


def _spec(make, *, needs_params=False, with_oracle=None, **keywords):
    decays = ("weight_decay", "decay_schedule", "cautious_decay", "mask", "cautious")
    renamed = {k: v for k, v in keywords.items() if k not in decays}
    return Spec(
        lambda: make(**{"learning_rate": LR} | keywords),
        {"learning_rate": LR} | renamed | (with_oracle or {}),
        needs_params,
    )


# One of each public optimizer; and with options that change what a chain is made of.
PUBLIC = ("adam", "amsgrad torch", "adamw", "nadam", "nadamw", "radam", "adamax", "adamaxw")
PUBLIC += ("ademamix", "simplified_ademamix", "adopt", "adam_atan2", "stable_adamw")
GRID = (*PUBLIC, "adam coupled maximize", "adam coupled schedule", "adamw schedules", "adamw independent")

SPECS = {
    "adam": _spec(adamjax.adam),
    "adam betas": _spec(adamjax.adam, b1=0.5, b2=0.95),
    "adam zero betas": _spec(adamjax.adam, b1=0.0, b2=0.0, eps=1e-3),
    "adam eps": _spec(adamjax.adam, eps=1e-2, eps_root=1e-3),
    "adam nesterov": _spec(adamjax.adam, nesterov=True),
    "adam maximize": _spec(adamjax.adam, maximize=True),
    "adam coupled": _spec(adamjax.adam, weight_decay=0.1, with_oracle={"coupled": 0.1}, needs_params=True),
    "adam coupled maximize": _spec(
        adamjax.adam, weight_decay=0.1, maximize=True, with_oracle={"coupled": 0.1}, needs_params=True
    ),
    "adam coupled schedule": _spec(
        adamjax.adam,
        weight_decay=lambda t: (t + 1).astype(jnp.result_type(float)) * 0.01,
        with_oracle={"coupled": lambda t: 0.01 * (t + 1)},
        needs_params=True,
    ),
    "adam schedule": _spec(
        adamjax.adam, learning_rate=RISE_AND_FALL, with_oracle={"learning_rate": RISE_AND_FALL_ORACLE}
    ),
    "amsgrad torch": _spec(adamjax.amsgrad, with_oracle={"amsgrad": "torch"}),
    "amsgrad corrected": _spec(adamjax.adam, amsgrad="corrected"),
    "amsgrad paper": _spec(adamjax.adam, amsgrad="paper"),
    "amsgrad nesterov": _spec(adamjax.adam, amsgrad="torch", nesterov=True),
    "amsgrad paper nesterov": _spec(adamjax.adam, amsgrad="paper", nesterov=True),
    "adamw": _spec(adamjax.adamw, weight_decay=0.1, with_oracle={"decoupled": 0.1}, needs_params=True),
    "adamw maximize": _spec(
        adamjax.adamw, weight_decay=0.1, maximize=True, with_oracle={"decoupled": 0.1}, needs_params=True
    ),
    "adamw cautious": _spec(
        adamjax.adamw,
        weight_decay=0.1,
        cautious_decay=True,
        with_oracle={"decoupled": 0.1, "cautious": True},
        needs_params=True,
    ),
    "adamw cautious independent": _spec(
        adamjax.adamw,
        weight_decay=0.02,
        cautious_decay=True,
        decay_schedule="independent",
        with_oracle={"independent": 0.02, "cautious": True},
        needs_params=True,
    ),
    "adamw schedules": _spec(
        adamjax.adamw,
        learning_rate=RISE_AND_FALL,
        weight_decay=schedules.linear(0.2, 0.0, 20),
        with_oracle={"learning_rate": RISE_AND_FALL_ORACLE, "decoupled": lambda t: 0.2 * (1 - min(t / 20, 1))},
        needs_params=True,
    ),
    "adamw independent": _spec(
        adamjax.adamw,
        learning_rate=RISE_AND_FALL,
        weight_decay=0.02,
        decay_schedule="independent",
        with_oracle={
            "learning_rate": RISE_AND_FALL_ORACLE,
            "independent": lambda t: 0.02 * RISE_AND_FALL_ORACLE(t) / LR,
        },
        needs_params=True,
    ),
    "adamw independent constant": _spec(
        adamjax.adamw,
        weight_decay=0.02,
        decay_schedule="independent",
        with_oracle={"independent": 0.02},
        needs_params=True,
    ),
    "adam cautious update": _spec(adamjax.adam, cautious=True, with_oracle={"cautious_update": True}),
    "nadamw cautious update": _spec(
        adamjax.nadamw,
        weight_decay=0.1,
        cautious=True,
        cautious_decay=True,
        with_oracle={"nesterov": True, "decoupled": 0.1, "cautious": True, "cautious_update": True},
        needs_params=True,
    ),
    "ademamix": _spec(
        adamjax.ademamix, weight_decay=0.1, with_oracle={"algorithm": "ademamix", "decoupled": 0.1}, needs_params=True
    ),
    "ademamix schedules": _spec(
        adamjax.ademamix,
        b3=schedules.half_life(0.9, 0.9999, 30),
        alpha=schedules.linear(0.0, 8.0, 30),
        with_oracle={
            "algorithm": "ademamix",
            "b3": oracle.half_life(0.9, 0.9999, 30),
            "alpha": lambda t: 8 * min(t / 30, 1),
        },
    ),
    "simplified_ademamix": _spec(
        adamjax.simplified_ademamix,
        learning_rate=1e-3,
        alpha=2.0,
        with_oracle={"algorithm": "simplified ademamix", "b1": 0.99, "b2": 0.95},
    ),
    "adopt": _spec(adamjax.adopt, with_oracle={"algorithm": "adopt", "b2": 0.9999, "eps": 1e-6}),
    "adopt decay": _spec(
        adamjax.adopt,
        b2=0.95,
        weight_decay=0.1,
        with_oracle={"algorithm": "adopt", "eps": 1e-6, "decoupled": 0.1},
        needs_params=True,
    ),
    "adam_atan2": _spec(adamjax.adam_atan2, with_oracle={"algorithm": "atan2", "b2": 0.99}),
    "adam_atan2 nesterov": _spec(
        adamjax.adam_atan2,
        a=1.0,
        b=2.0,
        weight_decay=0.1,
        nesterov=True,
        with_oracle={"algorithm": "atan2", "b2": 0.99, "decoupled": 0.1},
        needs_params=True,
    ),
    "stable_adamw": _spec(
        adamjax.stable_adamw,
        weight_decay=0.1,
        with_oracle={"algorithm": "stable", "b2": 0.99, "eps": 1e-6, "decoupled": 0.1},
        needs_params=True,
    ),
    "stable_adamw schedules": _spec(
        adamjax.stable_adamw,
        learning_rate=RISE_AND_FALL,
        weight_decay=schedules.linear(0.2, 0.0, 20),
        with_oracle={
            "algorithm": "stable",
            "b2": 0.99,
            "eps": 1e-6,
            "learning_rate": RISE_AND_FALL_ORACLE,
            "decoupled": lambda t: 0.2 * (1 - min(t / 20, 1)),
        },
        needs_params=True,
    ),
    "nadam": _spec(adamjax.nadam, with_oracle={"nesterov": True}),
    "nadamw": _spec(
        adamjax.nadamw, weight_decay=0.1, with_oracle={"nesterov": True, "decoupled": 0.1}, needs_params=True
    ),
    "radam": _spec(adamjax.radam, with_oracle={"algorithm": "radam"}),
    "radam short": _spec(adamjax.radam, b2=0.9, with_oracle={"algorithm": "radam"}),
    "radam intractable": _spec(adamjax.radam, b2=0.5, with_oracle={"algorithm": "radam"}),
    "radam threshold": _spec(adamjax.radam, b2=0.99, threshold=20.0, nesterov=True, with_oracle={"algorithm": "radam"}),
    "adamax": _spec(adamjax.adamax, with_oracle={"algorithm": "adamax"}),
    "adamaxw": _spec(
        adamjax.adamaxw, weight_decay=0.1, with_oracle={"algorithm": "adamax", "decoupled": 0.1}, needs_params=True
    ),
}


def _quantized(name):
    return adamjax.quantized(name, block_size=8, min_size=1)


# (mu_dtype, nu_dtype)
FORMATS = {
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float16": (jnp.float16, jnp.bfloat16),
    "nu bfloat16": (None, jnp.bfloat16),
    "int8": (_quantized("int8"), _quantized("int8")),
    "int4": (_quantized("int4"), _quantized("int4")),
    "int4 int8": (_quantized("int4"), _quantized("int8")),
    "mu int8": (_quantized("int8"), None),
}

ROUNDED = {
    "stochastic_rounding": adamjax.stochastic_rounding,
    "kahan": adamjax.kahan,
    "master_weights": adamjax.master_weights,
    "low_bits": lambda opt: adamjax.master_weights(opt, low_bits=True),
    "low_bits=8": lambda opt: adamjax.master_weights(opt, low_bits=8),
}


def _stored(make, name):
    mu_dtype, nu_dtype = FORMATS[name]
    return Spec(lambda: make(LR, mu_dtype=mu_dtype, nu_dtype=nu_dtype), {}, make is adamjax.adamw)


# Another storage of moments or parameters, or guards around: the rules of the contract hold, the oracle has no
# such thing.
STORED = {
    "adamw bfloat16": _stored(adamjax.adamw, "bfloat16"),
    "amsgrad int8": _stored(adamjax.amsgrad, "int8"),
    "adam int4": _stored(adamjax.adam, "int4"),
    "torch's nadam": Spec(lambda: interop.torch.nadam(LR, weight_decay=0.1), {}, True),
    "packed": Spec(lambda: adamjax.packed(adamjax.adamw(LR, weight_decay=0.1), below=10), {}, True),
    "packed amsgrad bfloat16": Spec(lambda: adamjax.packed(_stored(adamjax.amsgrad, "bfloat16").make(), below=10), {}),
    "skip_nonfinite": Spec(lambda: adamjax.skip_nonfinite(adamjax.adamw(LR), max_consecutive=3), {}, True),
    "dynamic_loss_scale": Spec(lambda: adamjax.dynamic_loss_scale(adamjax.adam(LR)), {}),
    **{
        name: Spec(lambda wrap=wrap: wrap(adamjax.adamw(LR, weight_decay=0.1)), {}, True)
        for name, wrap in ROUNDED.items()
    },
}
