"""The server that runs the command line under the shim, and one scenario's conversions."""

from __future__ import annotations

import pytest
from faults.scenarios import SCENARIOS, Ordeal, make_sources
from faults.server import Server
from faults.shim import why_no_shim


@pytest.fixture(scope="session")
def server():
    """Started once; skips where calls cannot be intercepted."""
    if why := why_no_shim():
        pytest.skip(why)
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def ordeals(server, sources, tmp_path_factory):
    """Ordeals by name, each prepared when it is first asked for."""
    made: dict[str, Ordeal] = {}

    def ordeal(name: str) -> Ordeal:
        if name not in made:
            made[name] = Ordeal(server, *sources, tmp_path_factory.mktemp("ordeal"), name)
        return made[name]

    return ordeal


@pytest.fixture(params=SCENARIOS)
def ordeal(request, ordeals) -> Ordeal:
    return ordeals(request.param)
