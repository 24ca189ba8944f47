"""`hf-moe prune SRC DST`: keep some of the experts of a checkpoint."""

import argparse


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-moe prune`."""
    parser.add_argument("source", metavar="SRC", help="Mixture-of-Experts checkpoint: folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="folder to write; must be new or empty")
    parser.add_argument("--experts", type=int, required=True, metavar="N", help="experts to keep in every MoE layer")
    parser.add_argument("--policy", default="load", help="load (default), probability or random")
    parser.add_argument("--text", metavar="FILE", help="text file the experts are measured on, e.g. of one language")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="tokens of it to read (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of --policy random")


def run(args: argparse.Namespace) -> int:
    """Measures, prunes and saves.

    Returns:
        `int`: 0.

    Raises:
        ValueError: an option that cannot work; the destination is untouched.
    """
    from transformers import AutoTokenizer

    from hf_moe.corpora import load_text_file
    from hf_moe.files import check_new_folder, new_folder

    from .expert_usage import expert_usage
    from .prune import POLICIES, prune_experts
    from .sources import load_source

    destination = check_new_folder(args.destination)
    if args.policy not in POLICIES:
        raise ValueError(f"`--policy` must be one of {', '.join(POLICIES)}, got {args.policy!r}.")
    if args.policy != "random" and not args.text:
        raise ValueError(f"`--policy {args.policy}` goes by what the experts do: give `--text FILE`.")
    text = load_text_file(args.text).train if args.text else []
    model = load_source(args.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.source)
    except (OSError, ValueError) as error:
        if text:
            raise ValueError(f"`--text` needs a tokenizer, and {args.source!r} has none.") from error
        tokenizer = None
    usage = None
    if text:
        usage = expert_usage(model, _batches(tokenizer, text, args.max_tokens, model.config.is_encoder_decoder))
    small = prune_experts(model, num_experts=args.experts, usage=usage, policy=args.policy, seed=args.seed)
    with new_folder(destination) as partial:
        small.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    print(f"{args.experts} experts in every MoE layer; parameters: {before:,} -> {after:,}")
    print(f"Wrote {destination}")
    return 0


def _batches(tokenizer, texts, max_tokens: int, two_stacks: bool):
    """Windows of up to 512 tokens, one by one; a decoder reads what its encoder reads."""
    import torch

    from hf_moe.reporting.windows import token_windows

    for window in token_windows(tokenizer, texts, 512, max_tokens):
        ids = torch.tensor([window])
        yield {"input_ids": ids, "decoder_input_ids": ids} if two_stacks else {"input_ids": ids}
