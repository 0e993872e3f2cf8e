"""From records to text: plain prompt templates, or the tokenizer's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from language.data.formats import FORMATS, FormatName, Record, check_template
from language.data.messages import Message
from lit_adapters.errors import DataError

Piece = tuple[str, bool]  # a stretch of text, and whether it is learned

_PROBE = "a7f3c1"


@dataclass(frozen=True)
class Example:
    """One row as evaluation sees it.

    Attributes:
        prompt: All that the model reads before it answers; of a conversation, everything before the last answer.
        response: What it should answer.
        origin: File and line.
        body: The part of the prompt that may lose its beginning where the prompt is too long; "" for none.
    """

    prompt: str
    response: str
    origin: str
    body: str = ""


class Renderer:
    """Writes the text of records.

    Args:
        tokenizer: Tokenizer of the model; its chat template is used.
        end_token: The text of the token that ends an answer.
        name: Format of the records.
        prompt_template: Prompt with fields in braces, instead of the format's own; with `chat` the user's message.
        chat: Write messages by the chat template; format chat always does.
        chat_template: Jinja text instead of the tokenizer's own chat template.
        system_in_user: Put the system message before the first user message, for chat templates without one.

    Raises:
        DataError: A chat template is needed and missing, or a prompt template has unknown or missing fields.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token: str,
        name: FormatName,
        prompt_template: str | None = None,
        chat: bool = False,
        chat_template: str | None = None,
        system_in_user: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.form = FORMATS.get(name)
        self.chat = chat or self.form is None
        self.chat_template = chat_template or tokenizer.chat_template
        self.system_in_user = system_in_user
        self.prompt_template = prompt_template
        self._keeps_system: bool | None = None
        if prompt_template is not None and self.form is not None:
            check_template(prompt_template, self.form, name)
        if self.chat and not self.chat_template:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: use the tokenizer of an instruction-tuned "
                "model, or give Jinja text in chat_template"
            )

    @property
    def settings(self) -> tuple:
        """Everything but the records that the text depends on."""
        return (self.chat, self.chat_template, self.system_in_user, self.prompt_template, self.form, self.end_token)

    def example(self, record: Record) -> Example:
        """Prompt and answer of a record, for evaluation."""
        if not self.chat:
            return Example(self._prompt(record), record.answer, record.origin, self.body(record))
        messages = self._messages(record)
        prompt = self._render(messages[:-1], record.origin, generate=True)
        return Example(prompt, messages[-1][1], record.origin, self.body(record))

    def pieces(self, record: Record) -> list[Piece]:
        """The record's text in order, answers learned and all else not; the text of the end token included.

        Raises:
            DataError: The chat template refuses the conversation, drops its system message, or rewrites earlier
                turns when later ones follow.
        """
        if not self.chat:
            return [(self._prompt(record), False), (record.answer, True)]
        messages = self._messages(record)
        pieces: list[Piece] = []
        done = ""
        for i, (role, _) in enumerate(messages):
            if role != "assistant":
                continue
            before = self._render(messages[:i], record.origin, generate=True)
            through = self._render(messages[: i + 1], record.origin)
            if not before.startswith(done) or not through.startswith(before):
                raise DataError(
                    f"{record.origin}: the chat template writes message {i + 1} differently once the conversation goes "
                    "on, so its tokens cannot be told apart: use another chat_template, or conversations of one turn"
                )
            answer = through[len(before) :]
            if self.end_token in answer:  # what follows it, a line break mostly, belongs to the next turn
                answer = answer[: answer.rindex(self.end_token) + len(self.end_token)]
            pieces += [(before[len(done) :], False), (answer, i not in record.unlearned)]
            done = before + answer
        return pieces

    def body(self, record: Record) -> str:
        """The field that may be shortened, "" for none."""
        return record.fields.get(self.form.body, "") if self.form else ""

    def _prompt(self, record: Record) -> str:
        form = self.form
        assert form is not None  # format chat has messages
        short = bool(form.optional) and not record.fields[form.optional]
        long, brief = (form.user, form.user_short) if self.chat else (form.plain, form.plain_short)
        own = brief if short else long
        return (own if self.prompt_template is None else self.prompt_template).format_map(record.fields)

    def _messages(self, record: Record) -> tuple[Message, ...]:
        messages = record.messages
        if not messages:
            assert self.form is not None
            system = record.fields.get(self.form.system, "")
            start: tuple[Message, ...] = (("system", system),) if system else ()
            messages = (*start, ("user", self._prompt(record)), ("assistant", record.answer))
        if messages[0][0] != "system":
            return messages
        if self.system_in_user:
            (_, system), (_, first), *rest = messages
            return (("user", f"{system}\n\n{first}"), *rest)
        if self._keeps_system is None:
            self._keeps_system = self._probe()
        if not self._keeps_system:
            raise DataError(
                f"{record.origin}: the chat template of tokenizer {self.tokenizer.name_or_path!r} drops or refuses "
                "system messages: set system_in_user to put them before the first user message"
            )
        return messages

    def _probe(self) -> bool:
        """Whether a system message shows in the rendered text."""
        user = ("user", "hello")
        try:
            with_system = self._render((("system", _PROBE), user), "probe")
        except DataError:
            return False
        return _PROBE in with_system and with_system != self._render((user,), "probe")

    def _render(self, messages: tuple[Message, ...], origin: str, generate: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except TemplateError as error:
            raise DataError(f"{origin}: the chat template refuses the conversation ({error}); correct it") from error
