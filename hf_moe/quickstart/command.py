"""`hf-moe quickstart`, step by step."""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from hf_moe.corpora import Corpus, load_corpus, load_text_file

from .arguments import check_arguments
from .interrupt import Interrupts, noticing_interrupts
from .output import output_folder


__all__ = ["run", "spread"]

PROMPTS = {
    "reference": "What does the `with` statement do in Python?",
    "docstrings": "What is a documentation string in Python?",
    "code": "Write a Python function that adds two numbers.",
    "licences": "What does the MIT licence allow?",
    "readmes": "How do I install a Python package?",
}
# Saving and loading keep every bit; this leaves room for other kernels after a move to another device.
RELOAD_TOLERANCE = 1e-4


def run(args: argparse.Namespace) -> int:
    """Run the quickstart.

    Args:
        args (`argparse.Namespace`): With the attributes of [`add_arguments`].

    Returns:
        `int`: 0.

    Raises:
        ValueError: If an option, the model or the text is unusable. Nothing is left behind then.
        ImportError: If a package of the `demo` extra is missing.
    """
    started = time.perf_counter(), time.process_time()
    check_arguments(args)
    domain = args.domain or "reference"
    with noticing_interrupts() as interrupts, output_folder(args.output, overwrite=args.overwrite) as folder:
        corpus = load_text_file(args.text) if args.text is not None else load_corpus(domain)
        results = tell_story(args, corpus, folder, interrupts)
        results["seconds"] = round(time.perf_counter() - started[0], 1)
        results["cpu_seconds"] = round(time.process_time() - started[1], 1)
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        (folder / "results.json").write_text(text, encoding="utf-8")
        interrupts.check()
    say(f"\nDone in {results['seconds']:.0f} s ({results['cpu_seconds']:.0f} s of CPU time). Look at:")
    output = Path(args.output)
    for path in (output / "model" / "README.md", output / "report" / "report.md", output / "results.json"):
        say(f"  {path}")
    say("Load the model:")
    say(f'  import hf_moe; AutoModelForCausalLM.from_pretrained("{output / "model"}")')
    return 0


def tell_story(args: argparse.Namespace, corpus: Corpus, folder: Path, interrupts: Interrupts) -> dict[str, Any]:
    """Everything between the check of the options and the results file."""
    heading(1, "Dense model")
    import torch
    from transformers import set_seed

    import hf_moe
    from hf_moe.upcycling.sources import source_name
    from hf_moe.weights import load_dense

    from .data import held_out_perplexity, tokenize
    from .training import fine_tune

    set_seed(args.seed)
    dense, tokenizer = load_dense(args.model or args.weights or "auto")
    name = source_name(dense)
    layers = spread(args.layers, dense.config.num_hidden_layers)
    train, held_out = tokenize(corpus, tokenizer, args.sequence_length, args.held_out_tokens)
    dense.to("cuda" if torch.cuda.is_available() else "cpu")
    say(f"{name}: {count(dense.num_parameters())} parameters, {dense.config.num_hidden_layers} layers.")
    say(f"Text `{corpus.name}`: {train.numel():,} tokens to train on, {held_out.numel():,} held out.")
    perplexity = {"dense": held_out_perplexity(dense, held_out, "Perplexity, dense")}
    say(f"Held-out perplexity, dense model: {perplexity['dense']:.3f}")

    interrupts.check()
    target, settings = choose_target(dense.config)
    heading(2, f"Upcycling: {args.experts} experts, top-{args.top_k}, {len(layers)} layers, target {target}")
    moe, report = hf_moe.upcycle(
        dense,
        num_experts=args.experts,
        top_k=args.top_k,
        layers=layers,
        target=target,
        seed=args.seed,
        # Where the zero-computation experts' biases start depends on what the routers see.
        calibration=[train[:4]],
        **settings,
    )
    del dense
    check_space(moe, folder)
    say(str(report))
    perplexity["before"] = held_out_perplexity(moe, held_out, "Perplexity, before training")
    say(f"Held-out perplexity before training: {perplexity['before']:.3f}")

    interrupts.check()
    heading(3, f"Fine-tuning the MoE blocks: {args.steps} steps of {args.batch_size} x {args.sequence_length} tokens")
    training = fine_tune(
        moe,
        train,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        interrupts=interrupts,
    )
    perplexity["after"] = held_out_perplexity(moe, held_out, "Perplexity, after training")
    say("Held-out perplexity: " + ", ".join(f"{when} {value:.3f}" for when, value in perplexity.items()))

    interrupts.check()
    heading(4, "Routing report and model card")
    routing = write_report(moe, tokenizer, held_out, folder)
    model_folder = folder / "model"
    moe.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    write_card(args, name, moe, report, routing, training, perplexity, corpus, folder)

    interrupts.check()
    heading(5, "Reloading through AutoModelForCausalLM")
    reloaded, difference = reload(model_folder, moe, held_out[:1])
    say(f"Largest difference of the logits: {difference:.3g}")
    prompt = args.prompt or PROMPTS.get(corpus.name) or " ".join(corpus.held_out[0].split()[:16])
    answer = generate(reloaded, tokenizer, prompt)
    say(f"\n> {prompt}\n{answer}")
    return {
        "dense_model": name,
        "text": corpus.name,
        "layers": layers,
        "seed": args.seed,
        "parameters": moe.num_parameters(),
        "upcycling": report.to_dict(),
        "held_out_tokens": held_out.numel(),
        "perplexity": perplexity,
        "below_dense": perplexity["after"] < perplexity["dense"],
        "training": training,
        "routing": routing.metrics(),
        "reload_max_logit_difference": difference,
        "generation": {"prompt": prompt, "answer": answer},
    }


