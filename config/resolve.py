"""From an environment to the value of each setting and where it came from. The one reader behind both doors.

A bad ``PLANNER_`` value is a problem, and all of them are collected; a bad ``OLLAMA_`` value is a warning and the
default is taken, as Ollama does. An empty variable counts as unset, as it does in Ollama.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from config.parse import clean
from config.table import SETTINGS, Environ, Setting

DEFAULT_ORIGIN: Final = "default"


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad value: which variable or key, what was given (masked where secret; None: nothing), what is allowed."""

    name: str
    given: str | None
    allowed: str

    def __str__(self) -> str:
        """Return the one line for the user."""
        if self.given is None:
            return f"{self.name} is missing: {self.allowed}"
        return f"{self.name}: {self.given} is not {self.allowed}"


class ConfigError(ValueError):
    """The environment asks for what cannot be; ``problems`` lists all of it. The text has one line for each."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's effective value; ``origin`` is the variable that gave it, or ``default``."""

    setting: Setting
    value: Any
    origin: str

    @property
    def shown(self) -> str:
        """Return the value as text, secrets masked."""
        if self.setting.secret:
            return f"({len(self.value)} set)" if self.value else "(empty)"
        if self.origin == DEFAULT_ORIGIN and self.setting.default_text and not callable(self.setting.default):
            return self.setting.default_text
        return self.setting.kind.show(self.value) or "(empty)"


@dataclass(frozen=True, slots=True)
class Resolved:
    """Every value asked for, in the table's order, and what was wrong."""

    values: tuple[Value, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    def by_field(self) -> Mapping[str, Any]:
        """Return the values by their field's name."""
        return {value.setting.field: value.value for value in self.values}


def resolve(environ: Environ, *, light: bool = False, fields: Container[str] | None = None) -> Resolved:
    """Read every setting (or those that ``planner explain`` needs) from the environment. Raises nothing.

    Whoever does not serve names the ``fields`` that it needs: nothing is wrong with the others for it.
    """
    values: list[Value] = []
    problems: list[Problem] = []
    warnings = _unknown_names(environ)
    for setting in SETTINGS:
        if (light and not setting.light) or (fields is not None and setting.field not in fields):
            continue
        value = _one(setting, environ, problems, warnings)
        values.append(value)
    if fields is None and not light:
        problems += _contradictions(values)
    return Resolved(tuple(values), tuple(problems), tuple(warnings))


def _contradictions(values: Iterable[Value]) -> list[Problem]:
    """Refuse what each setting allows alone but not together."""
    by_name = {value.setting.name: value for value in values}
    host = by_name["HOST"]
    problems = []
    if by_name["TLS_KEY"].value is not None and by_name["TLS_CERT"].value is None:
        problems.append(Problem(by_name["TLS_KEY"].origin, "a key alone", "of any use: set PLANNER_TLS_CERT too"))
    has_keys = by_name["API_KEYS"].value or by_name["KEYS_FILE"].value.is_file()
    if not (host.value.is_loopback or has_keys or by_name["ALLOW_REMOTE"].value):
        allowed = (
            "allowed while there is no API key, since anyone who reaches it could use it: set PLANNER_API_KEYS, "
            "make one with `planner key`, or set PLANNER_ALLOW_REMOTE=true to allow it all the same"
        )
        problems.append(Problem(host.origin, f"listening on {host.value}", allowed))
    return problems


def _one(setting: Setting, environ: Environ, problems: list[Problem], warnings: list[str]) -> Value:
    ours = clean(environ.get(setting.variable, ""))
    if ours:
        try:
            return Value(setting, setting.kind.parse(ours), setting.variable)
        except ValueError:
            given = "the value (not shown)" if setting.secret else repr(ours)
            problems.append(Problem(setting.variable, given, setting.kind.allowed))
    theirs = clean(environ.get(setting.ollama_variable, "")) if setting.ollama and not ours else ""
    if theirs:
        kind = setting.ollama_kind or setting.kind
        try:
            return Value(setting, kind.parse(theirs), setting.ollama_variable)
        except ValueError:
            warnings.append(
                f"{setting.ollama_variable}: {theirs!r} is not {kind.allowed}; using {setting.default_shown}"
            )
    return Value(setting, setting.default_for(environ), DEFAULT_ORIGIN)


def _unknown_names(environ: Environ) -> list[str]:
    known = [setting.variable for setting in SETTINGS]
    unknown = sorted(name for name in environ if name.startswith("PLANNER_") and name not in known)
    return [f"{name} is not a setting{_nearest(name, known)}" for name in unknown]


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - 3 ms that only a slip of the keyboard costs

    closest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else "; planner config lists them"
