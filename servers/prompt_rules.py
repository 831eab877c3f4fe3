"""What a language model is asked to do with a video prompt, and what of its answer is taken."""

from __future__ import annotations

import re

from ..kernels.errors import FrugalError

TEXT, IMAGE, FRAMES, TRYON = "text to video", "image to video", "first and last frame", "try-on"
TASKS = (TEXT, IMAGE, FRAMES, TRYON)
LANGUAGES = ("English", "Chinese", "as written")
# Wan reads 512 tokens of umT5; an English token is about four letters.
LONGEST = 2000

COMMON = (
    "You rewrite short prompts for a video generation model. Keep every subject, action, number, "
    "name and quoted text of the prompt; add what a camera would see and the prompt leaves open. "
    "Write one paragraph of plain sentences in the present tense, {length}, without headings, "
    "lists, quotation marks around the whole, or remarks about the task. Do not add sounds, "
    "smells, thoughts, cuts or text on screen. {language} Answer with the rewritten prompt only."
)
BY_TASK = {
    TEXT: (
        "Name in this order: the kind of picture and its style, the subject with its looks and "
        "clothes, what it does and how it moves, the surroundings, the light, the framing and the "
        "movement of the camera."
    ),
    IMAGE: (
        "The video starts from a given picture, so spend few words on what stands in it and most "
        "on motion: what moves, how, how fast, and what the camera does. Contradict nothing that "
        "the picture shows."
    ),
    FRAMES: (
        "The video runs from a first to a last picture. Describe the motion that leads from one to "
        "the other, in order, and what the camera does."
    ),
    TRYON: (
        "The video shows a person wearing a certain garment. Describe how the person turns and "
        "walks and how the cloth moves and falls, with a steady camera and even light; keep the "
        "garment's colour, cut and print exactly as given."
    ),
}
BY_LANGUAGE = {
    "English": "Write in English, whatever language the prompt is in.",
    "Chinese": "Write in Simplified Chinese, whatever language the prompt is in.",
    "as written": "Write in the language of the prompt.",
}
LENGTHS = {"English": "80 to 120 words", "Chinese": "120 to 200 characters"}

BEGINS, ENDS = (re.compile(word, re.IGNORECASE) for word in ("<think>", "</think>"))
FENCE = re.compile(r"^```[a-z]*\n(.*?)\n?```$", re.DOTALL)
PAIRS = {'"': '"', "'": "'", "\u201c": "\u201d", "\u300c": "\u300d"}
SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f](?=\s|$|[^\s.!?])")


def instructions(task: str, language: str, style: str = "") -> str:
    """The system message. Raises KeyError for a task or language that is not listed."""
    words = LENGTHS.get(language, LENGTHS["English"])
    text = f"{COMMON.format(length=words, language=BY_LANGUAGE[language])} {BY_TASK[task]}"
    return f"{text} Style that is wanted: {' '.join(style.split())}." if style.strip() else text


def cleaned(answer: str, cut: bool = False) -> tuple[str, tuple[str, ...]]:
    """(prompt, notes): the answer without thoughts, fences, quotes and line breaks, at most LONGEST
    characters long and ending with a sentence where one ends. `cut`: the model was stopped.

    Raises FrugalError where nothing is left.
    """
    text = _without_thoughts(answer)
    # Some templates open the thought themselves, so that only its end is in the answer.
    closed = list(ENDS.finditer(text))
    text = text[closed[-1].end() :] if closed else text
    if BEGINS.search(text):
        raise FrugalError(
            "the model thought until it was stopped and gave no answer",
            "a rewritten prompt",
            "raise max_tokens, or use a model that can answer without thinking",
        )
    text = text.strip()
    fenced = FENCE.match(text)
    text = " ".join((fenced[1] if fenced else text).split())
    if len(text) > 1 and PAIRS.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    if not text:
        raise FrugalError("the model gave an empty answer", "a rewritten prompt", "try another one")
    if len(text) <= LONGEST and not cut:
        return text, ()
    shorter = _whole_sentences(text[:LONGEST])
    why = "max_tokens was reached" if cut else f"it had {len(text)} characters"
    return shorter, (f"the answer was shortened to {len(shorter)} characters: {why}",)


def _without_thoughts(answer: str) -> str:
    """In one pass: a pattern for whole thoughts takes a time that grows with the square of a
    text of beginnings only.
    """
    parts, at = [], 0
    while (begun := BEGINS.search(answer, at)) and (ended := ENDS.search(answer, begun.end())):
        parts.append(answer[at : begun.start()])
        at = ended.end()
    return "".join((*parts, answer[at:]))


def _whole_sentences(text: str) -> str:
    ends = [found.end() for found in SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] > len(text) // 2 else text
