"""lm-eval's Hugging Face backend, which asks the model only what it has not answered yet."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from evals.progress import Answers
from evals.scoring import Scorer


class Backend(HFLM):  # type: ignore[misc]  # lm-eval is untyped here
    """Batches, truncation and log-likelihoods are lm-eval's own; what is answered is kept batch by batch.

    lm-eval sorts requests before it forms batches. What was answered before a kill is therefore the head of that order,
    and the rest falls into the batches that it would have been in.
    """

    def __init__(self, answers: Answers, tokens: int | None = None, **options: Any) -> None:
        """Args:
        answers: what is known already.
        tokens: read at once when log-likelihoods are computed from common prefixes; None: by lm-eval's batches.
        options: lm-eval's own.
        """
        super().__init__(**options)
        self._scorer = None if tokens is None else Scorer(self.model, tokens)
        if self._scorer is not None:
            # Else lm-eval tokenises a context anew for each of its continuations.
            self.tok_encode = functools.lru_cache(maxsize=16)(super().tok_encode)
        self.chats: dict[str, Any] = {}  # prompt → the messages that it was rendered from
        self._answers = answers
        self.set_cache_hook(_Hook(answers))
        if answers.count:
            print(f"continuing: {answers.count} answers are there", file=sys.stderr)

    def apply_chat_template(self, chat_history: Any, *args: Any, **kwargs: Any) -> str:
        """The prompt of a conversation, remembered with its messages."""
        text = str(super().apply_chat_template(chat_history, *args, **kwargs))
        self.chats[text] = chat_history
        return text

    def loglikelihood(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation."""
        if self._scorer is not None:  # asks what is not known itself, see `_by_prefix`
            return list(super().loglikelihood(requests, **kwargs))
        answers = self._answered("loglikelihood", requests, super().loglikelihood, kwargs)
        return [(likelihood, is_greedy) for likelihood, is_greedy in answers]

    def generate_until(self, requests: list[Any], **kwargs: Any) -> list[str]:
        """The text that follows each prompt."""
        return self._answered("generate_until", requests, super().generate_until, kwargs)

    def _answered(
        self, kind: str, requests: list[Any], ask: Callable[..., list[Any]], kwargs: dict[str, Any]
    ) -> list[Any]:
        known = [self._answers.take([kind, *request.args]) for request in requests]
        unknown = [
            request for request, answer in zip(requests, known, strict=True) if answer is None
        ]
        new = iter(ask(unknown, **kwargs) if unknown else [])
        self._answers.commit()
        return [next(new) if answer is None else answer for answer in known]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As lm-eval's. The windows of long texts come here a batch at a time, and without their text."""
        if not requests or requests[0][0] is not None:
            if self._scorer is not None:
                return self._by_prefix(self._scorer, requests)
            return list(super()._loglikelihood_tokens(requests, **kwargs))
        found = self._answers.take(["windows", requests])
        if found is None:
            found = super()._loglikelihood_tokens(requests, **kwargs)
            self._answers.add(["windows", requests], found)
            self._answers.commit()
        return [(likelihood, is_greedy) for likelihood, is_greedy in found]

    def _by_prefix(self, scorer: Scorer, requests: list[Any]) -> list[tuple[float, bool]]:
        """The answers to tokenised requests, common prefixes read once; in the batches of an unbroken run."""
        keys = [["loglikelihood", *text] for text, _, _ in requests]
        answers = [self._answers.take(key) for key in keys]
        known = {number for number, answer in enumerate(answers) if answer is not None}
        # As lm-eval cuts what is too long: from the left, and the last token is not read.
        cut = sum(len(c) + len(e) > self.max_length + 1 for _, c, e in requests)
        if cut:
            print(
                f"{cut} of {len(requests)} requests are longer than the {self.max_length} tokens that the model reads: "
                "cut from the left",
                file=sys.stderr,
            )
        prompts = [
            (context + continuation)[-(self.max_length + 1) : -len(continuation)]
            for _, context, continuation in requests
        ]
        for found in scorer.batches(prompts, [[each] for _, _, each in requests], known):
            for number, scored in found.items():
                answers[number] = (scored.sum, scored.is_greedy)
                self._answers.add(keys[number], answers[number])
            self._answers.commit()
        return [(likelihood, is_greedy) for likelihood, is_greedy in answers]

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self._answers.commit()  # a batch begins: the one before is answered
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._answers.commit()
        return super()._model_generate(*args, **kwargs)


class _Hook:
    """Where lm-eval reports each answer as it is found."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def add_partial(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        # Texts are kept by their windows. Sampled answers are drawn anew, all of them: half of them would leave the
        # random numbers of the rest at another point.
        if kind == "loglikelihood" or (kind == "generate_until" and not is_sampled(request[1])):
            self._answers.add([kind, *request], answer)


def is_sampled(gen_kwargs: dict[str, Any]) -> bool:
    """Whether generation draws random numbers; decided as lm-eval's `normalize_gen_kwargs` does."""
    do_sample = gen_kwargs.get("do_sample")
    return bool(gen_kwargs.get("temperature", 0.0) if do_sample is None else do_sample)
