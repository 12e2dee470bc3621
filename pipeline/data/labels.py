"""What says that an image has no label: one rule for the columns of tables, ``.cls`` and ``.json``."""

NO_LABEL = frozenset({"", "-1", "-1.0", "nan", "na", "n/a", "<na>", "none", "null"})  # as pandas, R, SQL write it


def is_no_label(value: object) -> bool:
    """Whether a value means "no label": None, a NaN, -1, "NaN", "n/a", "null", an empty text; in any case."""
    return str(value).strip().casefold() in NO_LABEL
