"""An adapter pushed to a Hub loads from there as it was."""

import subprocess
import sys

from common.adapter_cases import CASES, tiny_llama
from common.hub_server import HubServer


PUSH = """
import sys
import torch
import hf_moe
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
model.push_to_hub("me/adapter")
ids = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    expected = model(input_ids=ids).logits
    for loaded in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "me/adapter"),
        AutoPeftModelForCausalLM.from_pretrained("me/adapter"),
    ):
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
print("equal")
"""


def test_a_pushed_adapter_loads_as_it_was(tmp_path):
    from peft import get_peft_model

    tiny_llama().save_pretrained(tmp_path / "base")
    case = next(case for case in CASES if case.name == "pill")
    model = get_peft_model(tiny_llama(), case.config(init_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with HubServer() as hub:
        command = [sys.executable, "-c", PUSH, str(tmp_path / "base"), str(tmp_path / "adapter")]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip().endswith("equal")
        # the card is `push_to_hub`'s own template: PEFT's method writes it over the saved one
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files("me/adapter"))
