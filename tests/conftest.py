"""JAX at its strictest, on eight virtual devices."""

import os
from pathlib import Path

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Scripts: to look for doctests in them would run what they do when they are imported.
collect_ignore = [
    *("client_suites.py", "clients.py", "optax_suite.py"),
    *("kill_and_resume.py", "sdist_and_wheel.py", "train_installed.py"),
]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """Keep compiled programs and kernels for other tests, for the processes they start and, except in CI, the next run.

    JAX keys them by the program, its own version, the flags of XLA and the processor: a hit is what compiling again
    would give. Set JAX_COMPILATION_CACHE_DIR and ADAMJAX_CACHE_DIR to keep them elsewhere.
    """
    kept = Path.home() / ".cache" / "adamjax-tests" / jaxlib.__version__
    if os.environ.get("CI"):
        base = tmp_path_factory.getbasetemp()
        kept = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ.setdefault("ADAMJAX_CACHE_DIR", str(kept / "kernels"))
    # As environment variables, processes that tests start inherit them.
    for name, default in (
        ("JAX_COMPILATION_CACHE_DIR", str(kept / "compiled")),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
    ):
        given = os.environ.setdefault(name, default)
        jax.config.update(name.lower(), float(given) if name.endswith("SECS") else given)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
    """As if there were no others: groups are then stepped without being put together."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    yield
    jax.clear_caches()


@pytest.fixture
def lenient():
    """JAX's ordinary promotion rules, for the libraries that rely on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
