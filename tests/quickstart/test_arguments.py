import argparse
import importlib.util

import pytest

from hf_moe.quickstart.arguments import add_arguments, check_arguments
from hf_moe.quickstart.command import spread


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_defaults_are_accepted():
    check_arguments(parse())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], r"`--steps` must be at least 1, got 0"),
        (["--layers", "-1"], r"`--layers` must be at least 1"),
        (["--experts", "0"], r"`--experts` must be at least 1"),
        (["--top-k", "0"], r"`--top-k` must be at least 1"),
        (["--sequence-length", "1"], r"`--sequence-length` must be at least 8"),
        (["--held-out-tokens", "100"], r"`--held-out-tokens` must be at least 256"),
        (["--learning-rate", "0"], r"`--learning-rate` must be a number above 0"),
        (["--learning-rate", "nan"], r"`--learning-rate` must be a number above 0"),
        (["--seed", "-1"], r"`--seed` must be at least 0"),
        (["--weights", "hub", "--model", "x/y"], r"`--weights hub` and `--model x/y` exclude each other"),
        (["--domain", "code", "--text", "a.txt"], r"`--domain code` and `--text a\.txt` exclude each other"),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(words, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(parse(*words))


def test_an_unknown_domain_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse("--domain", "poems")
    assert "reference" in capsys.readouterr().err


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf-moe\[demo\]'"):
        check_arguments(parse())


def test_layers_are_spread_and_end_with_the_last():
    assert spread(6, 30) == [4, 9, 14, 19, 24, 29]
    assert spread(30, 30) == list(range(30))
    assert spread(1, 30) == [29]
    assert spread(4, 6) == [0, 2, 3, 5]


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"`--layers` must be at most 2.*got 3"):
        spread(3, 2)
