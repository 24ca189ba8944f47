"""The text of all reproductions: five kinds of real text every machine has, in tokens of a small byte-level BPE.

Shapes: M blocks, S tokens per block.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from hf_moe.corpora import DOMAINS, load_corpus


__all__ = ["VOCABULARY", "Text", "load_text"]

#: Tokens of the vocabulary that is trained on the training text, the end of a document (0) included.
VOCABULARY = 1024
#: Held-out blocks of each domain, spread evenly over its held-out text.
HELD_OUT_BLOCKS = 24
#: Characters the vocabulary is trained on, of each domain.
VOCABULARY_CHARACTERS = 150_000


@dataclass(frozen=True)
class Text:
    """Blocks by domain.

    Args:
        train (`dict[str, torch.Tensor]`): Training blocks of each domain, int64 `(M, S)`.
        held_out (`dict[str, torch.Tensor]`): Held-out blocks of each domain.
        bytes_per_token (`torch.Tensor` of shape `(VOCABULARY,)`): Bytes of text each token stands for.
    """

    train: dict[str, torch.Tensor]
    held_out: dict[str, torch.Tensor]
    bytes_per_token: torch.Tensor

    def mixed(self, seed: int) -> torch.Tensor:
        """As many training blocks of every domain as the smallest has, in random order, `(M, S)`."""
        generator = torch.Generator().manual_seed(seed)
        most = min(len(blocks) for blocks in self.train.values())
        chosen = [blocks[torch.randperm(len(blocks), generator=generator)[:most]] for blocks in self.train.values()]
        joined = torch.cat(chosen)
        return joined[torch.randperm(len(joined), generator=generator)]


@lru_cache(maxsize=2)
def load_text(length: int, max_characters: int = 1_000_000) -> Text:
    """Reads, splits by document, trains the vocabulary on the training part, and cuts into blocks.

    Args:
        length (`int`): Tokens per block, S.
        max_characters (`int`): Characters read of each domain.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    corpora = {name: load_corpus(name, max_characters=max_characters) for name in DOMAINS}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(("".join(c.train)[:VOCABULARY_CHARACTERS] for c in corpora.values()), trainer)
    # One character of a byte-level token stands for one byte; the end of a document for none.
    pieces = tokenizer.get_vocab()
    bytes_per_token = torch.zeros(VOCABULARY)
    for piece, index in pieces.items():
        bytes_per_token[index] = 0 if piece == "<end>" else len(piece)

    def blocks(documents: tuple[str, ...]) -> torch.Tensor:
        ids = [token for coded in tokenizer.encode_batch(list(documents)) for token in (*coded.ids, 0)]
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    train = {name: blocks(corpus.train) for name, corpus in corpora.items()}
    held_out = {name: blocks(corpus.held_out) for name, corpus in corpora.items()}
    for name, found in held_out.items():
        if len(found) > HELD_OUT_BLOCKS:
            held_out[name] = found[torch.linspace(0, len(found) - 1, HELD_OUT_BLOCKS).long()]
    return Text(train, held_out, bytes_per_token)
