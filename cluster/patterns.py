"""Globs over a repo's tree listing, with the semantics that `datasets` gets from fsspec. No I/O.

`*`, `?` and `[...]` stay inside one path component, `**` is a whole component that spans any number of them. Dot-files
and `__special__` folders are matched only by patterns that name them. Matches come sorted by path.

A repo may have a million files and a config a hundred patterns, so a pattern first narrows the sorted listing to the
range under its literal prefix, then to the paths that contain its longest literal, and only then runs its regex.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from crucible.refs import SourceFile
from crucible.splits import is_split_name

SEPARATORS = "-._ 0-9"
"""What may stand around a split's keyword in a name, as the inside of a character class."""

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

SHARDED = "data/{split}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9]*.*"
_SHARDED_NAME = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}.*\..*", re.DOTALL)

_IN_DIRECTORY = ("**/{k}/**", "**/{k}[{s}]*/**", "**/*[{s}]{k}/**", "**/*[{s}]{k}[{s}]*/**")
_IN_FILE_NAME = ("**/{k}[{s}]*", "**/*[{s}]{k}[{s}]*")

IGNORED_NAMES = frozenset(
    ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip", "dataset_dict.json")
)

_MAGIC = re.compile(r"[*?\[]")
_STEP = 4096
"""Paths looked through at a time: a search for the first match stops early, one for all pays no call a path."""
_WORDS_KEPT = 32
"""Literals of which a listing remembers where they are: the conventions have a dozen words in fifty patterns."""


def _keyword_patterns(shapes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {
        split: tuple(shape.format(k=word, s=SEPARATORS) for word in words for shape in shapes)
        for split, words in KEYWORDS.items()
    }


DEFAULT_PATTERNS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"logs": ("**/*.eval",)},
    {"test": ("**/task.toml", "**/instruction.md")},
    _keyword_patterns(_IN_DIRECTORY),
    _keyword_patterns(_IN_FILE_NAME),
    {"train": ("**",)},
)
"""Split -> patterns; the first group with any match decides, after `SHARDED` was tried."""


class BadPattern(ValueError):
    """A glob that fsspec refuses too."""


def has_magic(pattern: str) -> bool:
    return _MAGIC.search(pattern) is not None


@dataclass(frozen=True)
class Glob:
    """One compiled pattern, relative to the root of the repo."""

    pattern: str
    prefix: str
    """Every match starts with it."""
    literal: str
    """Every match contains it."""
    regex: re.Pattern[str]
    hidden: int
    """Components of the pattern that start with a dot: a match must have as many."""
    special: int
    """Folders of the pattern that start with two underscores."""
    name: str

    @property
    def any_name(self) -> bool:
        """True when whatever lies in a folder that matches, matches."""
        return self.name == "**"

    def matches(self, path: str) -> bool:
        return self.regex.match(path) is not None

    def requested(self, path: str) -> bool:
        """False for ignored names, and for hidden files and special folders that the pattern does not name."""
        name = path.rpartition("/")[2]
        if name in IGNORED_NAMES and name != self.name:
            return False
        if "/." in path or path.startswith(".") or self.hidden:
            parts = path.split("/")
            if sum(map(_is_hidden, parts)) != self.hidden:
                return False
        if "__" in path or self.special:
            return sum(part.startswith("__") for part in path.split("/")[:-1]) == self.special
        return True


def _is_hidden(part: str) -> bool:
    return part.startswith(".") and part.strip(".") != ""


@lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> Glob:
    """Compile a pattern. Raises BadPattern for `**` that is not a whole component."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    clean = "/".join(parts)
    magic = _MAGIC.search(clean)
    prefix = clean if magic is None else clean[: magic.start()]
    return Glob(
        pattern=clean,
        prefix=prefix,
        literal=max(re.split(r"\*|\?|\[!?\]?[^\]]*\]|/", clean), key=len),
        regex=re.compile(_translate(parts)),
        hidden=sum(map(_is_hidden, parts)),
        special=sum(part.startswith("__") for part in parts[:-1]),
        name=parts[-1] if parts else "",
    )


def _translate(parts: list[str]) -> str:
    out = []
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            out.append(".*" if last else "(?:.+/)?")
            continue
        if "**" in part:
            raise BadPattern("'**' can only be a whole path component")
        out.append("[^/]+" if part == "*" else "".join(_component(part)))
        if not last:
            out.append("/")
    return f"(?s:{''.join(out)})\\Z"


def _component(part: str) -> Iterator[str]:
    """Regex pieces of one path component."""
    at = 0
    while at < len(part):
        char = part[at]
        at += 1
        if char == "*":
            yield "[^/]*"
        elif char == "?":
            yield "[^/]"
        elif char == "[" and (end := _class_end(part, at)) > 0:
            yield _character_class(part[at:end])
            at = end + 1
        else:
            yield re.escape(char)


def _class_end(part: str, at: int) -> int:
    """Where the `]` of the class opened before `at` is, or -1. A `]` that comes first is a member, not the end."""
    start = at + 1 if part[at : at + 1] == "!" else at
    return part.find("]", start + 1 if part[start : start + 1] == "]" else start)


def _character_class(inside: str) -> str:
    """`[inside]` as a regex. Ranges whose ends are swapped match nothing, as in the shell."""
    negated, members = inside.startswith("!"), inside.removeprefix("!")
    pieces, at = [], 0
    while at < len(members):
        if members[at + 1 : at + 2] == "-" and at + 2 < len(members):
            low, high = members[at], members[at + 2]
            if low <= high:
                pieces.append(f"{re.escape(low)}-{re.escape(high)}")
            at += 3
        else:
            pieces.append(re.escape(members[at]))
            at += 1
    if not pieces:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join(pieces)}]"


class Listing:
    """The files of a repo, sorted by path, ready for many globs."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self.files = sorted(files, key=lambda file: file.path)
        self._paths = [file.path for file in self.files]
        self._having: dict[str, dict[int, Sequence[int]]] = {}
        """literal -> block -> places of the paths that contain it."""
        self._folders: dict[int, tuple[str, ...]] = {}
        """block -> the folders of its paths, each once."""

    @cached_property
    def by_path(self) -> dict[str, SourceFile]:
        return dict(zip(self._paths, self.files, strict=True))

    def glob(self, pattern: str) -> Iterator[SourceFile]:
        """Files that match `pattern`, sorted by path."""
        glob = compile_glob(pattern)
        first = bisect_left(self._paths, glob.prefix)
        # U+10FFFF sorts after every character a path can continue with
        last = bisect_left(self._paths, glob.prefix + "\U0010ffff") if glob.prefix else len(self._paths)
        folders: dict[str, bool] = {}  # of a pattern that ends in `**` the folder alone decides
        for block in range(first // _STEP, -(-last // _STEP)):
            if glob.any_name:
                for folder in self._folders_of(block):
                    if folder not in folders:
                        folders[folder] = glob.matches(folder)
                if not any(folders[folder] for folder in self._folders_of(block)):
                    continue
            for place in self._places(glob.literal, block):
                if not first <= place < last:
                    continue
                path = self._paths[place]
                hit = folders[path[: path.rfind("/") + 1]] if glob.any_name else glob.matches(path)
                if hit and glob.requested(path):
                    yield self.files[place]

    def _places(self, literal: str, block: int) -> Sequence[int]:
        """Places in a block of the paths that contain `literal`. Looked for once."""
        known = self._having.get(literal)
        if known is None:
            if len(self._having) >= _WORDS_KEPT:
                self._having.clear()
            known = self._having[literal] = {}
        if block not in known:
            start = block * _STEP
            paths = self._paths[start : start + _STEP]
            found = [place for place, path in enumerate(paths, start) if literal in path]
            known[block] = range(start, start + len(paths)) if len(found) == len(paths) else array("I", found)
        return known[block]

    def _folders_of(self, block: int) -> tuple[str, ...]:
        if block not in self._folders:
            paths = self._paths[block * _STEP : (block + 1) * _STEP]
            self._folders[block] = tuple({path[: path.rfind("/") + 1]: None for path in paths})
        return self._folders[block]

    def select(
        self, patterns: Iterable[str], base: str, extensions: Collection[str] | None = None
    ) -> tuple[SourceFile, ...]:
        """Files of all patterns below the folder `base`, pattern by pattern; a file that two match comes twice.

        Only names with one of `extensions` among their dot-suffixes count, with None all. Raises
        FileNotFoundError(pattern) for a pattern without wildcards that matches nothing.
        """
        found: list[SourceFile] = []
        for pattern in patterns:
            hits = [
                file
                for file in self.glob(join(base, pattern))
                if extensions is None or has_extension(file.path, extensions)
            ]
            if not hits and not has_magic(join(base, pattern)):
                raise FileNotFoundError(join(base, pattern))
            found += hits
        return tuple(found)

    def default_patterns(self, base: str) -> dict[str, tuple[str, ...]] | None:
        """Split -> patterns below `base` by the conventions on names, or None when there are no files at all.

        Raises ValueError for a sharded file whose split is not a word.
        """
        sharded = self.glob(join(base, SHARDED.format(split="*")))
        names = {match[1] for file in sharded if (match := _SHARDED_NAME.fullmatch(file.path.rpartition("/")[2]))}
        if names:
            bad = sorted(name for name in names if not is_split_name(name))
            if bad:
                raise ValueError(f"{bad[0]!r} is not a split name (letters, digits, _ and . between words)")
            ordered = [name for name in KEYWORDS if name in names] + sorted(names - set(KEYWORDS))
            return {name: (SHARDED.format(split=name),) for name in ordered}
        for group in DEFAULT_PATTERNS:
            hit = {split: patterns for split, patterns in group.items() if self._any(base, patterns)}
            if hit:
                return hit
        return None

    def _any(self, base: str, patterns: tuple[str, ...]) -> bool:
        return any(next(self.glob(join(base, pattern)), None) is not None for pattern in patterns)


def join(base: str, pattern: str) -> str:
    return f"{base.strip('/')}/{pattern}" if base.strip("/") else pattern


def suffixes(path: str) -> tuple[str, ...]:
    """Every dot-suffix of the file's name: `a.tar.gz` has `.tar` and `.gz`."""
    return _split_tail(tail(path))


def tail(path: str) -> str:
    """The file's name from its first dot on, without the dot. A million files have a handful of these."""
    return path.rpartition("/")[2].partition(".")[2]


@lru_cache(maxsize=4096)
def _split_tail(end: str) -> tuple[str, ...]:
    return tuple("." + part for part in end.split(".")) if end else ()


def has_extension(path: str, extensions: Collection[str]) -> bool:
    return any(suffix in extensions for suffix in suffixes(path))
