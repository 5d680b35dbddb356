"""Chains that are Adam, stepped in one pass over memory."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.typing import FusedMode, Path
from adamjax._core.value import static_field, value
from adamjax._transforms.chain import Chain
from adamjax._transforms.leafwise import Done, Executor, GroupProgram, Leaf, LeafProgram
from adamjax.kernels import _backend, _cpu, _packed_call

# XLA steps arrays with fewer elements as fast: a call of a kernel has its price.
MIN_KERNEL_SIZE = 16384


@value
class Fused(Chain):
    """The chain of `adam` or one of its kin, with a `step` that is one pass over memory, on a CPU or a GPU.

    `init`, `update` and the state are those of the chain. The numbers of `step` are too, but for the last digits.
    The wrappers around it step by it: a chain that ends with it, `groups`, `skip_nonfinite`,
    `dynamic_loss_scale`, `zero1`, `offload`; on a CPU, also `stochastic_rounding`, `kahan` and
    `master_weights` around it, around a chain that ends with it, or around `groups` or `offload`, but not around
    `zero1`. Code that calls `update` and applies the result, as optax's wrappers do, takes no such step.

    It goes wherever a step does: under `jax.jit` (donate parameters and state, and nothing is copied),
    `jax.lax.scan`, `jax.vmap` over states or hyperparameters, with arrays on many devices, each of which steps its
    part, and inside `jax.shard_map`; all axes of a mesh have to be in one mode. Derivatives are those of XLA's
    step. A kernel steps parameters of 16384 elements and more; XLA steps smaller ones as fast.
    `jax.default_backend()` says which kernel it is.

    On a CPU it is C++, prebuilt in wheels for Linux. Elsewhere it is compiled when it is first needed, which takes
    about ten seconds and a C++ compiler, and kept (`adamjax kernels status`). Parameters, gradients and moments may
    be float32, bfloat16 or float16, and moments quantised. It steps groups of `adamjax.packed` as well, if there is
    one device, and no wrapper that rounds.

    On a GPU it is Pallas, for quantised moments. XLA's step of float moments is one pass already, and is taken.
    It needs jax 0.11 and a Hopper or later. Parameters and gradients may be float32 or bfloat16; a moment beside a
    quantised one is quantised or float32; blocks have a multiple of 64 numbers, and the last axis a multiple of
    those. Inside `jax.shard_map`, it needs ``check_vma=False``.

    A function with such a step in it can be exported by `jax.export` only if its check for custom calls is
    disabled, and then runs only where the same kernel is loaded.

    Fields:
      transforms: The members of the chain.
      mode: True to refuse parameters that no kernel can step, "auto" to leave them to XLA after a warning.

    Raises:
      ValueError: Inside of another transformation, at its construction: that has no such step, and `mode` is True.
    """

    mode: FusedMode = static_field(default=True, described=False)

    # The name that a checkpoint stores: the state is the same.
    described_as = "Chain"

    def _kernel_mode(self) -> FusedMode:
        return self.mode

    def _executor(self, paths: Callable[[], list[Path]]) -> Executor:
        return KernelExecutor(self.mode, paths)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, fused={self.mode!r})"


class KernelExecutor(Executor):
    """Runs leaf programs by the kernel of this platform if it can, and by XLA if not."""

    def __init__(self, mode: FusedMode, paths: Callable[[], list[Path]]) -> None:
        super().__init__(paths)
        self.mode = mode

    def run_leaf(self, leaf: Leaf, program: LeafProgram) -> Done:
        functions, operands = program
        if self._uses_kernel(leaf, functions):
            return _backend.run_kernel(_platform().KERNEL, functions, leaf.u, leaf.p, leaf.states, operands)
        return super().run_leaf(leaf, program)

    def _uses_kernel(self, leaf: Leaf, functions: _backend.Functions) -> bool:
        index, u, p, states = leaf
        if np.size(p) < MIN_KERNEL_SIZE or not _backend.delivers_param(functions):
            return False
        if (platform := _platform()) is None:
            return self._require_supported(index, f"on {jax.default_backend()} there is no kernel")
        if (variant := _backend.variant_of(functions)) is None:
            return self._require_supported(index, f"a kernel steps Adam, and not its {trees.dtype_of(p)} step")
        arrays = _backend.arrays_of(functions, p, states)
        if not platform.is_faster(arrays):
            return False
        if variant.rounding is not None and platform is not _cpu:
            why: str | None = "the kernel of this platform does not round as the wrapper around it does"
        else:
            why = _backend.unsupported_placement(u) or platform.unsupported_reason(arrays, u)
        return self._require_supported(index, why)

    def run_group(self, leaves: Sequence[Leaf], program: GroupProgram, packed_state: Any) -> tuple[list[Done], Any]:
        parts = program.before[0], program.together, program.after[0]
        alike = len({x.functions for x in program.before}) == len({x.functions for x in program.after}) == 1
        if alike and self._group_uses_kernel(leaves, sum([x.functions for x in parts], ()), packed_state):
            arrays = [leaf.u for leaf in leaves], [leaf.p for leaf in leaves], packed_state
            functions, operands = tuple([x.functions for x in parts]), tuple([x.operands for x in parts])
            new, packed_state = _packed_call.run_group(functions, *arrays, operands)
            return [(p, leaf.states) for p, leaf in zip(new, leaves, strict=True)], packed_state
        return Executor(self.paths).run_group(leaves, program, packed_state)

    def _group_uses_kernel(self, leaves: Sequence[Leaf], functions: _backend.Functions, packed_state: Any) -> bool:
        variant = _backend.variant_of(functions)
        if variant is None or variant.rounding is not None or any(leaf.u is None for leaf in leaves):
            return False
        # A kernel does not see where a parameter is, and XLA does.
        if _platform() is not _cpu or not _backend.is_on_one_device([leaf.u for leaf in leaves]):
            return False
        reasons = [_cpu.unsupported_reason((leaf.p, *packed_state, None), leaf.u) for leaf in leaves]
        return all(self._require_supported(leaf.index, why) for leaf, why in zip(leaves, reasons, strict=True))

    def _require_supported(self, index: int, why: str | None) -> bool:
        """Return whether there is no reason against the kernel. Raise if there is, and `mode` is True."""
        if why is None:
            return True
        where = checks.at("params", self.paths()[index])
        if self.mode is True:
            raise ValueError(
                f"fused=True cannot step {where}: {why}. Take fused=False, or "
                "fused='auto', which leaves to XLA what it has to"
            )
        _warn_once(f"fused='auto' leaves {where} to XLA: {why}")
        return False


def _platform() -> Any:
    """The module that has the kernel of this platform, if one has."""
    if (backend := jax.default_backend()) == "gpu":
        from adamjax.kernels import _pallas  # and with it Pallas, which takes its time to import

        return _pallas
    return _cpu if backend == "cpu" else None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
