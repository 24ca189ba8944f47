"""Fields that cannot work are refused at construction."""

import pytest

from hf_moe import MixdaConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"domains": ["a", "b", "a"]}, "'a' more than once"),
        ({"domains": ["a.b"]}, "words of letters"),
        ({"domains": ["items"]}, "no attribute of a module"),
        ({"domains": "law"}, "list of names"),
        ({"domains": []}, "nothing to adapt with"),
        ({"domain_layers": [-1]}, "`domain_layers` must be layer numbers"),
        ({"domain_layers": []}, "`domain_layers` must be layer numbers"),
        ({"domain_layers": "some"}, "`domain_layers` must be layer numbers"),
        ({"reduction": 0}, "`reduction` must be at least 1, got 0"),
        ({"task_reduction": 0}, "`task_reduction` must be at least 1"),
        ({"activation": "square root"}, "`activation` must be a name"),
        ({"gate_hidden": [0]}, "`gate_hidden` must be"),
        ({"gate_activation": "relu"}, "`gate_activation` must be 'softmax' or 'sigmoid'"),
        ({"gate_pooling": "first"}, "`gate_pooling` must be one of"),
        ({"gate_dropout": 1.0}, "`gate_dropout` must be"),
        ({"mix_form": "sum"}, "`mix_form` must be"),
        ({"stage": "third"}, "`stage` must be"),
        ({"enabled_domains": ["law"]}, "`enabled_domains` must be some of"),
        ({"gate_pooling": "mean", "task_type": "CAUSAL_LM"}, "`gate_pooling='mean'`"),
        ({"bias": "all"}, "`bias`"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MixdaConfig(**fields)


def test_fields_are_brought_into_the_form_that_json_keeps():
    config = MixdaConfig(domain_layers=3, gate_hidden=[], domains=("a", "b"))
    assert (config.domain_layers, config.gate_hidden, config.domains) == ([3], None, ["a", "b"])
    assert MixdaConfig(domains=["a", "b"], enabled_domains=["b"]).in_use == ["b"]
