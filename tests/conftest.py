"""JAX at its strictest, on eight virtual devices."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """Many tests compile the same programs; processes that tests start share them too."""
    name, base = "JAX_COMPILATION_CACHE_DIR", tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ.setdefault("ADAMJAX_CACHE_DIR", str(base / "kernels"))
    folder = os.environ.setdefault(name, str(base / "compiled"))
    jax.config.update(name.lower(), folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()


@pytest.fixture
def lenient():
    """JAX's ordinary promotion rules, for the libraries that rely on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
