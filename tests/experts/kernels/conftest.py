"""The compiled operator, for the tests that need it."""

import pytest

from hf_moe.experts.kernels.compiled import compiler, load_compiled


@pytest.fixture(scope="session")
def compiled_operator():
    """The operator, built once into the test run's own cache."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    assert load_compiled(build=True)
