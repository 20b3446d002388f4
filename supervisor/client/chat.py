"""``planner run``: a conversation in the terminal, or one question from and into a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from supervisor.client.service import Service, ServiceError

PATH: Final = "/v1/chat/completions"
DONE: Final = "[DONE]"
PROGRESS: Final = "load-progress"  # how the comments begin that tell of a load
QUOTES: Final = '"""'  # around a question of several lines, as in Ollama's own terminal
HELP: Final = f"""\
  /bye, Ctrl-D    leave
  /clear          begin a new conversation
  Ctrl-C          stop the answer
  {QUOTES}             begin and end a question of several lines
"""
DIM: Final = "\x1b[2m"
PLAIN: Final = "\x1b[0m"
CLEAR_LINE: Final = "\r\x1b[K"


@dataclass(slots=True)
class Conversation:
    """What was said so far. Asking streams the answer to ``out`` and keeps it, where it is whole or was cut short."""

    service: Service
    model: str
    out: TextIO
    system: str | None = None
    keep_alive: str | None = None
    is_terminal: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    _shown: str = field(default="", init=False, repr=False)  # of the load's progress, until it is cleared away

    def clear(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, question: str) -> None:
        """Print the answer as it comes. Raises ServiceError; KeyboardInterrupt ends the answer and is raised again."""
        if not self.messages:
            self.clear()
        self.messages.append({"role": "user", "content": question})
        body = {"model": self.model, "messages": self.messages, "stream": True}
        if self.keep_alive is not None:
            body["keep_alive"] = self.keep_alive
        parts: list[str] = []
        try:
            with self.service.lines("POST", PATH, body, {"X-Load-Progress": "1"}) as lines:
                for piece in _pieces(lines, self._waiting):
                    parts += self._show(piece)
        except (ServiceError, KeyboardInterrupt):
            if not parts:
                self.messages.pop()  # it was not answered: asking it again must not ask it twice
            raise
        finally:
            self._end_answer(parts)

    def _show(self, delta: dict[str, Any]) -> list[str]:
        """Print a piece of the answer, and on a terminal of the thinking; return what belongs to the answer."""
        thought, said = delta.get("reasoning_content"), delta.get("content")
        if self.is_terminal and thought:
            self.out.write(f"{DIM}{thought}{PLAIN}")
        if said:
            self.out.write(said)
        self.out.flush()
        return [said] if said else []

    def _end_answer(self, parts: list[str]) -> None:
        self._waiting("")
        if not parts:
            return
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        with suppress(BrokenPipeError):
            self.out.write("\n")
            self.out.flush()

    def _waiting(self, text: str) -> None:
        """Show on a terminal how the load goes, in place of what was shown of it; an empty text clears that away."""
        if self.is_terminal and text != self._shown:
            self._shown = text  # before it is: an interrupt in between must not leave it standing
            sys.stderr.write(f"{CLEAR_LINE}{text}")
            sys.stderr.flush()


def _pieces(lines: Iterator[str], waiting: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield the deltas of a streamed answer (server-sent events). Raises ServiceError where it ends in an error."""
    ended = False
    for line in lines:
        if line.startswith(":"):
            waiting(_progress(line.removeprefix(":").strip()))
            continue
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == DONE:
            ended = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServiceError(event["error"].get("message", "the answer broke off"))
        waiting("")
        for choice in event.get("choices", ())[:1]:
            yield choice.get("delta", {})
    if not ended:
        raise ServiceError("the answer broke off: the connection to the service was lost")


def _progress(comment: str) -> str:
    """Return what a comment of the stream says of the load, for people; nothing where it speaks of something else."""
    kind, _, told = comment.partition(" ")
    if kind != PROGRESS:
        return ""
    progress = json.loads(told)
    share = "" if progress["fraction"] is None else f" {progress['fraction']:.0%}"
    return f"{progress['stage']}{share}, {progress['waited_s']:.0f} s"


def converse(conversation: Conversation) -> int:
    """Talk until ``/bye`` or the end of input; return the exit status."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - gives input() editing and a history, where it is there
    sys.stdout.write(f"{conversation.model}; /? for help\n")
    while True:
        try:
            question = _question()
        except EOFError:
            sys.stdout.write("\n")
            return 0
        except KeyboardInterrupt:
            sys.stdout.write("\n(/bye or Ctrl-D to leave)\n")
            continue
        match question.strip():
            case "":
                continue
            case "/bye" | "/exit" | "/quit":
                return 0
            case "/clear":
                conversation.clear()
            case "/?" | "/help":
                sys.stdout.write(HELP)
            case _:
                _answer(conversation, question)


def _answer(conversation: Conversation, question: str) -> None:
    """Ask; what goes wrong with one answer does not end the conversation."""
    try:
        conversation.ask(question)
    except KeyboardInterrupt:
        sys.stdout.write("(stopped)\n")
    except ServiceError as error:
        sys.stderr.write(f"planner: error: {error}\n")


def _question() -> str:
    """Return the next line, or several between quotes. Raises EOFError."""
    line = input(">>> ")
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines)
