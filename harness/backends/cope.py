"""The in-process backend over a CoPE model, with the same tokenizer and prompts; answers questions one by one."""

from pathlib import Path

from cacheslide.core.engine import Prefilled
from cacheslide.policies.base import ReusePolicy
from cacheslide.store.memory import MemoryChunkStore
from cacheslide.training.load import load_cope
from harness.backends.reference import EngineSettings, ReferenceBackend, dtype_of
from harness.tasks.example import TaskExample


class CopeBackend(ReferenceBackend):
    """A checkpoint with its CoPE adapter.

    Parameters
    ----------
    path, dtype, device
        As in `ReferenceBackend`.
    adapter : Path
        The adapter's folder; with its calibration, unless `live`.
    live, cap : bool
        See `load_cope`.
    """

    def __init__(
        self,
        path: str | Path,
        adapter: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        live: bool = False,
        cap: bool = False,
    ) -> None:
        super().__init__(path, dtype, device)
        self.model = load_cope(path, adapter, dtype_of(dtype), device, live, cap)

    def answers(self, state: Prefilled, example: TaskExample, max_new_tokens: int) -> list[str]:
        """See `ReferenceBackend.answers`. Not one packed decode, whose branches would add up each other's gates."""
        engine = self.engine(ReusePolicy("extend", ""), MemoryChunkStore(), EngineSettings())
        out = []
        for question in example.questions:
            length, position = state.length, state.next_position
            logits = engine.extend(state, self.encode(question.text))
            ids = engine.generate(state, logits, max_new_tokens, self.stop_ids())
            state.length, state.next_position = length, position
            out.append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return out
