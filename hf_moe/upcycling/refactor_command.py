"""`hf-moe refactor SRC DST`: a dense checkpoint in, a Read-ME checkpoint out."""

import argparse
import json
from typing import Any

from hf_moe.files import check_new_folder, new_folder, write_text


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hf-moe refactor`."""
    parser.add_argument("source", metavar="SRC", help="dense Llama, Mistral or Qwen2: a folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        help="one expert for the text of this file, or for a built-in domain (reference, docstrings, code, licences, "
        "readmes); repeat it. All built-in ones by default",
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of the channels an expert keeps (default: 0.5)")
    parser.add_argument(
        "--samples", type=int, default=16, metavar="N", help="windows of text per domain (default: 16)"
    )
    parser.add_argument("--length", type=int, metavar="TOKENS", help="tokens per window (default: up to 4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-check", action="store_true", help="do not run both models to measure the difference")


def run(args: argparse.Namespace) -> int:
    """Converts, saves and prints the report.

    Returns:
        `int`: 0.

    Raises:
        ValueError: an option that cannot work; the destination is untouched.
    """
    from transformers import AutoTokenizer

    from hf_moe.upcycling.refactor import convert_to_readme

    destination = check_new_folder(args.destination)
    domains = _domains(args.domain)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    model, report = convert_to_readme(
        args.source,
        domains,
        args.keep,
        tokenizer=tokenizer,
        samples=args.samples,
        length=args.length,
        check=not args.no_check,
        seed=args.seed,
    )
    with new_folder(destination) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_text(partial / "upcycling.json", json.dumps(report.to_dict(), indent=2) + "\n")
    print(report)
    print(f"Wrote {destination}; tune it with `hf-moe train read-me`.")
    return 0


def _domains(options: list[str]) -> dict[str, Any]:
    from hf_moe.corpora import DOMAINS, load_corpus, load_text_file

    domains = {}
    for option in options or DOMAINS:
        name, _, file = option.partition("=")
        if name in domains:
            raise ValueError(f"`--domain {option}`: {name!r} is there twice; give domains names of their own.")
        domains[name] = (load_text_file(file) if file else load_corpus(name)).train
    return domains
