"""Names that nobody knows: refused, with the one that was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def refuse_near_misses(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that almost are another; a configuration keeps what is wholly strange to it.

    Args:
        owner (`str`): what has the names.
        given, known (`Iterable[str]`): names.

    Raises:
        ValueError: one is a near miss.
    """
    for name in given:
        if close := get_close_matches(name, known, n=1, cutoff=0.9):
            raise ValueError(f"{owner} has no {name!r}; did you mean {close[0]!r}?")


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not among the known ones.

    Args:
        owner (`str`): what has the names.
        given, known (`Iterable[str]`): names.

    Raises:
        ValueError: some are unknown; the text lists them.
    """
    known = sorted(known)
    if unknown := sorted(set(given) - set(known)):
        close = [match for name in unknown for match in get_close_matches(name, known, n=1)]
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else f"; it takes {known}."
        raise ValueError(f"{owner} takes no {', '.join(map(repr, unknown))}{hint}")
