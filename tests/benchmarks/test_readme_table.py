"""The table of the README is what the committed results say."""

from __future__ import annotations

import readme_table


def test_the_table_is_up_to_date():
    text = readme_table.README.read_text(encoding="utf-8")
    shown = text.split(readme_table.BEGIN)[1].split(readme_table.END)[0].strip()
    assert shown == readme_table.table()
