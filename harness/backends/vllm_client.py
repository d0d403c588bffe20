"""A vLLM engine in this process as a client: requests join and leave its running batch."""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.vllm.options import receipt_in
from harness.backends.client import Client, Request, Result, at_once, before

Progress = Sequence[Result | None]
_REST_S = 0.0005  # poll interval while no request runs


class _Batch:
    """Requests in flight in an engine; an exception in its context aborts them."""

    def __init__(self, client: "VllmClient", requests: Sequence[Request]) -> None:
        self.client, self.requests, self.engine = client, requests, client.llm.llm_engine
        self.results: list[Result | None] = [None] * len(requests)
        self.running: dict[str, int] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.engine.abort_request(list(self.running))

    def send(self, at: int) -> bool:
        """Start request `at`; returns whether vLLM accepted it."""
        request, name = self.requests[at], self.client.new_name()
        self.results[at] = Result(request.id, time.perf_counter(), labels=dict(request.labels))
        if taken := self.client._add(name, request, self.results[at]):
            self.running[name] = at
        return taken

    def step(self) -> list[int]:
        """One step of the engine; returns the requests that ended."""
        ended = []
        for output in self.engine.step():
            at = self.running[output.request_id]
            self.client._note(self.results[at], output, self.requests[at])
            if output.finished:
                del self.running[output.request_id]
                ended.append(at)
        return ended


class VllmClient(Client):
    """Requests to an open engine; closing the client stops the engine.

    Parameters
    ----------
    llm : vllm.LLM
    tokenizer : transformers tokenizer, optional
        With it results have texts, and prompts and stops may be texts.
    """

    def __init__(self, llm: Any, tokenizer: Any = None) -> None:
        self.llm, self.tokenizer, self._sent = llm, tokenizer, 0

    def new_name(self) -> str:
        """A request name that this client has not used."""
        name, self._sent = f"{self._sent}", self._sent + 1
        return name

    def run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """See `Client.run`. vLLM batches continuously: a client's next request joins as its last one ends."""
        step, batch = at_once(requests, clients), _Batch(self, requests)

        def send(at: int) -> None:
            """Start request `at`, or the next accepted one of the same client."""
            while at < len(requests) and not batch.send(at):
                at += step

        with batch:
            for client in range(step):
                send(client)
            while batch.running:
                for at in batch.step():
                    send(at + step)
        return batch.results

    def run_open(self, requests: Sequence[Request], due: Callable[[Progress], Iterable[int]]) -> list[Result]:
        """An open loop: requests are sent when due, independent of earlier ones.

        `due` is called before every step of the engine with the results so far (None for requests not sent); it returns
        the numbers of the requests to send now, each once. A request may fall due during a step.
        """
        batch = _Batch(self, requests)
        with batch:
            while batch.running or None in batch.results:
                for at in due(batch.results):
                    batch.send(at)
                if batch.running:
                    batch.step()
                else:
                    time.sleep(_REST_S)
        return batch.results

    def _add(self, name: str, request: Request, result: Result) -> bool:
        """Add a request; returns whether vLLM accepted it, otherwise its result has the failure."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        texts = bool(request.stop) or isinstance(request.prompt, str)
        if texts and self.tokenizer is None:
            result.fail("the engine has no tokenizer: give the prompt and its stops as token ids")
        else:
            prompt = request.sent_prompt
            content: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            if request.salt is not None:
                content["cache_salt"] = request.salt
            try:
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=request.max_tokens,
                    stop=list(request.stop),
                    stop_token_ids=sorted(request.stop_ids),
                    ignore_eos=request.ignore_eos,
                    detokenize=bool(request.stop),
                    skip_reading_prefix_cache=not request.read_prefix_cache,
                    extra_args=None if request.params is None else {"kv_transfer_params": dict(request.params)},
                )
                self.llm.llm_engine.add_request(name, content, params)
            except (VLLMValidationError, ValueError) as refused:
                result.fail(f"vLLM refuses the request: {refused}")
        result.finished = time.perf_counter()
        return not result.failure

    def _note(self, result: Result, output: Any, request: Request) -> None:
        done, now = output.outputs[0], time.perf_counter()
        result.token_times += [now] * (len(done.token_ids) - len(result.token_times))
        if not output.finished:
            return
        result.finished, result.tokens = now, len(result.token_times)
        result.token_ids = list(done.token_ids)
        result.end(done.finish_reason, done.stop_reason, request.stop_ids)
        if done.finish_reason not in ("stop", "length"):
            result.fail(f"vLLM ended the request with {done.finish_reason!r}")
        if self.tokenizer is not None:
            result.text = before(self.tokenizer.decode(result.token_ids, skip_special_tokens=True), request.stop)
        result.prompt_tokens, result.cached_tokens = len(output.prompt_token_ids), output.num_cached_tokens or 0
        result.receipt = receipt_in(output.kv_transfer_params)

    def reset(self) -> None:
        """Drop all cached KV: shared blocks and chunks."""
        if not self.llm.reset_prefix_cache(reset_connector=True):
            raise ConfigError("vLLM did not reset its caches: requests are still running")

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self.llm is None:
            return
        from cacheslide.vllm.offline import close_engine

        close_engine(self.llm)
        self.llm = None
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
