"""Shared fixtures. The environment is set first: Hugging Face libraries read it when they are imported."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile


# An empty cache of its own for every run: no test may pass because of what a developer once downloaded.
_HF_HOME = tempfile.mkdtemp(prefix="hf-moe-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)
# One thread per test process, of which there are two: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))

TOKENIZER_TEXT = (
    "The river runs past the old mill and down to the sea. A miller kept three cats, and the cats kept the mice away.",
    "In the evening the lights of the harbour are lit one after another, and the boats come home with the tide.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # five",
    "Experts specialise when the router lets them; otherwise every expert learns the same function.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory):
    """Folder with a byte-level BPE tokenizer of 384 entries, trained here on four sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    wrapped.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_dir):
    """A fresh copy of the tiny tokenizer, so that a test may change its settings."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture
def tiny_llama_config():
    """Dense Llama configuration: 2 layers, hidden size 32, intermediate size 64, the tiny tokenizer's vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture
def tiny_llama(tiny_llama_config):
    """Dense Llama language model in eval mode, the same weights in every test."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_llama_config).eval()


@pytest.fixture
def generator():
    """Seeded `torch.Generator` of the test's own."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Function `(code, env=None, timeout=240) -> CompletedProcess` that runs code in a fresh interpreter elsewhere.

    The working directory is an empty folder, so what is imported is the installed package. A variable whose value is
    `None` in `env` is removed.
    """

    def run(code: str, env: dict[str, str | None] | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
        merged = {**os.environ, **(env or {})}
        merged = {name: value for name, value in merged.items() if value is not None}
        command = [sys.executable, "-c", code]
        folder = tmp_path_factory.mktemp("elsewhere")
        return subprocess.run(command, capture_output=True, text=True, env=merged, cwd=folder, timeout=timeout)

    return run


@pytest.fixture(autouse=True)
def _warnings_are_said_again():
    """`warning_once` remembers what it said for the whole process; a test must not depend on the tests before it."""
    yield
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None:
        logging.warning_once.cache_clear()


@pytest.fixture
def hub():
    """A running loopback Hub, empty."""
    from common.hub_server import HubServer

    with HubServer() as server:
        yield server
