"""What a repo's README.md says of it in its front matter: the card, and the tags that searches filter by. No I/O."""

from __future__ import annotations

from typing import Any

import yaml

from crucible.card import load_yaml

LISTS = {  # card field -> prefix of its tags
    "language": "language",
    "license": "license",
    "task_categories": "task_categories",
    "task_ids": "task_ids",
    "size_categories": "size_categories",
    "datasets": "dataset",
    "base_model": "base_model",
    "annotations_creators": "annotations_creators",
    "multilinguality": "multilinguality",
    "source_datasets": "source_datasets",
}
CARD_BYTES = 1 << 20  # front matter beyond this is not read


def front_matter(readme: str) -> str | None:
    """The YAML between the two `---` lines a README may begin with."""
    lines = readme.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() == "---":
            return "\n".join(lines[1:number])
    return None


def parse_card(readme: str) -> dict[str, Any]:
    """The card as JSON-able data; {} when there is none or it is not valid."""
    text = front_matter(readme)
    try:
        card = load_yaml(text) if text else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(key): _plain(value) for key, value in card.items()} if isinstance(card, dict) else {}


def card_problem(readme: str) -> str | None:
    """Why the Hub would refuse this README, or None."""
    text = front_matter(readme)
    try:
        card = load_yaml(text) if text else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"Invalid YAML in README.md: {error}"
    return None if card is None or isinstance(card, dict) else "The front matter of README.md must be a mapping"


def card_tags(card: dict[str, Any]) -> list[str]:
    """The tags the Hub derives from a card: `language:en`, `license:mit`, and the free `tags`."""
    tags = []
    for key, prefix in LISTS.items():
        tags += [f"{prefix}:{value}" for value in _values(card.get(key))]
    tags += _values(card.get("tags"))
    tags += _values(card.get("library_name")) + _values(card.get("pipeline_tag"))
    return list(dict.fromkeys(tags))


def _values(field: Any) -> list[str]:
    items = field if isinstance(field, list) else [field]
    return [str(item) for item in items if isinstance(item, (str, int, float)) and not isinstance(item, bool)]


def _plain(value: Any) -> Any:
    """YAML has dates and odd keys; JSON does not."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
