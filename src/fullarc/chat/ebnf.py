"""EBNF as SGLang, vLLM and llama.cpp write it (`root ::= …`) to the Lark syntax that llguidance reads.

Every terminal becomes one character: llguidance takes longer ones greedily, and then `[a-z]* "z"` would match nothing.
So what is accepted is exactly the language of the rules.
"""

import re

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<rule>[\w-]+)\s*::=|(?P<name>[\w-]+)|(?P<text>"(?:[^"\\\n]|\\.)*")"""
    r"""|(?P<chars>\[\^?(?:[^\]\\\n]|\\.)+\])|(?P<any>\.)|(?P<count>[*+?]|\{\d+(?:,\d*)?\})|(?P<mark>[|()])"""
)
_CHAR = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.S)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def to_lark(text: str) -> str:
    """The same grammar; its start is `root`. Raises ValueError or OverflowError that says what is wrong."""
    names, defined, wanted = {"root": "r0"}, set[str](), ["root"]
    lark, at, depth, item = ["start: r0"], 0, 0, 0  # `item`: where that begins which may be repeated
    while at < len(text):
        match = _TOKEN.match(text, at)
        kind = (match and match.lastgroup) or ""
        said = match[kind] if match and kind else ""
        misplaced = (
            (kind not in ("skip", "rule") and not defined)
            or (kind == "rule" and (depth or said in defined))
            or (kind == "count" and not item)
            or (said == ")" and not depth)
        )
        if misplaced or not match:
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line}: {text[at : at + 20]!r} cannot stand here")
        at = match.end()
        if kind == "skip":
            continue
        before = len(lark)
        if kind in ("rule", "name"):
            rule = names.setdefault(said, f"r{len(names)}")
            (defined.add if kind == "rule" else wanted.append)(said)
            lark.append(f"\n{rule}:" if kind == "rule" else f" {rule}")
        elif kind == "count":
            count = said if said in "*+?" or "," in said else f"{{{said[1:-1]},{said[1:-1]}}}"
            lark[item:] = [(" )" if lark[item] == " )" else f" ({lark[item]})") + count]
        elif kind == "mark":
            depth += {"(": 1, ")": -1}.get(said, 0)
            lark.append(f" {said}")
        else:
            lark.append(
                {"text": _literal, "chars": _class}[kind](said[1:-1]) if kind != "any" else " /(?s:.)/"
            )
        item = before if kind in ("name", "text", "chars", "any") or said == ")" else 0
    missing = next((name for name in wanted if name not in defined), None)
    if missing or depth:
        raise ValueError(f"there is no rule {missing[:100]!r}" if missing else "a parenthesis is not closed")
    return "".join(lark)


def _literal(text: str) -> str:
    return "".join(f" /{_number(match)}/" for match in _CHAR.finditer(text))


def _class(text: str) -> str:
    negated = text.startswith("^")
    said = ""
    for match in _CHAR.finditer(text, negated):
        inside = negated < match.start() and match.end() < len(text)
        said += "-" if match[0] == "-" and inside else _number(match)
    return f" /[{'^' * negated}{said}]/"


def _number(match: re.Match[str]) -> str:
    """A character as a regular expression has it that needs no escapes."""
    x, u, long, escaped, plain = match.groups()
    char = chr(int(x or u or long, 16)) if x or u or long else plain or _ESCAPES.get(escaped, escaped)
    return f"\\x{{{ord(char):x}}}"
