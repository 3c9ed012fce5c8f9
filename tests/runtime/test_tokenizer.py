"""Text as it streams: the same as decoding everything at once, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from echo_rl.errors import RequestError
from echo_rl.runtime.tokenizer import TextStream, Tokenizer

BYTES = range(256)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(fast, None, {})


def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: words begin with a mark, rare characters are bytes, a text's first space is
    dropped."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in BYTES), "▁", "a", "b", ".", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    fast = FastTokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>", byte_fallback=True
        )
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(fast, None, {})


KINDS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
TEXTS = st.text(st.sampled_from("ab. é答🙂\n"), max_size=80)


def streamed(tokenizer: Tokenizer, tokens: tuple[int, ...], *stops: str) -> str:
    stream = TextStream(tokenizer, stops)
    text = ""
    for token in tokens:
        new, stopped = stream.push(token)
        text += new
        if stopped:
            break
    return text + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_streamed_text_is_the_text_of_all_tokens(kind, text):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text)
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.sampled_from(BYTES), max_size=80))
def test_bytes_that_are_no_text_stream_as_they_decode(tokens):
    tokenizer = KINDS["byte_level"]
    assert streamed(tokenizer, tuple(tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, stops=st.lists(st.text(st.sampled_from("ab. é答\n"), min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first(kind, text, stops):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text)
    grown = [tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    stopped = next((part for part in grown if any(stop in part for stop in stops)), None)
    expected = grown[-1] if stopped is None else stopped[: min(stopped.index(s) for s in stops if s in stopped)]
    assert streamed(tokenizer, tokens, *stops) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_tokens_spell_the_text_byte_by_byte(kind, text):
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text)
    spelled = b"".join(map(tokenizer.token_bytes, tokens))
    assert spelled.decode().removeprefix(" " if kind == "sentencepiece" else "") == tokenizer.decode(tokens)


def test_no_two_tokens_of_a_vocabulary_spell_the_same():
    spelled = [KINDS["byte_level"].token_bytes(token) for token in BYTES]
    assert len(set(spelled)) == len(BYTES) and all(len(byte) == 1 for byte in spelled)
    tokenizer = KINDS["sentencepiece"]
    assert [tokenizer.token_bytes(i) for i in (0, 1 + 0xE2, 258, 261)] == [b"<unk>", b"\xe2", b"a", b" a"]


def test_a_special_token_spells_its_name():
    tokenizer = byte_level()
    tokenizer._fast.add_special_tokens(["<|end|>"])
    assert tokenizer.token_bytes(256) == b"<|end|>" and tokenizer.decode((256,)) == ""


@pytest.mark.parametrize(("text", "stop", "before"), [("hello\n答 b", "\n答", "hello"), ("a END€ b", " END€", "a")])
def test_stop_strings_hold_back_what_precedes_an_unfinished_character(text, stop, before):
    tokenizer = KINDS["byte_level"]
    assert streamed(tokenizer, tokenizer.encode(text), stop) == before


def test_special_tokens_around_a_plain_prompt_come_where_they_are_asked_for():
    """Llama's tokenizer has them; a conversation's template writes its own."""
    tokenizer = byte_level()
    first = tokenizer._fast.get_vocab_size()
    tokenizer._fast.add_special_tokens(["<s>"])
    tokenizer._fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    assert tokenizer.encode("hi", special=True) == (first, *tokenizer.encode("hi"))
    tokenizer._source, tokenizer._special = "{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == tokenizer.encode("hi", special=True)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="UTF-8"):
        KINDS["byte_level"].encode("caf\udce9")


def test_the_first_stop_string_in_the_text_counts():
    fast = FastTokenizer(models.WordLevel({'").': 0}, unk_token='").'))
    assert streamed(Tokenizer(fast, None, {}), (0,), ".", ")") == '"'
