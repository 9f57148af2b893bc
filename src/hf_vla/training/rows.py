"""Which rows a batch is made of, for errors that have to say so."""

from collections.abc import Mapping


class RowsOfBatch:
    """A collator whose batches also say, as `rows`, which rows of which dataset they are made of, where items tell."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, items):
        """Make a batch."""
        batch = self.collator(items)
        told = [item for item in items if isinstance(item, Mapping) and "index" in item]
        batch["rows"] = [(item.get("dataset"), int(item["index"])) for item in told]
        return batch


def describe_rows(rows: list[tuple[str | None, int]]) -> str:
    """Say which rows of which datasets these are."""
    named = {}
    for dataset, row in rows:
        named.setdefault(dataset, []).append(row)
    parts = (f"rows {members}" + (f" of {dataset}" if dataset else "") for dataset, members in named.items())
    return " and ".join(parts) or "unknown rows"
