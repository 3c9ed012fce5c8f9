"""How answers look, without a server."""

from __future__ import annotations

from echo_rl.contracts import TokenLogprob
from echo_rl.server.api.openai_format import ChatFormat, TextFormat


def test_logprobs_name_special_tokens_and_parts_of_characters():
    """All of them decode to nothing, or to the same sign."""
    spelled = {0: b"<|end|>", 1: b"<|start|>", 2: b"\xe2", 3: b"\xc3\x28"}
    token = TokenLogprob(0, -0.25, ((0, -0.25), (1, -1.0), (2, -2.0), (3, float("-inf"))))
    text = TextFormat().logprobs([token], spelled.__getitem__, [7])
    assert text["tokens"] == ["<|end|>"] and text["text_offset"] == [7]
    parts = {r"bytes:\xe2": -2.0, r"bytes:\xc3\x28": -9999.0}
    assert text["top_logprobs"] == [{"<|end|>": -0.25, "<|start|>": -1.0, **parts}]
    (chat,) = ChatFormat().logprobs([token], spelled.__getitem__, [7])["content"]
    assert chat["token"] == "<|end|>" and chat["bytes"] == list(b"<|end|>")
    assert [(top["token"], top["bytes"]) for top in chat["top_logprobs"][2:]] == [
        (r"bytes:\xe2", [0xE2]),
        (r"bytes:\xc3\x28", [0xC3, 0x28]),
    ]
