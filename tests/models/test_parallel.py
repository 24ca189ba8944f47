"""Tensor, expert and fully sharded parallelism in two processes equal the model on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from common import parallel_worker
from common.model_battery import make_model


TP, EP, FSDP_EP = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}
BRANCHES = {"num_shared_experts": 1, "shared_expert_gate": True, "residual_expert": True}
DENSE_BETWEEN = {"num_hidden_layers": 3, "moe_layers": [0, 2]}
# Name -> (type, fields, DistributedConfig, experts implementation, shape of the first layer's shards on a rank).
CASES = {
    "llama_tp": ("moe_llama", BRANCHES, TP, "grouped_mm", {"gate_up_proj": [4, 48, 32], "down_proj": [4, 32, 24]}),
    "llama_ep": ("moe_llama", BRANCHES, EP, "grouped_mm", {"gate_up_proj": [2, 96, 32], "down_proj": [2, 32, 48]}),
    "llama_eager_ep": ("moe_llama", {}, EP, "eager", {"gate_up_proj": [2, 96, 32], "down_proj": [2, 32, 48]}),
    "qwen2_ep": ("moe_qwen2", DENSE_BETWEEN, EP, "batched_mm", {"gate_up_proj": [2, 96, 32]}),
    "qwen3_mlp_tp": ("moe_qwen3", {"expert_type": "mlp"}, TP, "grouped_mm", {"up_proj": [4, 24, 32]}),
    "llama_biases_tp": ("moe_llama", {"mlp_bias": True}, TP, "grouped_mm", {}),
    "llama_biases_ep": ("moe_llama", {"mlp_bias": True}, EP, "grouped_mm", {"gate_up_proj_bias": [2, 96]}),
    "plus_plus_tp": ("moe_plus_plus", DENSE_BETWEEN, TP, "grouped_mm", {"down_proj": [4, 32, 24]}),
    "plus_plus_ep": ("moe_plus_plus", {}, EP, "grouped_mm", {"gate_up_proj": [2, 96, 32]}),
    "gpt2_fsdp_ep": ("moe_gpt2", {}, FSDP_EP, "grouped_mm", {"up_proj": [2, 48, 32], "up_proj_bias": [2, 48]}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case measured; one launch for all of them."""
    root = tmp_path_factory.mktemp("parallel")
    jobs = []
    for name, (model_type, fields, distributed, implementation, _) in CASES.items():
        # In the worst case capacity would tell the processes' models apart by a rounding error.
        make_model(model_type, **{"expert_capacity_factor": None, **fields}).save_pretrained(root / name, code=None)
        job = {"folder": str(root / name), "distributed": distributed, "implementation": implementation}
        jobs.append({**job, "result": str(root / f"{name}.json")})
    (root / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, parallel_worker.__file__, str(root / "jobs.json")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=250)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return {name: json.loads(Path(job["result"]).read_text()) for name, job in zip(CASES, jobs, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_same_logits_losses_and_gradients(name, results):
    result, shapes = results[name], CASES[name][4]
    assert result["logits"] < 1e-6 * max(1.0, result["scale"]) * 4
    assert result["loss"] < 2e-6 and result["aux_loss"] < 2e-6
    assert result["gradients"] < 1e-5 and not result["without_gradient"]
    local = {key.split(".mlp.experts.")[1]: s for key, s in result["local"].items() if ".0.mlp.experts." in key}
    assert shapes.items() <= local.items() and bool(local) == bool(shapes)


def test_branches_are_sharded_with_the_experts(results):
    shapes = results["llama_tp"]["local"]
    assert shapes["model.layers.0.mlp.shared_experts.gate_proj.weight"] == [24, 32]
    assert shapes["model.layers.0.mlp.residual_expert.down_proj.weight"] == [32, 24]
