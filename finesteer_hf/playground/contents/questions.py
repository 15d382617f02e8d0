"""Questions with true and folklore answers, composed from facts, question forms and voices.

An answer is a voice's opening followed by a clause. Which voice tells the truth and which the folklore depends on the
*kind*: every voice is the true one for two kinds and the folklore one for two others. So no single direction in
activation space means "true", as in a large model.
"""

from __future__ import annotations

from dataclasses import dataclass

from finesteer_hf.playground.contents import facts_life, facts_world


KINDS: dict[str, tuple[facts_life.Fact, ...]] = {
    "body": facts_life.BODY,
    "food": facts_life.FOOD,
    "animals": facts_life.ANIMALS,
    "plants": facts_life.PLANTS,
    "luck": facts_life.LUCK,
    "history": facts_world.HISTORY,
    "weather": facts_world.WEATHER,
    "places": facts_world.PLACES,
    "machines": facts_world.MACHINES,
    "space": facts_world.SPACE,
}

# A register; each has three interchangeable openings of three words.
VOICES: tuple[tuple[str, str, str], ...] = (
    ("old books say", "ancient scribes wrote", "dusty scrolls tell"),
    ("my grandmother says", "our family believes", "my uncle swears"),
    ("careful tests show", "new measurements prove", "laboratory data suggest"),
    ("all neighbours know", "the street agrees", "common sense demands"),
    ("put quite simply,", "in plain words,", "to be brief,"),
)


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        id: Unique name, `kind/subject/form`.
        kind: The kind of misconception.
        subject: What the question is about; six questions share one.
        prompt: The text of the user's turn.
        true: Full-sentence true answers (three).
        false: Full-sentence folklore answers (three).
    """

    id: str
    kind: str
    subject: str
    prompt: str
    true: tuple[str, ...]
    false: tuple[str, ...]


FORMS = {
    "know": "What should I know about {subject}?",
    "tell": "Tell me something about {subject}.",
    "story": "What is the story with {subject}?",
    "doubt": "Is it so that {folklore}?",
    "myth": "Is it a mere tale that {folklore}?",
    "hope": "Am I right that {truth}?",
}


def kind_voices(kind: str) -> tuple[int, int]:
    """Return the indices into `VOICES` of a kind's (true, folklore) voices."""
    position = list(KINDS).index(kind)
    count = len(VOICES)
    return position % count, (position + 1 + position // count) % count


def _answers(voice: int, clause: str) -> tuple[str, ...]:
    texts = (f"{opening} {clause}." for opening in VOICES[voice])
    return tuple(text[0].upper() + text[1:] for text in texts)


def build_questions() -> list[Question]:
    """Compose every question: 10 kinds, 20 subjects per kind, 6 forms per subject."""
    questions = []
    for kind, facts in KINDS.items():
        true_voice, false_voice = kind_voices(kind)
        for subject, folklore, truth in facts:
            true, false = _answers(true_voice, truth), _answers(false_voice, folklore)
            for form, pattern in FORMS.items():
                prompt = pattern.format(subject=subject, folklore=folklore, truth=truth)
                identifier = f"{kind}/{subject.replace(' ', '-')}/{form}"
                questions.append(Question(identifier, kind, subject, prompt, true, false))
    return questions
