"""Pages with a table that a script writes."""

import pathlib


def write(page: pathlib.Path, mark: str, table: str) -> None:
    """Puts the table between the two places where the mark stands."""
    before, _, after = page.read_text().split(mark)
    page.write_text(f"{before}{mark}\n{table}\n{mark}{after}")
