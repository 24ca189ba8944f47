"""Run by `test_distributed_balance.py` in two processes: trains toy models and writes what each rank saw as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common.toy_moe import random_routing, toy_dataset, toy_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe.routing import GlobalBalanceCallback, LoadBalancer, RouterStats, load_balancer
from hf_moe.routing.steps import BalanceSteps


PREVIOUS_COUNTS = [[5, 1, 1, 1], [2, 1, 1, 4]]


class CountingDist:
    """`torch.distributed`, counting the sums over ranks of the load balancer."""

    def __init__(self):
        self.calls = 0

    def __getattr__(self, name):
        return getattr(dist, name)

    def all_reduce(self, *args, **kwargs):
        self.calls += 1
        return dist.all_reduce(*args, **kwargs)


class ObservingTrainer(Trainer):
    """Tells the balance callback the batches of the step, so that its token counts are exact."""

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        (callback,) = (c for c in self.callback_handler.callbacks if isinstance(c, GlobalBalanceCallback))
        callback.observe_batches(batches)
        return batches, num_items


class Watcher(TrainerCallback):
    def __init__(self, counter):
        self.counter = counter
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.counter.calls

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gate_gradient = [layer.gate.weight.grad.tolist() for layer in model.layers]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Added after the balance callback, so the step is closed by now.
        self.steps.append(
            {
                "collectives": self.counter.calls - self.before,
                "micro_batches": model.load_balancer.num_micro_batches.item(),
                "counts": model.load_balancer.previous_counts.tolist(),
                "num_tokens": model.load_balancer.previous_num_tokens.item(),
                "gate_gradient": self.gate_gradient,
                "biases": [layer.gate.e_score_correction_bias.tolist() for layer in model.layers],
            }
        )


def train(folder, counter, dataset, average_tokens=True, max_steps=2, cls=Trainer, previous=None, **config):
    watcher = Watcher(counter)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=max_steps,
        learning_rate=0.01,
        average_tokens_across_devices=average_tokens,
    )
    model = toy_model(router_type="sigmoid_topk", router_bias_update_speed=0.125, **config)
    if previous is not None:
        model.load_balancer.previous_counts.copy_(torch.tensor(previous))
        model.load_balancer.previous_num_tokens.fill_(1)
    cls(model, args, train_dataset=dataset, callbacks=[GlobalBalanceCallback(), watcher]).train()
    return watcher.steps


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counter = load_balancer.dist = CountingDist()
    report = {"world_size": dist.get_world_size()}
    for mode in ("micro", "rank", "running", "lagged", "blend"):
        report[mode] = train(folder, counter, toy_dataset(16, pad=True), balance_mode=mode)
    equal_rows = [toy_dataset(1)[0]] * 8
    for average_tokens in (True, False):
        report[f"average_tokens={average_tokens}"] = train(folder, counter, equal_rows, average_tokens, max_steps=1)

    report["uneven"] = train(
        folder,
        counter,
        toy_dataset(8, pad=True),
        max_steps=1,
        cls=ObservingTrainer,
        previous=PREVIOUS_COUNTS,
        balance_mode="lagged",
        coefficient=1.0,
    )

    generator = torch.Generator().manual_seed(rank)
    routing = random_routing(generator)
    stats = RouterStats()
    stats.update([routing])
    report["own_counts"] = stats.compute().counts.tolist()
    report["reduced_counts"] = stats.reduce().compute().counts.tolist()

    model = toy_model(balance_mode="lagged")
    steps = BalanceSteps(model)
    if rank == 0:
        model.load_balancer.previous_counts.fill_(3)
        steps.save(folder / "only_on_rank_0")
        model.load_balancer.previous_counts.zero_()
    dist.barrier()
    steps.load([folder / f"only_on_rank_{rank}"])
    report["restored"] = model.load_balancer.previous_counts.tolist()

    balancer = LoadBalancer([4], mode="running")
    balancer.begin_step()
    compiled = torch.compile(balancer, fullgraph=True, backend="aot_eager")
    compiled([routing])
    report["compiled_counts"] = balancer.counts.tolist()

    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
