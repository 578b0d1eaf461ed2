from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support.helpers import ISAS, ForcedIsa, require_isa


@pytest.fixture(params=ISAS, scope="session")
def forced_isa(request: pytest.FixtureRequest) -> Iterator[ForcedIsa]:
    """Each CPU path in turn, in a process of its own: ``forced_isa(function, *args)``."""
    require_isa(request.param)
    forced = ForcedIsa(request.param)
    yield forced
    forced.close()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same on every run."""
    return np.random.default_rng(20260801)


@pytest.fixture(scope="session")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor compiles in this process, and its caches are this run's own."""
    import torch._inductor.config

    with pytest.MonkeyPatch.context() as environment, torch._inductor.config.patch(compile_threads=1):
        environment.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """torch's random numbers too."""
    torch.manual_seed(20260801)
