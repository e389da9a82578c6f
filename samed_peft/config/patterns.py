"""The regular expressions that may name layers: those that can be matched in linear time, whoever wrote them."""

import itertools
import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"(?P<literal>[\w-]|\\[.\-])|(?P<run>(?:\.|\\w|\[[\w-]+\])[+*]|\\d\*)|(?P<one>\\d\+?|\.|\\w|\[[\w-]+\]|[\^$])|"
    r"(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<either>\|)",
    re.ASCII,
)
_MOST_CHARACTERS, _MOST_NESTED = 4000, 5

LAYER_PATTERN = (
    r"names of layers, with \d+, . and (a|b) for those that differ, at most one .* or .+, and alternatives that begin "
    "differently"
)
"""What `is_layer_pattern` accepts, as errors say it."""


@dataclass
class _Group:
    """Alternatives of a group, each by the letters that it begins with."""

    heads: list[str] = field(default_factory=lambda: [""])
    in_head: bool = True

    def is_clear(self) -> bool:
        """Whether no name can begin like two alternatives; numbers may, as layers 1 and 11 do."""
        heads = sorted(self.heads)
        pairs = list(itertools.pairwise(heads))
        if all(head.isdigit() for head in heads):
            return all(one != other for one, other in pairs)
        return not any(other.startswith(one) for one, other in pairs)


def is_layer_pattern(text: object) -> bool:
    """Whether `text` is a regular expression for names of layers that no name keeps busy for long.

    Python's engine tries all ways to match: `(a+)+` and `(v|v)(i|i)` have more than can be tried in a lifetime. Here
    groups cannot be repeated, their alternatives exclude each other, and one part alone may be of any length.
    """
    if not isinstance(text, str) or not 0 < len(text) <= _MOST_CHARACTERS:
        return False
    groups, runs, position = [_Group()], 0, 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None or len(groups) > _MOST_NESTED:
            return False
        position, kind = token.end(), token.lastgroup
        if kind == "literal" and groups[-1].in_head:
            groups[-1].heads[-1] += token[0]
        elif kind == "either":
            groups[-1].heads.append("")
            groups[-1].in_head = True
        elif kind == "close":
            if len(groups) == 1 or not groups.pop().is_clear():
                return False
        elif kind != "literal":
            groups[-1].in_head = False
            runs += kind == "run"
            groups += [_Group()] if kind == "open" else []
    try:
        re.compile(text)
    except re.error:  # a range such as [z-a]
        return False
    return len(groups) == 1 and groups[0].is_clear() and runs <= 1
