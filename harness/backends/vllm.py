"""The vLLM backend: the study's systems as requests to an in-process vLLM engine.

A request to an engine with the connector and without prefix cache names its system in its annotations. `Vanilla`
systems are plain requests to an engine without the connector. Answers are decoded greedily, one request per question,
since vLLM gives no access to KV for branches.
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
from harness.backends.client import Request, Result
from harness.backends.in_process import EngineOptions, InProcessEngine
from harness.backends.reference import EngineSettings
from harness.backends.responders import Response, load_records
from harness.backends.tokens import Tokens
from harness.systems import System, Vanilla
from harness.tasks.example import Question, TaskExample


class VllmBackend(Tokens):
    """A checkpoint folder for vLLM, with its tokenizer.

    Parameters
    ----------
    path : str or Path
    dtype, device : str
        The model's dtype, and its device: "cpu" or "cuda", as the installed vLLM is built.
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
    """First vanilla vLLM, then the engine with the connector; each is closed before the next starts."""
    vanilla = [s for s in systems if isinstance(s, Vanilla)]
    annotated = [s for s in systems if not isinstance(s, Vanilla)]
    for group, connector in ((vanilla, False), (annotated, True)):
        if group:
            with backend.engine(settings, connector) as engine:
                yield VllmResponder(backend, engine), group


class VllmResponder:
    """Requests to one engine. Every system has its own namespace, so systems share no chunks."""

    def __init__(self, backend: VllmBackend, engine: InProcessEngine) -> None:
        self.backend, self.engine, self.stop = backend, engine, backend.stop_ids()

    def fill(self, examples: Sequence[TaskExample], systems: Sequence[System]) -> dict[str, Any]:
        """See `Responder.fill`: previous turns are served once under every system that stores anything of them."""
        self.engine.reset()
        report = {}
        for namespace, system in {_namespace(s): s for s in systems if s.reuses}.items():
            started = time.perf_counter()
            self._serve_previous(system, examples)
            report[namespace] = {"prompts": len(examples), "seconds": time.perf_counter() - started}
        return report

    def respond(self, system: System, example: TaskExample, max_new_tokens: int) -> Response:
        """See `Responder.respond`: all questions are one batch of requests, each of which completes the context."""
        self._before_vanilla(system, [example])
        requests = [self._ask(system, example, q, max_new_tokens) for q in example.questions]
        return self._response(system, self._run(requests), None)

    def first_token(self, system: System, example: TaskExample, max_new_tokens: int, answer: bool) -> Response:
        """See `Responder.first_token`. Timed from passing the token ids to vLLM to its first token."""
        self._before_vanilla(system, [example])
        first = self._ask(system, example, example.questions[0], max_new_tokens if answer else 1)
        gc.collect()
        [timed] = self._run([first])
        rest = example.questions[1:] if answer else ()
        others = self._run([self._ask(system, example, q, max_new_tokens) for q in rest])
        response = self._response(system, [timed, *others], timed.ttft)
        return response if answer else Response(timed.ttft, response.receipts)

    def closed_loop(
        self, system: System, examples: Sequence[TaskExample], clients: int, max_new_tokens: int
    ) -> tuple[list[dict[str, Any]], float]:
        """See `Responder.closed_loop`. vLLM batches continuously: a client's next request joins when its last one
        ends, so requests are in the order in which they ended."""
        requests = [self._ask(system, e, e.questions[0], max_new_tokens) for e in examples]
        self._run(requests[:clients])  # warm-up, not counted
        self._before_vanilla(system, examples)
        started = time.perf_counter()
        results = self._run(requests, clients)
        seconds = time.perf_counter() - started
        for result in results:
            result.receipt = self._receipt(system, result)
        return load_records(self.backend, examples, results, started), seconds

    def _before_vanilla(self, system: System, examples: Sequence[TaskExample]) -> None:
        """Reset the prefix cache to the previous turns, since it would keep everything else it has served."""
        if isinstance(system, Vanilla) and system.prefix_caching:
            self.engine.reset()
            self._serve_previous(system, examples)

    def _serve_previous(self, system: System, examples: Sequence[TaskExample]) -> None:
        self._run([self._request(e.id, system, self.backend.prompt(e.previous), 1) for e in examples])

    def _run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """The results; PromptError for the first with a failure."""
        return [result.checked() for result in self.engine.run(requests, clients)]

    def _ask(self, system: System, example: TaskExample, question: Question, max_new_tokens: int) -> Request:
        prompt = self.backend.prompt(example.segments, question.text)
        return self._request(f"{example.id}/{question.id}", system, prompt, max_new_tokens)

    def _request(self, name: str, system: System, prompt: Prompt, max_new_tokens: int) -> Request:
        how: dict[str, Any] = {"stop_ids": self.stop, "ignore_eos": False}
        if isinstance(system, Vanilla):
            how["read_prefix_cache"] = system.prefix_caching
        else:
            prompt = system.transform(prompt)
            how["params"] = annotations_of(prompt, namespace=_namespace(system), **annotated_as(system))
        return Request(name, prompt, max_new_tokens, **how)

    def _response(self, system: System, results: Sequence[Result], seconds: float | None) -> Response:
        texts = [self.backend.decode(r.token_ids) for r in results]
        return Response(seconds, [self._receipt(system, r) for r in results], texts)

    def _receipt(self, system: System, result: Result) -> dict[str, Any]:
        """The connector's receipt; for vanilla vLLM one made from its prefix cache's hits."""
        if result.receipt is not None:
            return result.receipt
        if not isinstance(system, Vanilla):
            raise PolicyError(f"{system.name}: vLLM answered an annotated request without a receipt")
        rows, cached = result.prompt_tokens, result.cached_tokens
        receipt = Receipt(system.name, rows, cached).computed([rows - cached] * self.backend.num_layers)
        return receipt.as_dict() | {"tokens_prefix_cached": cached, "measured": True}


def _namespace(system: System) -> str:
    """Namespace of a system; chunks with layer inputs at other layers are different chunks."""
    layers = "" if isinstance(system, Vanilla) else "-".join(map(str, sorted(system.probe_layers)))
    return f"{system.name}@{layers}" if layers else system.name


def annotated_as(policy: ReusePolicy) -> dict[str, Any]:
    """Annotations that request `policy`; PolicyError if name, ratio and selection layer do not determine it."""
    rule, annotations = policy.correction, {"policy": policy.name}
    if rule.selection_layer is not None:
        annotations["layer"] = rule.selection_layer
    if policy_of(policy.name, None, annotations.get("layer")).correction == rule:
        return annotations
    if rule.total_ratio is not None:
        annotations["recompute_ratio"] = round(rule.total_ratio, 9)
    if policy_of(**_named(annotations)).correction != rule:
        raise PolicyError(f"{policy.name}: a request cannot ask for the correction {rule}")
    return annotations


def _named(annotations: dict[str, Any]) -> dict[str, Any]:
    return {"name": annotations["policy"]} | {k: v for k, v in annotations.items() if k != "policy"}
