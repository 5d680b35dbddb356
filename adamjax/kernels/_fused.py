"""Chains that are Adam, stepped in one pass over memory."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

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
    """The chain of `adam` or one of its kin, whose `step` and `update` are one pass over memory, by a kernel.

    `init` and the state are those of the chain. The numbers are too, but for the last digits. Whatever is around it
    calls its kernel: a chain, anywhere in it, `groups`, `skip_nonfinite`, `dynamic_loss_scale`, `zero1`, `offload`,
    `stochastic_rounding`, `kahan`, `master_weights`, optax's wrappers and the loops of frameworks.
    A `clip_by_global_norm` just before it reads the gradients for the norm, and leaves their scaling to the kernel.
    For a factor that depends on a whole parameter, as those of `adamw(cautious=True)` and `stable_adamw`, gradients
    and one moment are read before: by the kernel on a CPU, if there is one device or inside `jax.shard_map`, and by
    XLA elsewhere.
    Code that calls `update` adds the result to the parameters itself, in a second pass; `step` has no need of that.

    It goes wherever a step does: under `jax.jit` (donate parameters and state, and nothing is copied),
    `jax.lax.scan`, `jax.vmap` over states or hyperparameters, with arrays on many devices, each of which steps its
    part, and inside `jax.shard_map`; all axes of a mesh have to be in one mode. Derivatives are those of XLA's
    step. A kernel steps parameters of 16384 elements and more; XLA steps smaller ones as fast.
    `jax.default_backend()` says which kernel it is.

    On a CPU it is C++, prebuilt in wheels for Linux. Elsewhere it is compiled when it is first needed, which takes
    about ten seconds and a C++ compiler, and kept (`adamjax kernels status`). Parameters, gradients and moments may
    be float32, bfloat16 or float16, and moments quantised. It steps groups of `adamjax.packed` as well, if there is
    one device.

    On a GPU it is Pallas, for quantised moments. XLA's step of float moments is one pass already, and is taken.
    It needs jax 0.11 and a Hopper or later. Parameters and gradients may be float32 or bfloat16; a moment beside a
    quantised one is quantised or float32; blocks have a multiple of 32 numbers, beside codes of 4 bits of 64, and
    the last axis a multiple of those. Inside `jax.shard_map`, it needs ``check_vma=False``.

    On a TPU it is Pallas too, for quantised moments: blocks divide 256, and the last axis is a multiple of 256 on each
    device. On several TPUs it needs a mesh in Explicit mode, or `jax.shard_map` with ``check_vma=False``. It was
    compiled for TPUs, and never run on one.

    A function with such a step in it can be exported by `jax.export` only if its check for custom calls is
    disabled, and then runs only where the same kernel is loaded.

    Fields:
      transforms: The members of the chain.
      mode: True to refuse parameters that no kernel can step, "auto" to leave them to XLA after a warning.

    Raises:
      ValueError: At the first step or update: no kernel can step a parameter, and `mode` is True. The message has the
        path of the parameter and the reason.
    """

    has_executor: ClassVar[bool] = True

    mode: FusedMode = static_field(default=True, described=False)

    # The name that a checkpoint stores: the state is the same.
    described_as = "Chain"

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
        if np.size(leaf.u) < MIN_KERNEL_SIZE:
            return super().run_leaf(leaf, program)
        found = _backend.split(program.functions)
        if found is None:
            self._require_supported(leaf.index, f"a kernel steps Adam, and not its {trees.dtype_of(leaf.u)} step")
            return super().run_leaf(leaf, program)
        before, step, after = (LeafProgram(program.functions[part], program.operands[part]) for part in found)
        leaf = leaf.after(super().run_leaf(leaf, before))
        if self._uses_kernel(leaf, step.functions):
            kernel = _platform().KERNEL
            done = _backend.run_kernel(kernel, step.functions, leaf.u, leaf.p, leaf.states, step.operands)
        else:
            done = super().run_leaf(leaf, step)
        return super().run_leaf(leaf.after(done), after)

    def _uses_kernel(self, leaf: Leaf, functions: _backend.Functions) -> bool:
        if (platform := _platform()) is None:
            return self._require_supported(leaf.index, f"on {jax.default_backend()} there is no kernel")
        variant = _backend.variant_of(functions)
        assert variant is not None
        arrays = _backend.arrays_of(variant, functions, leaf, _backend.moments_of(functions, leaf.states))
        if not platform.is_faster(arrays):
            return False
        why = _backend.unsupported_placement(leaf.u) or platform.unsupported_reason(variant, arrays, leaf.u)
        return self._require_supported(leaf.index, why)

    def run_group(self, leaves: Sequence[Leaf], program: GroupProgram, packed_state: Any) -> tuple[list[Done], Any]:
        group = _packed_call.group_of(program)
        if group is not None and self._group_uses_kernel(group, leaves, packed_state):
            return _packed_call.run_group(group, leaves, program, packed_state)
        return Executor(self.paths).run_group(leaves, program, packed_state)

    def _group_uses_kernel(self, group: _packed_call.Group, leaves: Sequence[Leaf], packed_state: Any) -> bool:
        given = [leaf.u for leaf in leaves]
        # A kernel does not see where a parameter is, and XLA does.
        if _platform() is not _cpu or any(u is None for u in given) or not _backend.is_on_one_device(given):
            return False
        for leaf in leaves:
            arrays = _backend.arrays_of(group.variant, group.functions, leaf, packed_state)
            if not self._require_supported(leaf.index, _cpu.unsupported_reason(group.variant, arrays, leaf.u)):
                return False
        return True

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
    # Pallas takes its time to import.
    if (backend := jax.default_backend()) == "gpu":
        from adamjax.kernels import _pallas

        return _pallas
    if backend == "tpu":
        from adamjax.kernels import _pallas_tpu

        return _pallas_tpu
    return _cpu if backend == "cpu" else None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
