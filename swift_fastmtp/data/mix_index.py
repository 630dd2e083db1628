"""What `fastmtp mix` keeps in memory of every row: numbers, not the rows."""

from array import array
from dataclasses import dataclass, field


@dataclass
class Names:
    """Strings as small numbers, in the order in which they were met."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


@dataclass
class Index:
    """What is kept in memory of the rows: one array entry each, 60 bytes a row in all."""

    groups: Names = field(default_factory=Names)
    languages: Names = field(default_factory=Names)
    sources: Names = field(default_factory=Names)
    group_N: "array[int]" = field(default_factory=lambda: array("i"))
    language_N: "array[int]" = field(default_factory=lambda: array("i"))
    source_N: "array[int]" = field(default_factory=lambda: array("i"))
    answer_tokens_N: "array[int]" = field(default_factory=lambda: array("q"))
    all_tokens_N: "array[int]" = field(default_factory=lambda: array("q"))
    prompt_N: "array[int]" = field(default_factory=lambda: array("Q"))
    """Seeded hash of the prompt."""
    row_N: "array[int]" = field(default_factory=lambda: array("Q"))
    """Seeded hash of the whole row."""
    start_N: "array[int]" = field(default_factory=lambda: array("q"))
    """Where the row's line starts in the temporary file."""
    length_N: "array[int]" = field(default_factory=lambda: array("q"))
