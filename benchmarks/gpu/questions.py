"""What is asked, in the order of its worth."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """One thing to find out, in a process of its own.

    Attributes:
        name: Its name in the records and for `--questions`.
        function: "module:function"; takes a `Setting` and yields records.
        share: The most of the whole time that it may take.
    """

    name: str
    function: str
    share: float


QUESTIONS = (
    Question("rational errors", "benchmarks.gpu.rational_errors:errors", 0.2),
    Question("rational speed", "benchmarks.gpu.rational_speed:speed", 0.25),
    Question("steps of the LLaMA", "benchmarks.gpu.steps:llama", 0.3),
    Question("whole fine-tuning", "benchmarks.gpu.fine_tuning:fits", 0.3),
    Question("steps of the ViT", "benchmarks.gpu.steps:vit", 0.2),
    Question("generation", "benchmarks.gpu.generation:generation", 0.3),
)
