"""Names of a package that are imported on first use."""

import sys

import pytest

from hf_moe.lazy import lazy_exports


def test_a_name_comes_from_its_module():
    get, _, names = lazy_exports("json", {"JSONDecodeError": ".decoder"})
    assert get("JSONDecodeError") is sys.modules["json.decoder"].JSONDecodeError
    assert names == ["JSONDecodeError"]


def test_a_name_that_is_its_module_gives_the_module_unless_the_module_defines_it():
    get, _, _ = lazy_exports("importlib", {"util": ".util"})
    assert get("util").__name__ == "importlib.util"
    get, _, _ = lazy_exports("datetime", {"datetime": "datetime"})
    assert get("datetime").__name__ == "datetime" and isinstance(get("datetime"), type)


def test_an_unknown_name_is_an_attribute_error():
    get, listing, _ = lazy_exports("json", {"JSONDecodeError": ".decoder"})
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'nope'"):
        get("nope")
    assert {"JSONDecodeError", "dumps"} <= set(listing())


def test_an_import_of_the_sub_module_does_not_hide_the_name_it_defines(run_python):
    code = """
import hf_moe.routing_override
from hf_moe.routing_override import routing_override
import hf_moe.metrics
print(hf_moe.routing_override is routing_override, hf_moe.metrics.__name__)
"""
    assert run_python(code).stdout.split() == ["True", "hf_moe.metrics"]
