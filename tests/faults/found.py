"""What the suite has found, and what was done about it."""

FOUND: list[dict[str, str]] = []
