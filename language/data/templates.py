"""From records to text: plain prompt templates, or the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from language.data.control import ControlTokens, unguarded
from language.data.formats import FORMATS, FormatName, Record, check_template
from language.data.messages import Message
from lit_adapters.errors import DataError

_PROBE = "a7f3c1"


class Piece(NamedTuple):
    """A stretch of a record's text, guarded as `language.data.control` says.

    Attributes:
        text: The text.
        is_answer: Whether it is an answer to be learned.
        masked: Whether it is an answer that the data say not to learn; it is not learned with prompts either.
    """

    text: str
    is_answer: bool
    masked: bool = False


class _RewrittenError(Exception):
    """A template writes a message differently once the conversation goes on."""

    def __init__(self, message: int) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class Example:
    """One row as evaluation sees it.

    Attributes:
        prompt: All that the model reads before it answers; of a conversation, everything before the last answer.
        response: What it should answer.
        origin: File and line.
        body: The part of the prompt that may lose its beginning where the prompt is too long, guarded as
            `language.data.control` says; "" for none.
        stretches: The prompt as training tokenises it, guarded; by default the prompt in one stretch.
    """

    prompt: str
    response: str
    origin: str
    body: str = ""
    stretches: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Beside:
    """What a chat template gets beside role and content of the messages; see `Record`."""

    origin: str
    more: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)


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
        self.control = ControlTokens(tokenizer, end_token)
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
        """Prompt and answer of a record, for evaluation; of a conversation, the last answer that is learned."""
        guarded = self._guarded(record)
        stretches: tuple[str, ...]
        if not self.chat:
            stretches, response = (self._prompt(guarded),), guarded.answer
        else:
            messages, places = self._messages(guarded), self._answers(guarded)
            last = max(i for i, learned in places.items() if learned)
            beside = self._beside(guarded, messages)
            prompt = self._render(messages[:last], beside, generate=True)
            try:
                turns = self._turns(messages, [i for i in places if i < last], beside)
                done = "".join(text for turn in turns for text in turn)
                if not prompt.startswith(done):
                    raise _RewrittenError(last)
                stretches = (*(text for turn in turns for text in turn), prompt[len(done) :])
            except _RewrittenError:  # no row of training looks like this one
                stretches = (prompt,)
            response = messages[last][1]
            if not response.strip():  # it calls a tool
                response = self._render(messages[: last + 1], beside)[len(prompt) :]
        return Example(unguarded("".join(stretches)), unguarded(response), record.origin, self.body(record), stretches)

    def pieces(self, record: Record) -> list[Piece]:
        """The record's text in order, answers learned and all else not; the text of the end token included.

        Raises:
            DataError: The chat template refuses the conversation, drops its system message, or rewrites earlier
                turns when later ones follow.
        """
        guarded = self._guarded(record)
        if not self.chat:
            return [Piece(self._prompt(guarded), False), Piece(guarded.answer, True)]
        places, messages = self._answers(guarded), self._messages(guarded)
        try:
            turns = self._turns(messages, list(places), self._beside(guarded, messages))
        except _RewrittenError as error:
            raise DataError(
                f"{record.origin}: the chat template writes message {error.message} differently once the conversation "
                "goes on, so its tokens cannot be told apart: use another chat_template, or conversations of one turn"
            ) from None
        pieces: list[Piece] = []
        for (prompt, answer), learned in zip(turns, places.values(), strict=True):
            pieces += [Piece(prompt, False), Piece(answer, learned, masked=not learned)]
        return pieces

    def ending(self, record: Record) -> str:
        """What the chat template writes after the last answer of a record; "" without a chat template.

        Raises:
            DataError: As `pieces`.
        """
        if not self.chat:
            return ""
        answer, text = self._messages(self._guarded(record))[-1][1], self.pieces(record)[-1].text
        return text.removeprefix(answer) if text.startswith(answer) else ""

    def _turns(self, messages: tuple[Message, ...], places: list[int], beside: _Beside) -> list[tuple[str, str]]:
        """What stands before each answer since the last one, and the answer.

        Raises:
            _RewrittenError: The template writes a message differently once the conversation goes on.
        """
        turns: list[tuple[str, str]] = []
        done = ""
        for i in places:
            before = self._render(messages[:i], beside, generate=True)
            through = self._render(messages[: i + 1], beside)
            if not before.startswith(done) or not through.startswith(before):
                raise _RewrittenError(i + 1)
            answer = through[len(before) :]
            if self.end_token and self.end_token in answer:  # what follows, a line break mostly, is the next turn's
                answer = answer[: answer.rindex(self.end_token) + len(self.end_token)]
            turns.append((before[len(done) :], answer))
            done = before + answer
        return turns

    def _answers(self, record: Record) -> dict[int, bool]:
        """The places of the assistant's messages as they are rendered, and whether each is learned."""
        messages = self._messages(record)
        shift = len(record.messages) - len(messages) if record.messages else 0  # the system message in the user's
        return {i: i + shift not in record.unlearned for i, (role, _) in enumerate(messages) if role == "assistant"}

    def _guarded(self, record: Record) -> Record:
        return self.control.guarded(record, answer=record.answer)

    def body(self, record: Record) -> str:
        """The field that may be shortened, guarded; "" for none."""
        return self.control.guard(record.fields.get(self.form.body, "")) if self.form else ""

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
            with_system = self._render((("system", _PROBE), user), _Beside("probe"))
        except DataError:
            return False
        return _PROBE in with_system and with_system != self._render((user,), _Beside("probe"))

    def _beside(self, record: Record, messages: tuple[Message, ...]) -> _Beside:
        """What the chat template gets beside role and content.

        Raises:
            DataError: The template does not write a function that the conversation describes or calls.
        """
        shift = len(record.messages) - len(messages) if record.messages else 0  # the system message in the user's
        beside = _Beside(record.origin, {i - shift: more for i, more in record.more.items()}, list(record.tools))
        calls = [call for more in record.more.values() for call in more.get("tool_calls", ())]
        names = [tool["function"]["name"] for tool in (*record.tools, *calls)]
        if names:
            text = self._render(messages, beside)
            if missing := [name for name in names if name not in text]:
                raise DataError(
                    f"{record.origin}: the chat template of tokenizer {self.tokenizer.name_or_path!r} does not write "
                    f"the function {missing[0]!r}: give a chat_template for tools, or remove them"
                )
        return beside

    def _render(self, messages: tuple[Message, ...], beside: _Beside, generate: bool = False) -> str:
        from jinja2 import TemplateError

        turns = [{"role": r, "content": content, **beside.more.get(i, {})} for i, (r, content) in enumerate(messages)]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=beside.tools or None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # what an expression of the template raises, beside jinja's own
            reason = f"{error}" if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"{beside.origin}: the chat template refuses the conversation ({reason[:300]}); correct it"
            ) from error
