"""Text as blocks of tokens, and the perplexity of a model on them.

Shapes: M blocks, S sequence length.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_moe.corpora import Corpus


__all__ = ["TokenBlocks", "held_out_perplexity", "tokenize"]


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of consecutive tokens as examples for a `Trainer`.

    Args:
        blocks (`torch.Tensor` of shape `(M, S)`): Token ids.
    """

    def __init__(self, blocks: torch.Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def tokenize(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, held_out_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out blocks.

    Args:
        corpus ([`~hf_moe.corpora.Corpus`]): The text.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        length (`int`): Tokens per block, S.
        held_out_tokens (`int`): Roughly as many held-out tokens are kept, in blocks spread over the held-out text.

    Returns:
        `tuple`: Two tensors of shape `(M, S)`.

    Raises:
        ValueError: If one of the two parts is shorter than a block.
    """
    train = pack(corpus.train, tokenizer, length, corpus.name)
    held_out = pack(corpus.held_out, tokenizer, length, corpus.name)
    wanted = max(1, held_out_tokens // length)
    if len(held_out) > wanted:
        held_out = held_out[torch.linspace(0, len(held_out) - 1, wanted).long()]
    return train, held_out


def pack(documents: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, length: int, name: str) -> torch.Tensor:
    """Documents one after the other, an end token after each, cut into blocks; the rest is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in documents for token in [*tokenizer(text, verbose=False)["input_ids"], *end]]
    if len(ids) < length:
        raise ValueError(
            f"The text `{name}` is too short: its smaller part has {len(ids)} tokens, one block needs {length}. "
            "Give more text, or a smaller `--sequence-length`."
        )
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)  # (M, S)


@torch.no_grad()
def held_out_perplexity(model: PreTrainedModel, blocks: torch.Tensor, description: str, batch_size: int = 4) -> float:
    """Perplexity without router losses, with a progress bar.

    Args:
        model (`PreTrainedModel`): A causal language model; evaluated in evaluation mode.
        blocks (`torch.Tensor` of shape `(M, S)`): Token ids.
        description (`str`): Label of the progress bar.
        batch_size (`int`, defaults to 4): Blocks per forward pass.

    Returns:
        `float`: exp of the mean cross-entropy per token.
    """
    from hf_moe.metrics import Perplexity, token_losses

    training = model.training
    model.eval()
    metric = Perplexity(keep_in_memory=True)
    with logging.tqdm(total=len(blocks), desc=description, unit="block") as bar:
        for batch in blocks.split(batch_size):
            batch = batch.to(model.device)
            metric.add_batch(**token_losses(model(input_ids=batch, use_cache=False).logits, batch))
            bar.update(len(batch))
    model.train(training)
    return metric.compute()["perplexity"]
