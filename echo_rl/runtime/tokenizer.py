"""Turns text into ids and back, and renders the chat template. Knows nothing about the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from echo_rl.errors import RequestError, WeightsError
from echo_rl.runtime.models.documents import Document, read_document, read_text


class Tokenizer:
    """The tokenizer of a Hugging Face folder (`tokenizer.json`), without importing `transformers`."""

    def __init__(self, fast: FastTokenizer, template: object, special: dict[str, str]) -> None:
        """`template` is the chat template as the folder has it: read only when a conversation comes."""
        self._fast = fast
        self._special = special
        self._source = template

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises `WeightsError` if `tokenizer.json` is missing, or a file is damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise WeightsError(f"{folder} has no tokenizer.json; save the fast tokenizer of the model there")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as e:  # the tokenizers package raises bare Exception
            raise WeightsError(f"{path} is damaged ({e}); download the model again") from e
        config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_document(config_path) if config_path.is_file() else Document(str(config_path), {})
        template = read_text(template_path) if template_path.is_file() else config.values.get("chat_template")
        special = {key: _special(config, key) for key in ("bos_token", "eos_token") if config.values.get(key)}
        return cls(fast, template, special)

    def encode(self, text: str, special: bool = False) -> tuple[int, ...]:
        """Ids; if `special`, with the special tokens that plain prompts of the model have, such as a first one.

        Raises `RequestError` for text that UTF-8 can't hold.
        """
        try:
            return tuple(self._fast.encode(text, add_special_tokens=special).ids)
        except (UnicodeEncodeError, TypeError) as e:
            raise RequestError("the text is not valid Unicode; send it encoded as UTF-8") from e

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; an unfinished character shows as U+FFFD."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token by itself: also a part of a character, or a special token's name."""
        once, twice = (str(self._fast.decode([token] * n, skip_special_tokens=False)) for n in (1, 2))
        text = twice[len(once) :]  # some decoders drop the space that begins a text
        if UNFINISHED not in text:
            return text.encode()
        piece = self._fast.id_to_token(token) or ""
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return bytes(map(BYTE_LEVEL.__getitem__, piece)) if BYTE_LEVEL.keys() >= set(piece) else text.encode()

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Prompt ids of a conversation, ending where the assistant answers. Raises `RequestError`."""
        template = self._template
        try:
            text = template.render(messages=list(messages), add_generation_prompt=True, **self._special)
        except (TemplateError, KeyError, TypeError) as e:
            raise RequestError(f"the chat template refuses these messages: {e}") from e
        return self.encode(text)

    @cached_property
    def _template(self) -> Template:
        if not self._source:
            raise RequestError("this model has no chat template; send a plain prompt instead")
        if not isinstance(self._source, str):
            raise RequestError(
                "this model's chat_template is not one text; save the one to use as chat_template.jinja in its folder"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self._source)
        except TemplateError as e:
            raise RequestError(
                f"this model's chat template is damaged ({e.message}); send a plain prompt instead"
            ) from e


def _special(config: Document, key: str) -> str:
    token = config.values[key]
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise config.refusal(key, "a token's text")
    return text


def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


def _refuse(message: str) -> None:
    raise TemplateError(message)


SETTLE = 16
"""Tokens after which text that ends in a whole character is settled."""

UNFINISHED = "\ufffd"
"""The text that an unfinished character shows as."""


class TextStream:
    """Turns tokens into text as they come: holds back unfinished characters and possible stop strings.

    Only the newest tokens are decoded, behind a few settled ones: some decoders drop the space that begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._recent: list[int] = []  # the settled tokens decoded again, then those not settled
        self._settled = 0  # how many of `_recent` are settled
        self._known = 0  # length of what these decode to by themselves
        self._settled_text = ""  # of all settled tokens
        self._sent = 0
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Returns (text that became certain, whether a stop string ended the output)."""
        self._recent.append(token)
        text = self._text()
        found = [at for at in (text.find(stop, self._sent) for stop in self._stops) if at >= 0]
        if found:
            self._stopped = True
            return self._send(text[: min(found)]), True
        return self._send(text[: len(text) - self._held_back(text)]), False

    def flush(self) -> str:
        """The text that was held back, once the output has ended; nothing after a stop string."""
        return "" if self._stopped else self._send(self._text())

    def _text(self) -> str:
        tail = self._tokenizer.decode(self._recent)[self._known :]
        text = self._settled_text + tail
        if len(self._recent) - self._settled >= SETTLE and tail and not tail.endswith(UNFINISHED):
            self._recent = self._recent[self._settled :]
            self._settled, self._settled_text = len(self._recent), text
            self._known = len(self._tokenizer.decode(self._recent))
        return text

    def _held_back(self, text: str) -> int:
        whole = text.rstrip(UNFINISHED)
        return len(text) - len(whole) + max((_overlap(whole, stop) for stop in self._stops), default=0)

    def _send(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
