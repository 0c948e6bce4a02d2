"""A vLLM server as the engine: it writes the responses, and takes over the policy's weights before it does.

The server is started by the user, on accelerators of its own or on this machine's CPU; docs/ppo.md has the commands.
Weights go through a folder that both sides see, and the server is told to load it: that asks for no network between
accelerators and none of our code in the server. Tokens come and go as ids, never as text.

Known with vLLM 0.32: `/v1/completions` with `return_token_ids`, and, in its development mode, `/collective_rpc` with
the workers' own `reload_weights`, and `/reset_prefix_cache`.
"""

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from align.ppo.batches import Sample
from align.ppo.config import PPOConfig
from align.ppo.model import merged_weights
from conf.entry import UserError
from evals.generate import end_tokens

_SHOWN = 300  # characters of what a server says
_MOST_SEED = 2**63 - 1
_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs (docs/ppo.md)"


class VLLMSampler:
    """Responses of a vLLM server, with its log-probabilities of their tokens.

    A response depends on its prompt, its seed, the weights and, by rounding, on what else the server computes.

    Args:
        policy: causal language model, or a PEFT model of one.
        tokenizer: the policy's.
        args: `vllm_url` and its other settings, temperature and lengths.
        accelerator: of the trainer; every process asks for its own responses, the first one hands over the weights.
        around: a context in which the policy's weights are whole.

    Raises:
        UserError: when the server cannot be reached, or its context is too short.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        args: PPOConfig,
        accelerator: Any,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        assert args.vllm_url is not None
        self._policy, self._args, self._accelerator = policy, args, accelerator
        self._around = around
        self._folder = Path(args.vllm_sync_dir or args.output_dir)
        self._ends = end_tokens(policy, tokenizer)
        self._url = args.vllm_url.rstrip("/").removesuffix("/v1")
        most = args.generation_batch_size
        self._client = httpx.Client(
            timeout=args.vllm_timeout, limits=httpx.Limits(max_connections=most)
        )
        self._pool = ThreadPoolExecutor(most)
        try:
            self._model = self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> str:
        """The name of the server's model, if its context is long enough."""
        about = self._answer("GET", "/v1/models")
        try:
            model = next(one for one in about["data"] if one.get("parent") is None)
            name, context = str(model["id"]), int(model["max_model_len"])
        except (LookupError, StopIteration, TypeError, ValueError) as error:
            raise self._rubbish("/v1/models names no model with a max_model_len") from error
        args = self._args
        if args.max_prompt_length + args.max_new_tokens > context:
            raise UserError(
                f"{self._shown} sees {context} tokens, and ppo.args.max_prompt_length={args.max_prompt_length} with "
                f"ppo.args.max_new_tokens={args.max_new_tokens} may need more: start it with a larger --max-model-len, "
                "or lower them"
            )
        return name

    def sync(self) -> None:
        """Write the policy into a folder, and let the server load it and forget what it computed with the old one."""
        with self._around():  # all processes: gathering weights is done together
            if self._accelerator.is_main_process:
                self._hand_over()
        self._accelerator.wait_for_everyone()

    def _hand_over(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = self._policy
        if hasattr(whole, "peft_config"):
            whole = whole.get_base_model()
        with tempfile.TemporaryDirectory(prefix="weights-", dir=self._folder) as folder:
            # In the layout of the hub, which is what a server reads.
            whole.save_pretrained(folder, state_dict=merged_weights(self._policy))
            path = str(Path(folder).resolve())
            order = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            self._answer("POST", "/collective_rpc", order)
        self._answer("POST", "/reset_prefix_cache", {})

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """A response to each prompt, `generation_batch_size` of them asked for at a time."""
        waiting = [
            self._pool.submit(self._sampled, *asked) for asked in zip(prompts, seeds, strict=True)
        ]
        try:
            return [one.result() for one in waiting]
        except BaseException:
            for one in waiting:
                one.cancel()
            raise

    def _sampled(self, prompt: list[int], seed: int) -> Sample:
        # What is not said here is filled in from the model's generation_config.json.
        args = self._args
        asked = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": args.max_new_tokens,
            "seed": seed & _MOST_SEED,
            "temperature": args.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,  # these end it and no other:
            "stop_token_ids": self._ends,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
        }
        reply = self._answer("POST", "/v1/completions", asked)
        try:
            choice = reply["choices"][0]
            response = [int(token) for token in choice["token_ids"]]
            logp = [
                math.nan if value is None else float(value)
                for value in choice["logprobs"]["token_logprobs"]
            ]
            finish, seen = choice["finish_reason"], choice["prompt_token_ids"]
        except (LookupError, TypeError, ValueError) as error:
            raise self._rubbish("a completion without token ids or log-probabilities") from error
        if seen != prompt:
            raise self._rubbish(f"it read {len(seen)} prompt tokens, others than the {len(prompt)}")
        if len(logp) != len(response):
            raise self._rubbish(f"{len(logp)} log-probabilities for {len(response)} tokens")
        is_ended = finish == "stop" and bool(response) and response[-1] in self._ends
        if not is_ended and (finish != "length" or len(response) != args.max_new_tokens):
            raise UserError(
                f"{self._shown} stopped after {len(response)} of ppo.args.max_new_tokens={args.max_new_tokens} tokens "
                f"with finish_reason {finish!r}, and not at an end token of the policy: start it with a larger "
                f"--max-model-len (the prompt has {len(prompt)} tokens), and leave its other limits out"
            )
        return Sample(prompt, response, is_ended, logp)

    def close(self) -> None:
        """Close the connections; the server stays as it is."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _answer(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object of a reply.

        Raises:
            UserError: when there is none.
        """
        try:
            reply = self._client.request(method, self._url + path, json=body)
        except httpx.TimeoutException as error:
            raise UserError(
                f"{self._shown} did not answer {path} within ppo.args.vllm_timeout={self._args.vllm_timeout:g} seconds"
            ) from error
        except httpx.HTTPError as error:
            raise UserError(
                f"{self._shown} cannot be reached ({type(error).__name__}: {error}); start it and wait until it is "
                f"ready: {_START}"
            ) from error
        try:
            found = reply.json()
        except ValueError:
            found = None
        if reply.status_code == 200 and isinstance(found, dict):
            return found
        reason = f"{path} answered {reply.status_code}: {' '.join(reply.text.split())[:_SHOWN]}"
        if reply.status_code == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
            reason += f"; it takes no weights: start it as {_START}"
        elif path == "/collective_rpc":
            reason += (
                f"; it could not load weights from {self._folder.resolve()}: it must hold the same model, and see this "
                "folder under the same path (ppo.args.vllm_sync_dir). Its log has more; it may have to be restarted"
            )
        raise UserError(f"{self._shown}: {reason}")

    def _rubbish(self, why: str) -> UserError:
        return UserError(f"{self._shown} does not answer as vLLM 0.32 does: {why}")

    @property
    def _shown(self) -> str:
        """The address without a password in it."""
        return "the vLLM server at " + re.sub(r"//[^/@]*@", "//", self._url)
