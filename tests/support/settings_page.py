"""Write the tables of docs/settings.md from the settings themselves. Imports no torch.

    python -m tests.support.settings_page

What precedes the first table is written by hand and kept.
"""

from pathlib import Path

from data.settings import key_table
from trainer.config import SECTION_TYPES

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
TITLES = {
    "data": "corpus, tokenizer and batches",
    "model": "architecture and router",
    "train": "optimization",
    "parallel": "layout of the processes",
    "checkpoint": "saving and resuming",
    "eval": "evaluation",
    "sample": "stories sampled during the run",
    "log": "logging",
    "run": "run folder, device and timeouts",
}


def tables() -> str:
    """One heading and one table for each section, as Markdown."""
    parts = []
    for section, section_type in SECTION_TYPES.items():
        rows = [f"## `{section}`: {TITLES[section]}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, default, meaning in key_table({section: section_type}):
            escaped = meaning.replace("|", "\\|")
            rows.append(f"| `{key}` | `{default}` | {escaped} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    introduction = PAGE.read_text(encoding="utf-8").partition("## `")[0].rstrip()
    PAGE.write_text(f"{introduction}\n\n{tables()}", encoding="utf-8")


if __name__ == "__main__":
    main()
