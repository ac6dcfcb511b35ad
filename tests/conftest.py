"""What every test starts from: one thread, and the same random numbers; and which tests stay together."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what a fixture makes for a whole file made once, where several processes share the tests."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
        # Those that pytest has for every module and every test are of no account.
        if any(
            definition.scope == "module" for definitions in fixtures for definition in definitions if definition.baseid
        ):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
