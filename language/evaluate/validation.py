"""Accuracy of choices by likelihood: the classes of the data's own rows, or while training questions of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from language.data.module import InstructionDataModule
from language.data.sources import SplitName
from language.data.splits import subset
from language.evaluate.likelihood import likeliest, score_tokens
from language.evaluate.prompts import PromptEncoder, TokenQuestion, ended
from language.evaluate.questions import COMMONSENSE
from language.evaluate.settings import EvalSettings, as_trained
from language.evaluate.tasks import read_questions
from language.generate import prompt_rows
from language.loss import IGNORED
from language.means import Means
from language.models import context_length
from lit_adapters.errors import DataError


def choice_questions(data: InstructionDataModule, split: SplitName) -> tuple[list[TokenQuestion], list[int]]:
    """Rows of classification data as questions in the tokens of training, each with all classes to choose from.

    A choice is the class and what ends an answer in training, so that no class is the beginning of another.

    Args:
        data: Data of format classification.
        split: The split whose rows are asked.

    Returns:
        The questions, and the index of each right class in `data.classes`.

    Raises:
        DataError: The data are not classification data, a class is longer than an answer may be, or a row has a class
            that no training row has.
    """
    choices = class_tokens(data, split)
    questions, answers = [], []
    for example in data.examples(split):
        questions.append(TokenQuestion(data.encoder.prompt(example), choices))
        answers.append(data.classes.index(example.response))
    return questions, answers


def class_tokens(data: InstructionDataModule, split: SplitName) -> list[list[int]]:
    """The tokens of each of the data's classes as an answer, with its end, in the order of `data.classes`.

    Args:
        data: Data of format classification.
        split: The split whose rows are asked.

    Raises:
        DataError: As `choice_questions`.
    """
    classes, encoder, examples = data.classes, data.encoder, data.examples(split)
    for example in examples:
        if example.response not in classes:
            raise DataError(f"{example.origin}: class {example.response!r} occurs in no training row")
    before = examples[0].stretches[-1]  # all prompts end alike
    ending = data.renderer.ending(data.records(split)[0])
    answers = [data.renderer.control.guard(name) + ending for name in classes]
    tokens = encoder.stretches.after(answers, [before] * len(classes))
    choices = [ended(ids, encoder.end_id) for ids in tokens]
    longest = max(map(len, choices))
    if longest > encoder.max_answer_length:
        raise DataError(
            f"a class has {longest} tokens, more than the {encoder.max_answer_length} kept for an answer: set "
            f"max_answer_length to {longest}"
        )
    return choices


class ChoiceValidation(Callback):
    """Logs `val/TASK_accuracy` with each validation: how often the right choice has the highest log-likelihood.

    Questions are read before training begins. Each process asks its share of them.

    With the task "classification", tests log `test/classification_accuracy` over all test rows, and what `test_step`
    returns gets the value of each row, 1 or 0, under the name `classification_accuracy`.

    Args:
        task: "classification" asks the data module's own validation and test rows; else "mmlu" or a common-sense task,
            see `language.evaluate`, whose test questions are then no longer unseen where a checkpoint is chosen by
            them.
        root: Folder of the data of the other tasks.
        limit: Questions of a validation: of each subject for MMLU, of the task otherwise; chosen by seed, all if None.
        shots: Examples in an MMLU prompt.
        batch_size: Prompts in a pass; in tests at most a batch of the data.
        seed: Seeds the choice.

    Raises:
        DataError: `root` is missing; later, data are missing or bad (file and line), or rows of a test are packed or
            learn their prompts, so that a row does not say which class was to be chosen.
    """

    def __init__(
        self,
        task: str = "classification",
        root: str | None = None,
        limit: int | None = 100,
        shots: int = 0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if task not in (known := ("classification", "mmlu", *COMMONSENSE)):
            raise DataError(f"task {task!r} has no choices to validate: use one of {', '.join(known)}")
        if task != "classification" and root is None:
            raise DataError(f"task {task!r} needs root, the folder of its data")
        self.task, self.root, self.limit, self.shots = task, root, limit, shots
        self.batch_size, self.seed = batch_size, seed
        self.means = Means("accuracy")
        self.questions: list[TokenQuestion] = []
        self.answers: list[int] = []
        self.choices: list[list[int]] = []  # of test rows

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the questions."""
        self._read(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask this process's share, and log the accuracy over all."""
        if trainer.sanity_checking:  # a few batches to see that validation runs; its values are not kept
            return
        if not self.questions:
            self._read(trainer, pl_module)
        mine = slice(trainer.global_rank, None, trainer.world_size)
        self._ask(trainer, pl_module, self.questions[mine], self.answers[mine], f"val/{self.task}")
        self._log_accuracy(pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the classes."""
        if self.task != "classification":
            return
        data = self._data(trainer)
        if data.packing == "packed" or not data.encoder.mask_prompt:
            raise DataError(
                "ChoiceValidation asks for the class of each test row: set data.packing to buckets or none, and "
                "data.mask_prompt to true, or leave the callback out"
            )
        self.choices = class_tokens(data, "test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ask the rows of a batch, and add the result of each to what `test_step` returned."""
        if self.task != "classification":
            return
        questions = [TokenQuestion(prompt, self.choices) for prompt in prompt_rows(batch)]
        answers = [self._class_of(row[row != IGNORED].tolist(), pl_module.tokenizer) for row in batch["labels"]]
        right = self._ask(trainer, pl_module, questions, answers, f"test/{self.task}")
        if isinstance(outputs, dict):
            outputs[f"{self.task}_accuracy"] = right

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy over all rows."""
        if self.task == "classification":
            self._log_accuracy(pl_module, "test")

    def _class_of(self, tokens: list[int], tokenizer: Any) -> int:
        if tokens not in self.choices:
            raise DataError(
                f"a test row learns {tokenizer.decode(tokens)!r}, which is none of the {len(self.choices)} classes as "
                "answers: leave ChoiceValidation out, or correct the chat template, which writes the answer otherwise"
            )
        return self.choices.index(tokens)

    def _ask(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        questions: list[TokenQuestion],
        answers: list[int],
        description: str,
    ) -> torch.Tensor:
        """1 where the right choice is the likeliest, else 0, float32 (questions,); counted for the mean."""
        model: Any = pl_module.model
        with trainer.precision_plugin.forward_context():
            scores = score_tokens(model, questions, self.batch_size, description)
        right = [likeliest(row) == answer for row, answer in zip(scores, answers, strict=True)]
        values = torch.tensor(right, dtype=torch.float32, device=pl_module.device)
        self.means.to(pl_module.device)
        self.means.update({"accuracy": values})
        return values

    def _log_accuracy(self, pl_module: LightningModule, split: str) -> None:
        accuracy = self.means.compute()["accuracy"]
        self.means.reset()
        pl_module.log(f"{split}/{self.task}_accuracy", accuracy, prog_bar=split == "val")

    def _data(self, trainer: Trainer) -> InstructionDataModule:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, InstructionDataModule):
            raise DataError("ChoiceValidation of classification asks the rows of an InstructionDataModule: use one")
        return data

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        if self.task == "classification":
            pairs = list(zip(*choice_questions(self._data(trainer), "val"), strict=True))
            chosen = subset(pairs, self.limit, "questions", self.task, self.seed)
            questions, answers = [q for q, _ in chosen], [a for _, a in chosen]
        else:
            assert self.root is not None
            data: Any = getattr(trainer, "datamodule", None)
            meaning = data.meaning() if isinstance(data, InstructionDataModule) else {}
            given = EvalSettings(shots=self.shots, per_subject=self.limit, limit=self.limit, seed=self.seed)
            settings = as_trained(given, meaning)
            asked = read_questions(self.task, pl_module.tokenizer, Path(self.root), settings, meaning)
            encoder = PromptEncoder(pl_module.tokenizer, context_length(model))
            questions = [encoder.question(q.prompt, q.choices) for q in asked]
            answers = [q.right for q in asked]
        self.questions, self.answers = questions, answers
