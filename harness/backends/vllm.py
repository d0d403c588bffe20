"""The vLLM backend: the study's systems as requests to an in-process vLLM engine.

Every registered system is chosen by the marks of a request to an engine with the connector and without a prefix cache.
`Vanilla` systems are unmarked requests to an engine without the connector. Answers are decoded greedily, one request a
question: vLLM shows no KV to decode branches behind.
"""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cacheslide.core.prompt import Prompt
from cacheslide.core.receipt import Receipt
from cacheslide.errors import ModelError, PolicyError
from cacheslide.policies.base import ReusePolicy
from cacheslide.vllm.options import annotations_of, policy_of
from harness.backends.in_process import Answer, Ask, EngineOptions, InProcessEngine
from harness.backends.reference import EngineSettings
from harness.backends.responders import Response, load_record
from harness.backends.tokens import Tokens
from harness.systems import System, Vanilla
from harness.tasks.example import TaskExample


class VllmBackend(Tokens):
    """A checkpoint folder for vLLM, with its tokenizer.

    Parameters
    ----------
    path : str or Path
    dtype, device : str
        What the model computes in, and where: "cpu" or "cuda", as the installed vLLM is built.
    options : EngineOptions
    """

    def __init__(self, path: str | Path, dtype: str, device: str, options: EngineOptions) -> None:
        super().__init__(path)
        self.path, self.dtype, self.device, self.options = Path(path), dtype, device, options
        try:
            self.num_layers = int(json.loads((self.path / "config.json").read_text())["num_hidden_layers"])
        except (OSError, KeyError, ValueError) as missing:
            raise ModelError(f"{path}: config.json does not say num_hidden_layers: {missing}") from None

    def engine(self, settings: EngineSettings, connector: bool) -> InProcessEngine:
        """A running engine, with the connector or without."""
        extra = {"chunk_size": settings.chunk_size, "suffix_len": settings.suffix_len, "encode": "now"}
        return InProcessEngine(self.path, self.dtype, self.device, self.options, extra if connector else None)


def vllm_sessions(
    backend: VllmBackend, systems: Sequence[System], settings: EngineSettings
) -> Iterator[tuple["VllmResponder", Sequence[System]]]:
    """vLLM by itself first, then the engine with the connector; each is freed before the next starts."""
    stock = [s for s in systems if isinstance(s, Vanilla)]
    marked = [s for s in systems if not isinstance(s, Vanilla)]
    for some, connector in ((stock, False), (marked, True)):
        if some:
            with backend.engine(settings, connector) as engine:
                yield VllmResponder(backend, engine), some


