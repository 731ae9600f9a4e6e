"""Alloy's configuration language, as much of it as deploy/alloy uses, and its pipelines as Promtail's stages.

blocks = parse(text)                                   # [Block("loki.process", "ours", {"forward_to": …}, [Block …])]
evaluate(value, {"LOKI_URL": "…"})                     # a parsed expression, environment variables put in
stages = stages_of(block)                              # a loki.process block as Promtail's pipeline_stages
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<raw>`[^`]*`)"""
    r"""|(?P<name>[A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)*)|(?P<sign>[][{}(),=+])"""
)
#: the names that differ: Alloy's → Promtail's
_STAGES = {"label_drop": "labeldrop"}
_IS_LIST = {"labeldrop"}


@dataclass(frozen=True)
class Name:
    """A reference to another component's export."""

    path: str


@dataclass(frozen=True)
class Call:
    """A function or a "+" with its arguments."""

    function: str
    arguments: tuple[Any, ...]


@dataclass
class Block:
    kind: str
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


class _Tokens:
    def __init__(self, text: str) -> None:
        self._all = list(self._split(text))
        self._at = 0

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            assert match is not None, f"not Alloy's language: {text[at : at + 40]!r}"
            at = match.end()
            if match.lastgroup != "space":
                yield str(match.lastgroup), match[0]

    @property
    def next(self) -> tuple[str, str]:
        return self._all[self._at] if self._at < len(self._all) else ("end", "")

    def take(self, wanted: str = "") -> str:
        _, text = self.next
        assert not wanted or text == wanted, f"{wanted!r} expected, got {text!r}"
        self._at += 1
        return text

    def takes(self, wanted: str) -> bool:
        if self.next[1] == wanted:
            self._at += 1
            return True
        return False


def parse(text: str) -> list[Block]:
    """Raises AssertionError for what is not this language."""
    tokens = _Tokens(text)
    top = Block("", "")
    _body(tokens, top, "end")
    assert not top.values
    return top.blocks


def _body(tokens: _Tokens, block: Block, closing: str) -> None:
    while tokens.next[1] != closing and tokens.next[0] != closing:
        assert tokens.next[0] == "name", f"a name expected, got {tokens.next[1]!r}"
        name = tokens.take()
        if tokens.takes("="):
            assert name not in block.values, f"{name} twice in {block.kind}"
            block.values[name] = _expression(tokens)
            continue
        inner = Block(name, _string(tokens.take()) if tokens.next[0] == "string" else "")
        tokens.take("{")
        _body(tokens, inner, "}")
        tokens.take("}")
        block.blocks.append(inner)


def _expression(tokens: _Tokens) -> Any:
    value = _operand(tokens)
    while tokens.takes("+"):
        value = Call("+", (value, _operand(tokens)))
    return value


def _operand(tokens: _Tokens) -> Any:
    kind, text = tokens.next
    tokens.take()
    if kind == "string":
        return _string(text)
    if kind == "raw":
        return text[1:-1]
    if text == "[":
        return list(_items(tokens, "]"))
    if text == "{":
        return dict(_pairs(tokens))
    assert kind == "name", f"a value expected, got {text!r}"
    if tokens.takes("("):
        return Call(text, tuple(_items(tokens, ")")))
    return {"true": True, "false": False}.get(text, Name(text))


def _items(tokens: _Tokens, closing: str) -> Iterator[Any]:
    while not tokens.takes(closing):
        yield _expression(tokens)
        assert tokens.takes(",") or tokens.next[1] == closing, f"a comma expected before {tokens.next[1]!r}"


def _pairs(tokens: _Tokens) -> Iterator[tuple[str, Any]]:
    while not tokens.takes("}"):
        kind, name = tokens.next[0], tokens.take()
        tokens.take("=")
        yield (_string(name) if kind == "string" else name), _expression(tokens)
        assert tokens.takes(",") or tokens.next[1] == "}", f"a comma expected before {tokens.next[1]!r}"


def _string(text: str) -> str:
    assert "\\" not in text, "escapes are beyond us: use a raw string"
    return text[1:-1]


def evaluate(value: Any, environment: Mapping[str, str]) -> Any:
    """Of sys.env, coalesce and "+". References stay."""
    if isinstance(value, list):
        return [evaluate(one, environment) for one in value]
    if isinstance(value, dict):
        return {name: evaluate(one, environment) for name, one in value.items()}
    if not isinstance(value, Call):
        return value
    arguments = [evaluate(one, environment) for one in value.arguments]
    if value.function == "sys.env":
        return environment.get(arguments[0], "")
    if value.function == "coalesce":
        return next((one for one in arguments if one), arguments[-1])
    assert value.function == "+", value.function
    return arguments[0] + arguments[1]


def stages_of(block: Block) -> list[dict[str, Any]]:
    return [_stage(one) for one in block.blocks]


def _stage(block: Block) -> dict[str, Any]:
    prefix, _, name = block.kind.partition(".")
    assert prefix == "stage", block.kind
    name = _STAGES.get(name, name)
    if name == "match":
        inner = {"stages": stages_of(block)} if block.blocks else {}
        return {name: {**block.values, **inner}}
    if name in ("labels", "structured_metadata") or name in _IS_LIST:
        return {name: block.values["values"]}
    return {name: block.values}
