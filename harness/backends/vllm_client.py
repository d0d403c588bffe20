"""A vLLM engine in this process as a client: requests join and leave its running batch."""

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

from cacheslide.errors import ConfigError
from cacheslide.vllm.options import receipt_in
from harness.backends.client import Client, Request, Result, at_once, before


class VllmClient(Client):
    """Requests to an open engine; closing the client stops the engine.

    Parameters
    ----------
    llm : vllm.LLM
    tokenizer : transformers tokenizer, optional
        Results have texts with it, and requests may have prompts and stops of text.
    """

    def __init__(self, llm: Any, tokenizer: Any = None) -> None:
        self.llm, self.tokenizer, self._sent = llm, tokenizer, 0

    def run(self, requests: Sequence[Request], clients: int | None = None) -> list[Result]:
        """See `Client.run`. vLLM batches continuously: a client's next request joins as its last one ends."""
        step, engine = at_once(requests, clients), self.llm.llm_engine
        results: list[Result | None] = [None] * len(requests)
        running: dict[str, int] = {}

        def send(at: int) -> None:
            """Start request `at`, or the first one behind it of the same client that is not refused."""
            while at < len(requests):
                name, self._sent = f"{self._sent}", self._sent + 1
                results[at] = Result(requests[at].id, time.perf_counter(), labels=dict(requests[at].labels))
                if self._add(name, requests[at], results[at]):
                    running[name] = at
                    return
                at += step

        try:
            for client in range(step):
                send(client)
            while running:
                for output in engine.step():
                    at = running[output.request_id]
                    self._note(results[at], output, requests[at])
                    if output.finished:
                        del running[output.request_id]
                        send(at + step)
        except BaseException:
            engine.abort_request(list(running))
            raise
        return results

    def _add(self, name: str, request: Request, result: Result) -> bool:
        """Whether vLLM takes the request; why not is the result's failure."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        texts = bool(request.stop) or isinstance(request.prompt, str)
        if texts and self.tokenizer is None:
            result.fail("the engine has no tokenizer: give the prompt and its stops as token ids")
        else:
            prompt = request.sent_prompt
            asked: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            if request.salt is not None:
                asked["cache_salt"] = request.salt
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
                self.llm.llm_engine.add_request(name, asked, params)
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
        """Forget all cached KV: shared blocks and chunks."""
        if not self.llm.reset_prefix_cache(reset_connector=True):
            raise ConfigError("vLLM did not reset its caches: requests are still running")

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        if self.llm is None:
            return
        from cacheslide.vllm.offline import close_engine

        close_engine(self.llm)
        self.llm = None
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
