"""Data set types, the field names of their rows, and the names of row outcomes, defined once."""

FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "self_instruct": ("instruction", "instances"),
    "custom": (),
}
"""Each type and its fields, the keys that `columns` may map."""

IN_PARTS = {"messages": ("prompt", "completion")}
"""A field and the columns that hold its parts if a row lacks it: TRL's conversations of two lists."""

WITHOUT_TEMPLATE = frozenset({"completion", "prompt_completion"})
"""Types whose text is used as it is; rows of all others are conversations, rendered with a chat template."""

ROW_OUTCOMES = (
    ("malformed", "num_bad_rows"),
    ("too long", "too_long"),
    ("truncated", "truncated"),
    ("split", "split"),
    ("untrained", "no_supervised"),
    ("repeated", "duplicates"),
)
"""What happens to rows that are not kept as they are: column headings, and the counts of a data report under them."""