def spread(wanted: int, available: int) -> list[int]:
    """Evenly spread layer indices, the last layer among them.

    Args:
        wanted (`int`): How many.
        available (`int`): Layers of the model.

    Returns:
        `list[int]`: Sorted indices.

    Raises:
        ValueError: If the model has fewer layers.

    Example:
        ```python
        >>> spread(3, 30)
        [9, 19, 29]
        ```
    """
    if wanted > available:
        raise ValueError(f"`--layers` must be at most {available}, the layers of this model, got {wanted}.")
    return [(index + 1) * available // wanted - 1 for index in range(wanted)]


def choose_target(config: Any) -> tuple[str, dict[str, Any]]:
    """MoE++ where the dense model is of a kind it is made from, else whatever fits; and the settings that go with it.

    Args:
        config (`PreTrainedConfig`): Of the dense model.

    Returns:
        `tuple[str, dict]`: `target` of [`upcycle`], and fields of the result's config.
    """
    from hf_moe.upcycling.targets.backbone import MoePlusPlusTarget

    if config.model_type in MoePlusPlusTarget().source_types and getattr(config, "sliding_window", None) is None:
        # Capacity is counted for balanced experts; at the start nearly every token goes to a feed-forward expert.
        return "moe_plus_plus", {"expert_capacity_factor": None}
    return "auto", {}


def check_space(model: Any, folder: Path) -> None:
    """Refuse to start training what cannot be saved afterwards."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise ValueError(
            f"`--output` has {free / 1e9:.1f} GB free, but the model needs {needed / 1e9:.1f} GB. "
            "Choose another folder, or fewer `--layers` or `--experts`."
        )


def write_report(model: Any, tokenizer: Any, blocks: Any, folder: Path) -> Any:
    """The routing report on the held-out text; its table is printed."""
    from hf_moe.reporting import routing_report
    from hf_moe.reporting.markdown import markdown_table

    texts = [tokenizer.decode(block) for block in blocks]
    report = routing_report(
        model, tokenizer, texts, max_length=blocks.shape[1], model_name="hf-moe quickstart", show_progress=True
    )
    report.save(folder / "report")
    say(markdown_table(report.table()))
    return report


def write_card(
    args: argparse.Namespace,
    name: str,
    model: Any,
    report: Any,
    routing: Any,
    training: dict,
    perplexity: dict[str, float],
    corpus: Corpus,
    folder: Path,
) -> None:
    """The model card beside the weights, with the report's figures."""
    from hf_moe.model_cards import create_model_card
    from hf_moe.weights import DEFAULT_MODEL

    figures = [shutil.copy(path, folder / "model") for path in sorted((folder / "report").glob("*.png"))]
    # The text of a domain depends on the Python it comes with.
    dataset = corpus.name if args.text is not None else f"{corpus.name}, Python {platform.python_version()}"
    measured = {"Perplexity": perplexity["after"], **routing.metrics()}
    card = create_model_card(
        model,
        base_model=name,
        report=report,
        routing_table=routing.table(),
        eval_results=[{"metric": k, "value": v, "dataset": dataset, "split": "held-out"} for k, v in measured.items()],
        training={
            **training,
            "held-out perplexity, dense model": perplexity["dense"],
            "held-out perplexity, before training": perplexity["before"],
            "held-out perplexity, after training": perplexity["after"],
        },
        figures=figures,
        license="apache-2.0" if name == DEFAULT_MODEL else None,
        model_name="hf-moe quickstart",
    )
    card.save(folder / "model" / "README.md")


def reload(folder: Path, model: Any, blocks: Any) -> tuple[Any, float]:
    """The saved model through `AutoModelForCausalLM`, and by how much its logits differ from the one in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device).eval()
    model.eval()
    with torch.no_grad():
        blocks = blocks.to(model.device)
        difference = (reloaded(input_ids=blocks).logits - model(input_ids=blocks).logits).abs().max().item()
    if not difference <= RELOAD_TOLERANCE:
        raise ValueError(
            f"The saved model's logits differ from the trained model's by {difference:.3g}, more than "
            f"{RELOAD_TOLERANCE:g}: its files are damaged. Check the disk of `--output` and run again."
        )
    return reloaded, difference


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation, or answer where the tokenizer has a chat template."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def count(number: int) -> str:
    """1234567 -> '1.2M'."""
    return f"{number / 1e6:.1f}M"


def heading(number: int, text: str) -> None:
    say(f"\n[{number}/5] {text}")


def say(text: str) -> None:
    # What a command prints is its product; it must appear before the progress bars that follow it.
    print(text, flush=True)
