"""Writes hf_moe/view_families.md: the families of transformers that views support, as their tiny models show them."""

from pathlib import Path

from common.tiny_families import FAMILIES, tiny_model
from hf_moe.view_listing import supported_families
from hf_moe.views import moe_layers


DOCUMENT = Path(__file__).parents[2] / "hf_moe" / "view_families.md"
HEAD = """# Model families

`hf_moe.moe_layers`, `record_routing` and `routing_override` work on the models below, and on every model of this
package. Tests make a tiny random model of each family and prove for it: what is recorded is what the experts receive;
an override with the ranks the router has anyway changes nothing, bit for bit; the best expert alone equals the router
with `top_k = 1`; rows that are not overridden keep their weights bit for bit. One of them compares this file with the
models, which write it (`cd tests && python -m common.view_document`).

*Scores* are made of logits, *weights* of the scores of the chosen experts. *Ranked by* is what an override with
`ranks` counts on. *Experts per token* is the attribute of the router that is read at every call.

| model type | router | scores | ranked by | weights | experts per token |
|---|---|---|---|---|---|
"""
REFUSED = """
## Refused

`moe_layers` raises a `ValueError` that names the class.

| family | router | why |
|---|---|---|
"""
NOTES = """
## Limits

- Layers of DeepSeek-V4 that route by a table of token ids are not recorded by transformers and have no view.
- Ernie 4.5 VL has two views per layer, for text and for vision tokens; with images in the batch `rows` cannot be used.
- Switch Transformers hands on one expert per token; its capacity applies to overridden tokens too.
- Zaya's last expert means to skip the layer. LongCat-Flash's last experts return their input.
- Phi's router knows two experts; an expert further down is weighed by the softmax without the better ones.
"""


def _ranked_by(rule) -> str:
    words = rule.choose_by if rule.score != "none" else "probabilities"
    words += " + bias" if rule.bias else ""
    return words + (", in the best groups" if rule.groups else "")


def _weights(view) -> str:
    words = {"none": "scores", "sum": "scores / sum", "softmax": "softmax of the chosen logits"}
    words = words.get(view.normalisation, view.normalisation)
    if view.rule.normalise == "norm_topk_prob" and view.normalisation != "softmax":
        words = "scores, / sum if `norm_topk_prob`"
    return words + (f", x `{view.rule.scale}`" if view.rule.scale else "")


def document_text() -> str:
    """The whole document."""
    rows = []
    for name in FAMILIES:
        view = moe_layers(tiny_model(name))[0]
        cells = (f"`{name}`", f"`{type(view.router).__name__}`", view.score_function.replace("none", "as returned"),
                 _ranked_by(view.rule), _weights(view), f"`{view.top_k_source}`")  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    refused = [f"| {f.name} | `{f.router}` | {f.reason} |" for f in supported_families() if not f.supported]
    return HEAD + "\n".join(rows) + "\n" + REFUSED + "\n".join(refused) + "\n" + NOTES


if __name__ == "__main__":
    DOCUMENT.write_text(document_text())
