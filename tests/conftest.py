"""Shared fixtures: small random checkpoints, an engine's environment; and how a test waits for other threads."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cacheslide.models.reference import ReferenceDecoder
from cacheslide.models.weights import fingerprint
from cacheslide.training.adapter import AdapterSettings, CopeAdapter, save_adapter
from harness.robustness.rows import ROWS

pytest_plugins = ["tests.skips"]

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def save_random(path: Path, kind: str = "llama", spread: float = 0.0, **changes) -> Path:
    """A random checkpoint of `kind` in Hugging Face format; weights large enough for contexts to matter.

    With `spread`, norms and biases are random as well, by that deviation: transformers begins them at one value.
    """
    torch.manual_seed(7)
    config, model = KINDS[kind]
    made = model(config(**(SHAPE | changes)))
    with torch.no_grad():
        for x in made.parameters() if spread else ():
            if x.dim() == 1:
                x += spread * torch.randn(x.shape)
    made.save_pretrained(path)
    return path


def save_random_adapter(path: Path, checkpoint: Path, rank: int = 3, p_max: int = 9, tables: float = 0.3) -> Path:
    """A random CoPE adapter for `checkpoint` in the folder `path`: LoRA on every projection, tables that matter."""
    config, g, tensors = LlamaConfig.from_pretrained(checkpoint), torch.Generator().manual_seed(4), {}
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden = config.hidden_size
    sizes = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    for i in range(config.num_hidden_layers):
        for name, (into, out) in sizes.items():
            tensors[f"layers.{i}.{name}.a"] = torch.randn(rank, into, generator=g) * 0.1
            tensors[f"layers.{i}.{name}.b"] = torch.randn(out, rank, generator=g) * 0.1
        tensors[f"layers.{i}.positions"] = torch.randn(p_max, config.head_dim, generator=g) * tables
    save_adapter(CopeAdapter(AdapterSettings(rank, 2.0 * rank, p_max), fingerprint(checkpoint), tensors), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A 5-layer GQA Llama with odd sizes."""
    return save_random(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(checkpoint) -> ReferenceDecoder:
    """The reference model over `checkpoint`, float32."""
    return ReferenceDecoder.from_pretrained(checkpoint)


VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler, worker and test in one process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",  # the CPU runner's warm-up compiles for most of a minute
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def vllm_environment() -> Iterator[None]:
    """What an engine of a test module needs to be told by environment variables, for that module only."""
    import torch._dynamo  # has read its variable when it was imported, maybe before

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        for name, value in VLLM_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def environment_after() -> Iterator[None]:
    """What an engine sets up in its process does not reach servers that later tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether `holds()` comes true within `seconds`, a limit for what would hang: no test may need most of it."""
    until = time.monotonic() + seconds
    while not (true := holds()) and time.monotonic() < until:
        time.sleep(0.005)
    return true


def released(path: Path) -> bool:
    """Whether nobody holds a lock on the file: the process that took one for as long as it lives has ended."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture(scope="session", autouse=True)
def nobody_beside() -> Iterator[None]:
    """No timed block of a test counts as disturbed: what a table leaves out is not for the machine of the day to say.

    Tests of what follows from a disturbed block bring readings along; tests/test_quiet.py takes this back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.quiet.judge", lambda reading: "")
        yield


def random_ids(n: int, seed: int) -> tuple[int, ...]:
    """`n` token ids of the small vocabulary."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (n,), generator=g).tolist())


def pytest_addoption(parser) -> None:
    parser.addoption("--fault-report", type=Path, help="write the outcome of every test marked `fault` to this file")


def pytest_collection_modifyitems(items) -> None:
    """A mark that names no row of the list is a mistake."""
    for item in items:
        for mark in item.iter_markers("fault"):
            if mark.args[0] not in ROWS:
                raise pytest.UsageError(f"{item.nodeid}: no row {mark.args[0]!r} in harness/robustness/rows.py")


_FAULTS: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for mark in item.iter_markers("fault"):
        said = _FAULTS.setdefault(mark.args[0], {})
        if report.when == "call" or report.outcome != "passed":
            said[item.nodeid] = "failed" if said.get(item.nodeid) == "failed" else report.outcome
    return report


def pytest_sessionfinish(session) -> None:
    if (path := session.config.getoption("--fault-report")) is not None:
        path.write_text(json.dumps(_FAULTS, indent=1, sort_keys=True) + "\n")
