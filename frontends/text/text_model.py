"""`TextModel`: generation from text over a serving session, in this process, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ...runtime.serving.sequence import Request
from ...runtime.serving.session import Session
from ..options import GenerateKeywords, GenerateOptions, keywords_of
from .completion import Completion, StopStringChecker, TextEvent
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(eq=False)
class TextModel:
    """A causal language model, serving in this process.

    Threads may share it: what they ask at once is computed in the same steps, and each gets what it
    would get alone. `session` submits, steps and cancels sequences, and has statistics.
    """

    session: Session
    tokenizer: Tokenizer | None
    stop_tokens: Iterable[int]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the program's memory; the model is unusable afterwards."""
        self.session.close()

    def logits(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """The logits float32 [T, vocab] after each of T tokens of one sequence."""
        return self.session.logits(token_ids)

    @overload
    # A text is one prompt, though a str is an Iterable[str] too.
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompts: Prompt,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateKeywords],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateKeywords],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        stream: Literal[True],
        **options: Unpack[GenerateKeywords],
    ) -> Iterator[TextEvent]: ...
    @keywords_of(GenerateOptions)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        stream: bool = False,
        **options: Unpack[GenerateKeywords],
    ) -> Completion | list[Completion] | Iterator[TextEvent]:
        """Continue one prompt or several together.

        A prompt is text or token ids. The other keywords are the fields of GenerateOptions. One
        Completion for one prompt, a list for a list, with `stream` an iterator of TextEvent.
        ValueError for a prompt that cannot be served (empty, unknown ids, too long): none is then.
        """
        chosen = GenerateOptions(**options)
        given: Any = prompts if isinstance(prompts, str) else list(prompts)
        single = _is_prompt(given)
        rows = [self._ids(p) for p in ([given] if single else given)]
        if chosen.stop_strings and self.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer, and this model has none")
        run = _Run(self, rows, chosen)
        if stream:
            return run.events()
        for _ in run.events():
            pass
        completions = [run.completion(i) for i in range(len(rows))]
        return completions[0] if single else completions

    def _ids(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and this model has none: give ids")
        return self.tokenizer.encode(prompt)


def _is_prompt(prompts: Any) -> bool:
    """Whether this is one prompt: text, or a list of numbers. An empty list is no prompts."""
    if isinstance(prompts, str):
        return True
    return bool(prompts) and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0


class _Run:
    """One call of generate: its sequences and their stop-string checkers."""

    def __init__(
        self,
        model: TextModel,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions,
    ) -> None:
        self._session = model.session
        tokenizer = model.tokenizer
        stops = {*model.stop_tokens, *options.stop_tokens}
        if tokenizer is not None:
            ids = map(tokenizer.special_id, options.stop_strings)
            stops |= {id_ for id_ in ids if id_ is not None}
        request = Request(options.max_new_tokens, options.sampling, stops, options.logprobs)
        self._sequences = self._session.requests(prompts, request)
        self._checkers = [StopStringChecker(tokenizer, options.stop_strings) for _ in prompts]
        self._index = {sequence.id: i for i, sequence in enumerate(self._sequences)}

    def events(self) -> Iterator[TextEvent]:
        """The events of every prompt as they come; closing the iterator cancels what is left."""
        # Closed by name: some versions of Python drop what a closed generator iterates over late.
        with closing(self._session.events(self._sequences)) as events:
            for event in events:
                i = self._index[event.sequence.id]
                checker = self._checkers[i]
                if checker.stopped:
                    continue  # the cancellation that a stop string brought
                text = checker.push(event.token) if event.token is not None else ""
                reason = event.finish_reason
                if checker.stopped:
                    reason = "stop"
                    self._session.cancel(event.sequence)
                elif reason is not None:
                    text += checker.finish()
                    reason = "stop" if checker.stopped else reason
                yield TextEvent(i, text, event.token, event.logprob, reason, event.message)

    def completion(self, i: int) -> Completion:
        """The completion of prompt number `i`, after all events."""
        sequence, checker = self._sequences[i], self._checkers[i]
        assert sequence.finish_reason is not None
        return Completion(
            text=checker.text,
            tokens=sequence.tokens,
            finish_reason="stop" if checker.stopped else sequence.finish_reason,
            logprobs=tuple(sequence.logprobs),
            stats=sequence.stats,
            top_logprobs=tuple(sequence.top_logprobs),
            message=sequence.message,
        )
