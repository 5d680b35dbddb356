"""`adamjax tune --transfer-to`: the best setting for a larger model, a larger batch or a longer run."""

import argparse
import inspect
from typing import Any

import adamjax
from adamjax.cli._flags import CommandError, Options
from adamjax.scaling._batch import scaled_decays
from adamjax.scaling._rules import by_kind, for_run
from adamjax.tuning import Best

_NAMES = ("width", "depth", "batch", "steps", "data")
_BATCH_RULE = "half_life"  # the default of adamjax.transfer
_SHOWN = ("learning_rate", "weight_decay", "eps")


def add_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--transfer-to",
        type=_sizes,
        metavar="SIZES",
        help="also print the best setting for a larger model, as adamjax.transfer makes it: factors such as "
        "width=4,batch=8,steps=10; also depth (the number of residual blocks), and data (the number of different "
        "examples, by default batch * steps)",
    )


def _sizes(text: str) -> dict[str, float]:
    """Return the factors in `width=4,batch=8`."""
    where, sizes = f"--transfer-to {text}", dict[str, float]()
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in _NAMES:
            raise CommandError(f"{where}: {part or 'nothing'} is not a factor of {', '.join(_NAMES)}, as in width=4")
        if name in sizes:
            raise CommandError(f"{where}: {name} is given twice")
        try:
            sizes[name] = float(number)
        except ValueError as error:
            raise CommandError(f"{where}: {number or 'nothing'} is not a number, as {name} must be") from error
        if not 0 < sizes[name] < float("inf"):
            raise CommandError(f"{where}: {name} must be above 0, and finite")
    return sizes


def transferred(best: Best, options: Options) -> dict[str, Any]:
    """Return the hyperparameters of the large model by kind of parameter, those of all, and a call that makes them."""
    sizes: dict[str, float] = options["transfer_to"]
    batch = sizes.get("batch", 1.0)
    run = for_run(batch, sizes.get("steps", 1.0), sizes.get("data"), _BATCH_RULE)
    factors = by_kind(sizes.get("width", 1.0), sizes.get("depth", 1.0), run)
    signature = inspect.signature(getattr(adamjax, options["optimizer"])).parameters
    values = {name: p.default for name, p in signature.items()} | options | best.arguments
    rows = {}
    for kind, found in factors.items():
        row = found._asdict()
        for name in _SHOWN:
            if isinstance(values.get(name), (int, float)):
                row[name] *= values[name]
        rows[kind] = {name: x for name, x in row.items() if name not in _SHOWN or name in signature}
    decays = scaled_decays({name: values[name] for name in ("b1", "b2")}, batch, _BATCH_RULE)
    blocks = ', blocks="block_[0-9]+"' if "depth" in sizes else ""
    given = "".join(f", {name}={sizes[name]:g}" for name in ("batch", "steps", "data") if name in sizes)
    return {
        "sizes": sizes,
        "parameters": rows,
        **decays,
        "call": f"adamjax.transfer({best}, small, large{blocks}{given})",
    }


def check(options: Options) -> None:
    """Raise if there is no rule for the optimizer."""
    if options["optimizer"] in ("adam", "amsgrad") and options.get("weight_decay") != 0:
        raise CommandError(
            f"--transfer-to has no rule for the weight decay of {options['optimizer']}, which is part of the gradient: "
            "take --optimizer adamw, or --fix weight_decay=0"
        )


def table(found: dict[str, Any]) -> str:
    """Return what `transferred` found as text."""
    names = list(next(iter(found["parameters"].values())))
    headings = [name.replace("_", " ") + (" x" if name not in _SHOWN else "") for name in names]
    rows = [["", *headings]]
    rows += [[kind, *(f"{row[name]:.4g}" for name in names)] for kind, row in found["parameters"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sizes = ", ".join(f"{name} x {x:g}" for name, x in found["sizes"].items())
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    decays = f"b1 = {found['b1']:.4g}, b2 = {found['b2']:.6g}"
    return "\n".join([f"transferred to {sizes}, with {decays}:", *lines, "", f"opt = {found['call']}"])