class VllmResponder:
    """Requests to one engine. Systems never share a chunk: each has a namespace of its own."""

    def __init__(self, backend: VllmBackend, engine: InProcessEngine) -> None:
        self.backend, self.engine, self.stop = backend, engine, backend.stop_ids()

    def fill(self, examples: Sequence[TaskExample], systems: Sequence[System]) -> dict[str, Any]:
        """See `Responder.fill`: the previous turns are served once under every system that keeps anything of them."""
        self.engine.reset()
        report = {}
        for namespace, system in {_namespace(s): s for s in systems if s.reuses}.items():
            started = time.perf_counter()
            self._serve_previous(system, examples)
            report[namespace] = {"prompts": len(examples), "seconds": time.perf_counter() - started}
        return report

    def respond(self, system: System, example: TaskExample, max_new_tokens: int) -> Response:
        """See `Responder.respond`: all questions are one batch of requests, each of which completes the context."""
        self._before_stock(system, [example])
        asks = [self._ask(system, example, q.text, max_new_tokens) for q in example.questions]
        return self._response(system, asks, self.engine.run(asks), None)

    def first_token(self, system: System, example: TaskExample, max_new_tokens: int, answer: bool) -> Response:
        """See `Responder.first_token`. From handing the token ids to vLLM to its first token."""
        self._before_stock(system, [example])
        first = self._ask(system, example, example.questions[0].text, max_new_tokens if answer else 1)
        gc.collect()
        [timed] = self.engine.run([first])
        rest = []
        if answer:
            rest = [self._ask(system, example, q.text, max_new_tokens) for q in example.questions[1:]]
        answers = [timed, *self.engine.run(rest)]
        response = self._response(system, [first, *rest], answers, timed.ttft)
        return response if answer else Response(timed.ttft, response.receipts)

    def closed_loop(
        self, system: System, examples: Sequence[TaskExample], clients: int, max_new_tokens: int
    ) -> tuple[list[dict[str, Any]], float]:
        """See `Responder.closed_loop`. vLLM batches continuously: a client's next request joins as its last one ends,
        so requests stand in the order in which they ended."""
        asks = [self._ask(system, e, e.questions[0].text, max_new_tokens) for e in examples]
        self.engine.run(asks[:clients])  # warm-up, not counted
        self._before_stock(system, examples)
        started = time.perf_counter()
        answers = self.engine.run(asks, clients)
        seconds = time.perf_counter() - started
        requests = [
            load_record(
                example,
                self.backend.decode(a.token_ids),
                self._receipt(system, ask, a),
                len(a.token_ids),
                a.ttft,
                a.times[-1] - started,
            )
            for example, ask, a in zip(examples, asks, answers, strict=True)
        ]
        return sorted(requests, key=lambda r: r["finished_seconds"]), seconds

    def _before_stock(self, system: System, examples: Sequence[TaskExample]) -> None:
        """A prefix cache keeps whatever it has seen: only the previous turns may be in it when a request comes."""
        if isinstance(system, Vanilla) and system.prefix_caching:
            self.engine.reset()
            self._serve_previous(system, examples)

    def _serve_previous(self, system: System, examples: Sequence[TaskExample]) -> None:
        self.engine.run([self._request(system, self.backend.prompt(e.previous), 1) for e in examples])

    def _ask(self, system: System, example: TaskExample, question: str, max_new_tokens: int) -> Ask:
        return self._request(system, self.backend.prompt(example.segments, question), max_new_tokens)

    def _request(self, system: System, prompt: Prompt, max_new_tokens: int) -> Ask:
        if isinstance(system, Vanilla):
            return Ask(prompt.token_ids, max_new_tokens, None, self.stop, system.prefix_caching)
        prompt = system.transform(prompt)
        marks = annotations_of(prompt, namespace=_namespace(system), **annotated_as(system))
        return Ask(prompt.token_ids, max_new_tokens, marks, self.stop)

    def _response(self, system: System, asks: list[Ask], answers: list[Answer], seconds: float | None) -> Response:
        receipts = [self._receipt(system, ask, answer) for ask, answer in zip(asks, answers, strict=True)]
        texts = [self.backend.decode(a.token_ids) for a in answers]
        return Response(seconds, receipts, texts)

    def _receipt(self, system: System, ask: Ask, answer: Answer) -> dict[str, Any]:
        """The connector's receipt; for vLLM by itself one made of what its prefix cache held."""
        if answer.receipt is not None:
            return answer.receipt
        if not isinstance(system, Vanilla):
            raise PolicyError(f"{system.name}: vLLM answered a marked request without a receipt")
        rows, cached = len(ask.token_ids), answer.prefix_cached
        receipt = Receipt(system.name, rows, cached).computed([rows - cached] * self.backend.num_layers)
        return receipt.as_dict() | {"tokens_prefix_cached": cached, "measured": True}


def _namespace(system: System) -> str:
    """Chunks with layer inputs at other layers are other chunks."""
    layers = "" if isinstance(system, Vanilla) else "-".join(map(str, sorted(system.probe_layers)))
    return f"{system.name}@{layers}" if layers else system.name


def annotated_as(policy: ReusePolicy) -> dict[str, Any]:
    """The marks that ask for `policy`; PolicyError when name, share and selection layer do not say it all."""
    rule, marks = policy.correction, {"policy": policy.name}
    if rule.selection_layer is not None:
        marks["layer"] = rule.selection_layer
    if policy_of(policy.name, None, marks.get("layer")).correction == rule:
        return marks
    if rule.total_ratio is not None:
        marks["recompute_ratio"] = round(rule.total_ratio, 9)
    if policy_of(**_named(marks)).correction != rule:
        raise PolicyError(f"{policy.name}: a request cannot ask for the correction {rule}")
    return marks


def _named(marks: dict[str, Any]) -> dict[str, Any]:
    return {"name": marks["policy"]} | {k: v for k, v in marks.items() if k != "policy"}
