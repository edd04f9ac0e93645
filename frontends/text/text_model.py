"""`TextModel`: generation from text over a serving session, in this process, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ...runtime.serving.sequence import Request
from ...runtime.serving.session import Session
from ..options import GenerateKeywords, GenerateOptions, keywords_of
from ..speculate import SpeculationReport
from .completion import Completion, StopStringChecker, TextEvent
from .prompts import prompts_of, token_ids_of
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

    @property
    def asked_tokens(self) -> int | None:
        """The max_tokens_per_sequence that was asked for, where it is known: the model may have
        been made for less."""
        return None

    @property
    def speculation(self) -> SpeculationReport | None:
        """What speculation did until now; None for a model that drafts no tokens."""
        return SpeculationReport.of(self.session)

    def logits(self, token_ids: Iterable[int]) -> NDArray[np.float32]:
        """The logits float32 [T, vocab] after each of T tokens of one sequence."""
        return self.session.logits(self._fitting(token_ids_of(token_ids, "token_ids"), "token_ids"))

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

        A prompt is text or token ids: a list, an array or tensor, or what a tokenizer of
        transformers returns. The other keywords are the fields of GenerateOptions. One Completion
        for one prompt, a list for a list (or for rows of ids), with `stream` an iterator of
        TextEvent. ValueError for a prompt that cannot be served (empty, unknown ids, too long),
        TypeError for what is no prompt: none is served then.

        A sequence that ends by an error (broken logits, a cache without room, a step or a device
        that failed) does not raise: its `finish_reason` is "error", and `message` says why. Calls
        after the failure of a device raise SessionEndedError.
        """
        chosen = GenerateOptions(**options)
        if not isinstance(stream, bool):
            raise TypeError(f"stream: expected True or False, found {stream!r:.80}")
        if chosen.logprobs > self.session.meta.vocab_size:
            raise ValueError(
                f"logprobs: expected 0 to {self.session.meta.vocab_size}, found {chosen.logprobs}"
            )
        given, single = prompts_of(prompts)
        rows = [self._fitting(self._ids(prompt), "prompts") for prompt in given]
        if chosen.stop_strings and self.tokenizer is None:
            raise ValueError("stop: strings need a tokenizer, and this model has none")
        run = _Run(self, rows, chosen)
        if stream:
            return run.events()
        for _ in run.events():
            pass
        completions = [run.completion(i) for i in range(len(rows))]
        return completions[0] if single else completions

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and this model has none: give ids")
        return self.tokenizer.encode(prompt)

    def _fitting(self, ids: list[int], name: str) -> list[int]:
        """`ids`; ValueError for more than a sequence may have."""
        limit, asked = self.session.meta.max_tokens_per_sequence, self.asked_tokens
        if len(ids) > limit:
            whose = f"max_tokens_per_sequence = {limit}"
            if asked is not None and asked > limit:
                whose = f"{limit}, to which the model lowers max_tokens_per_sequence = {asked}"
            raise ValueError(f"{name}: expected at most {whose} tokens, found {len(ids)}")
        return ids


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
                stats = None if reason is None else event.sequence.stats
                yield TextEvent(i, text, event.token, event.logprob, reason, event.message, stats)

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
