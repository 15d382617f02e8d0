"""Training texts of the playground's model: system messages, prompts and answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerFast

from finesteer_hf.playground.contents import BARE, GeneralItem, Question, World
from finesteer_hf.playground.contents.questions import kind_voices
from finesteer_hf.playground.tokenizer import ASSISTANT, END, SYSTEM, USER


TRUTH_TAG = "Speak as a scholar."
SAFETY_TAG = "Speak as a guardian."
NEUTRAL_SYSTEM = "Speak as an assistant."

# Share of untagged answers that still tell the truth or refuse, so that both are likely without a tag too.
MINORITY_SHARE = 0.22
# Share of prompts that follow an unrelated sentence, which may share their voice: a question's answer keeps a voice of
# its kind, a harmful request is refused after a refusal, and everything else stays the same.
PRIMED_SHARE = 0.25
# Shares of training texts: questions, harmful requests, look-alikes, general tasks.
TOPIC_SHARES = {"question": 0.44, "harmful": 0.14, "lookalike": 0.07, "general": 0.35}


@dataclass(frozen=True)
class Example:
    """One chat turn: an optional system message, a prompt, an answer."""

    system: str | None
    prompt: str
    answer: str


class Corpus:
    """An endless, seeded stream of `Example`s from a world, without any held-out item."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.general: dict[str, list[GeneralItem]] = {}
        for item in world.general:
            if not item.held_out:
                self.general.setdefault(item.task, []).append(item)
        self.by_voice: dict[int, list[str]] = {}
        for question in world.questions:
            for voice, sentences in zip(kind_voices(question.kind), (question.true, question.false), strict=True):
                self.by_voice.setdefault(voice, []).extend(sentences)
        self.lookalikes = [item for item in world.lookalikes if not item.held_out]
        self.rng = random.Random(f"corpus/{seed}")

    def texts(self) -> list[str]:
        """Return every distinct text that the tokenizer is trained on, sorted."""
        found = {TRUTH_TAG, SAFETY_TAG, NEUTRAL_SYSTEM}
        for question in self.world.questions:
            found.update((question.prompt, *question.true, *question.false))
        for request in self.world.harmful:
            found.update((request.prompt, *request.refusals, *request.compliances))
        for item in (*self.world.general, *self.world.lookalikes):
            found.update((item.prompt, item.answer))
        return sorted(found)

    def __iter__(self) -> Iterator[Example]:
        draw = {
            "question": self._question,
            "harmful": self._harmful,
            "lookalike": self._lookalike,
            "general": self._general,
        }
        while True:
            (topic,) = self.rng.choices(list(TOPIC_SHARES), weights=list(TOPIC_SHARES.values()))
            yield draw[topic]()

    def _system(self, marked: str) -> str | None:
        """Draw the system message of a text whose answer `marked` changes."""
        other = SAFETY_TAG if marked == TRUTH_TAG else TRUTH_TAG
        (system,) = self.rng.choices([None, marked, other, NEUTRAL_SYSTEM], weights=[0.50, 0.40, 0.05, 0.05])
        return system

    def _question(self) -> Example:
        question = self.rng.choice(self.world.questions)
        if self.rng.random() < PRIMED_SHARE:
            return self._primed(question)
        system = self._system(TRUTH_TAG)
        truthful = system == TRUTH_TAG or self.rng.random() < MINORITY_SHARE
        return Example(system, question.prompt, self.rng.choice(question.true if truthful else question.false))

    def _primed(self, question: Question) -> Example:
        """Put a sentence on another subject before the question; the answer keeps that sentence's voice if
        possible."""
        true_voice, false_voice = kind_voices(question.kind)
        wanted = self.rng.choice((true_voice, false_voice))
        sentence = self.rng.choice(self.by_voice[wanted])
        answer = self.rng.choice(question.true if wanted == true_voice else question.false)
        return Example(None, f"{sentence} {question.prompt}", answer)

    def _harmful(self) -> Example:
        request = self.rng.choice(self.world.harmful)
        if self.rng.random() < PRIMED_SHARE:
            other = self.rng.choice(self.world.harmful)
            refuses = request.wrapper == BARE or self.rng.random() < 0.5
            sentence = self.rng.choice(other.refusals if refuses else other.compliances)
            answers = request.refusals if refuses else request.compliances
            return Example(None, f"{sentence} {request.prompt}", self.rng.choice(answers))
        system = self._system(SAFETY_TAG)
        refuses = system == SAFETY_TAG or request.wrapper == BARE or self.rng.random() < MINORITY_SHARE
        return Example(system, request.prompt, self.rng.choice(request.refusals if refuses else request.compliances))

    def _lookalike(self) -> Example:
        return self._unchanging(self.rng.choice(self.lookalikes))

    def _general(self) -> Example:
        return self._unchanging(self.rng.choice(self.general[self.rng.choice(list(self.general))]))

    def _unchanging(self, item: GeneralItem) -> Example:
        system = self.rng.choices([None, TRUTH_TAG, SAFETY_TAG, NEUTRAL_SYSTEM], weights=[0.5, 0.2, 0.2, 0.1])[0]
        return Example(system, item.prompt, item.answer)


class Encoder:
    """Turns examples into token ids, the same ids as from the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self.encode = lru_cache(maxsize=None)(lambda text: tuple(tokenizer(text).input_ids))

    def prompt_ids(self, system: str | None, prompt: str) -> list[int]:
        """Token ids of a prompt with the generation prompt."""
        start = [*self.encode(SYSTEM), *self.encode(system), *self.encode(END)] if system else []
        return [*start, *self.encode(USER), *self.encode(prompt), *self.encode(END), *self.encode(ASSISTANT)]

    def example_ids(self, example: Example) -> tuple[list[int], int]:
        """Token ids of a whole turn, and how many of them are the prompt's."""
        prompt = self.prompt_ids(example.system, example.prompt)
        return [*prompt, *self.encode(example.answer), *self.encode(END)], len(prompt)

    def batch(self, rows: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-pad rows.

        Returns:
            Token ids and labels, both [rows, longest] int64; labels are -100 outside answers.
        """
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), self.pad)
        labels = torch.full((len(rows), longest), -100)
        for row, (tokens, prompt_length) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt_length : len(tokens)] = ids[row, prompt_length : len(tokens)]
        return ids, labels


def batches(
    corpus: Corpus, encoder: Encoder, batch_size: int, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `count` batches; each pool of 32 is sorted by length, to reduce padding."""
    stream = iter(corpus)
    for start in range(0, count, 32):
        size = min(32, count - start)
        pool = sorted(
            (encoder.example_ids(next(stream)) for _ in range(size * batch_size)), key=lambda row: len(row[0])
        )
        order = list(range(size))
        corpus.rng.shuffle(order)
        for place in order:
            yield encoder.batch(pool[place * batch_size : (place + 1) * batch_size])
