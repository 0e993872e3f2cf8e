"""MMLU (arXiv 2009.03300) from files: 57 subjects in four categories, asked with k-shot prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from language.data.control import ControlTokens
from language.data.rows import Row, clean, shown
from language.data.sources import read_dev_rows, read_rows
from language.data.splits import subset
from language.evaluate.prompts import Prompt
from language.evaluate.questions import Question, field_of
from language.evaluate.settings import DEFAULTS, EvalSettings
from lit_adapters.errors import DataError

LETTERS = "ABCD"
CATEGORIES = ("STEM", "Humanities", "Social Sciences", "Other")
# As in categories.py of github.com/hendrycks/test, for files whose rows do not name their category.
_SUBJECTS = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
    "Humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "Social Sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "Other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
_CATEGORY = {subject: category for category, names in _SUBJECTS.items() for subject in names.split()}


def read_mmlu(root: str | Path, tokenizer: Any, settings: EvalSettings = DEFAULTS) -> list[Question]:
    """Questions of the test split, each after the first dev questions of its subject with their answers.

    Args:
        root: Folder with `dev` and `test` files (jsonl, json or parquet), whose rows have `subject`,
            `question`, four `choices`, `answer` (0-3) and perhaps `category`.
        tokenizer: Text that spells one of its control tokens stays text.
        settings: `shots`, `per_subject` and `seed` count.

    Returns:
        Questions by subject, in the file's order; `group` is the subject and `category` one of the four. The
        continuations are " A" to " D".

    Raises:
        DataError: A row is bad (file and line), or a subject has too few dev questions or two categories.
    """
    shots = settings.shots
    guard = ControlTokens(tokenizer, tokenizer.eos_token).guard
    tests = _by_subject(read_rows(str(root), "test"))
    examples = _by_subject(read_dev_rows(str(root))) if shots else {}
    questions = []
    for subject, rows in tests.items():
        shown = examples.get(subject, [])[:shots]
        if len(shown) < shots:
            raise DataError(f"{root} has {len(shown)} dev questions of {subject!r}, not the {shots} of shots={shots}")
        if len({_category(row, subject) for row in rows}) > 1:
            raise DataError(f"{root}: questions of subject {subject!r} name two categories; correct the rows")
        topic = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        head += "".join(f"{_text(row)} {LETTERS[_answer(row)]}\n\n" for row in shown)
        questions += [
            Question(
                prompt=Prompt((guard(head + _text(row)),)),
                answer=f" {LETTERS[_answer(row)]}",
                choices=tuple(f" {letter}" for letter in LETTERS),
                group=subject,
                category=_category(row, subject),
            )
            for row in subset(rows, settings.per_subject, "questions", subject, settings.seed)
        ]
    return questions


def _by_subject(rows: list[Row]) -> dict[str, list[Row]]:
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subject = field_of(row, "subject", str)
        if not subject or subject != subject.strip():
            raise DataError(f"{row.origin}: subject {subject!r} is empty or has white space around it; correct the row")
        subjects.setdefault(subject, []).append(row)
    return subjects


def _text(row: Row) -> str:
    choices = field_of(row, "choices", list)
    if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{row.origin}: choices must be {len(LETTERS)} texts, got {shown(choices)}; correct the row")
    for choice in choices:
        clean(choice, f"{row.origin}: field 'choices'")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([field_of(row, "question", str).strip(), *lines, "Answer:"])


def _answer(row: Row) -> int:
    answer = field_of(row, "answer", int)
    if not 0 <= answer < len(LETTERS):
        raise DataError(f"{row.origin}: answer {answer} must be 0 to {len(LETTERS) - 1}; correct the row")
    return answer


def _category(row: Row, subject: str) -> str:
    named = row.values.get("category", _CATEGORY.get(subject))
    for category in CATEGORIES:
        if str(named).lower() == category.lower():
            return category
    raise DataError(
        f"{row.origin}: category {named!r} of subject {subject!r} is unknown; put one of "
        f"{', '.join(CATEGORIES)} into the row's field 'category'"
    )
