"""The source that a kernel is compiled from: its own and all functions that it calls, without comments and layout."""

from __future__ import annotations

import functools
import io
import tokenize

from triton.language import constexpr
from triton.runtime.jit import JITFunction

_BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


@functools.cache
def source_of(function: JITFunction) -> str:
    """The code of a kernel and of every function and constant that it reaches."""
    found: dict[str, str] = {}
    _collect(function, found)
    return "\n".join(f"{name}: {found[name]}" for name in sorted(found))


def _collect(function: JITFunction, found: dict[str, str]) -> None:
    name = f"{function.module}.{function.__name__}"
    if name in found:
        return
    words = words_of(function.src)
    found[name] = " ".join(words)
    for word in set(words):
        value = function.__globals__.get(word)
        if isinstance(value, JITFunction):
            _collect(value, found)
        elif isinstance(value, constexpr):
            found[f"{name}.{word}"] = str(value.value)


def words_of(source: str) -> list[str]:
    """The tokens of a function, indentation by sign, docstrings and comments left out."""
    words: list[str] = []
    fresh = True  # at the start of a statement, where a string stands for itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _BLANK or (fresh and token.type in (tokenize.STRING, tokenize.NEWLINE)):
            continue
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            words.append(tokenize.tok_name[token.type])
            fresh = True
        else:
            words.append(token.string)
            fresh = False
    return words
