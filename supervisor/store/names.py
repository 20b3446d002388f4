"""Names of models: ``[host/][namespace/]model[:tag]``, as Ollama reads them (types/model/name.go).

A name is the only text of a request that ever becomes a path, so its grammar is the wall: no part may begin with a dot,
none may hold a slash, and the lengths are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from supervisor.api.store import BadModelName

DEFAULT_NAMESPACE: Final = "library"
DEFAULT_TAG: Final = "latest"
# What is made here, in a store that no registry has filled yet, belongs to no registry.
LOCAL_HOST: Final = "local"
SHOWN_NAME: Final = 200  # characters of a name that is none, in an error line

_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", re.ASCII)
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
_MODEL: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
_SCHEME: Final = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A full name. Every part has been checked: joined to a folder it stays below it."""

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        rules = (_HOST, self.host), (_NAMESPACE, self.namespace), (_MODEL, self.model), (_MODEL, self.tag)
        if not all(rule.fullmatch(part) for rule, part in rules):
            raise bad_name(str(self))

    def __str__(self) -> str:
        """Return the full name."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def short(self, default_host: str) -> str:
        """Return the name as Ollama shows it: without host and namespace where they are the default ones."""
        if self.host.lower() not in {default_host.lower(), LOCAL_HOST}:
            return str(self)
        namespace = "" if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/"
        return f"{namespace}{self.model}:{self.tag}"

    @property
    def folded(self) -> tuple[str, str, str, str]:
        """Return what two names have in common that differ only in the case of their letters."""
        return self.host.lower(), self.namespace.lower(), self.model.lower(), self.tag.lower()


def bad_name(text: str) -> BadModelName:
    """Return the error that says what a name looks like."""
    return BadModelName(
        f"invalid model name {text[:SHOWN_NAME]!r}: a name is [host/][namespace/]model[:tag], of letters, digits, "
        "'.', '_' and '-'"
    )


def parse(text: str, default_host: str) -> ModelName:
    """Return the full name that a client's text stands for. Raises BadModelName."""
    bare = _SCHEME.sub("", text, count=1)
    rest, colon, tag = bare.rpartition(":")
    if not colon or "/" in tag:
        rest, tag = bare, DEFAULT_TAG
    parts = rest.split("/")
    if len(parts) > 3:  # noqa: PLR2004 - host, namespace, model
        raise bad_name(text)
    host, namespace, model = (*(default_host, DEFAULT_NAMESPACE)[: 3 - len(parts)], *parts)
    try:
        return ModelName(host, namespace, model, tag)
    except BadModelName:
        raise bad_name(text) from None


def is_host(text: str) -> bool:
    """Say whether a text may be the host of a name."""
    return _HOST.fullmatch(text) is not None


def has_host(text: str) -> bool:
    """Say whether a name says itself which registry it is of."""
    return _SCHEME.sub("", text, count=1).count("/") > 1
