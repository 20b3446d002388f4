"""The help texts of the command, made from the flag table."""

from __future__ import annotations

from typing import Final

from planner.flag_table import FLAGS, Flag

USAGE: Final = """\
planner plans which layer of a GGUF model goes on which GPU, starts llama-server that way and keeps it alive.

  planner explain MODEL [flags]   what fits where, and why; starts nothing; several models: do they fit together?
  planner verify MODEL [flags]    the same plan beside what llama.cpp itself says, byte by byte
  planner devices [--json]        the devices that llama-server can use here
  planner doctor [--json]         what is wrong with this machine, and what mends it
  planner serve                   serve a folder of models
  planner config [--json]         every setting, its value and where that came from
  planner check [--machine FILE]  prove the configuration, and plan the models that it names
  planner key NAME                make an API key for a client

with a service running:
  planner run MODEL [QUESTION]    talk with a model, here or through a pipe
  planner list | ps               the models there are | those that run
  planner show MODEL              what a model is
  planner load | unload MODEL     load before anybody asks | unload (also: stop)
  planner logs MODEL [-f]         what its runner says
  planner reset MODEL             let a model that failed be tried again
  planner yield DEVICE SIZE       free memory for another program for a while
  planner pull | rm | cp NAME     fetch a model into the store | delete it | give it a second name
  planner create NAME -f FILE     make a model as a Modelfile says

  planner --version               which planner, and which llama.cpp

`planner COMMAND --help` says more. Settings are environment variables, PLANNER_<NAME>.
"""

_EXPLAIN_HEAD: Final = """\
planner explain MODEL [flags]
planner explain MODEL MODEL ... [flags]

Says where llama-server would put the model on this machine, how much memory that takes on each device, and why.
MODEL is a GGUF file, or the name of a model that `planner serve` would serve: it is then planned as it would be there.
Flags are llama-server's own, so that its command line can be pasted; what is not pinned is planned. Several models are
to be loaded at a time: flags hold for each of them, and the order in which they are named does not matter.
Exit status: 0 it fits, 3 it does not, 2 wrong usage, 65 not a model that can be read.
"""

VERIFY_USAGE: Final = """\
planner verify MODEL [flags]
planner verify --all FOLDER [flags]

Asks the llama.cpp that would be launched what it would reserve for the planned placement, without loading anything, and
prints both sides per device. With --all, one line per model below the folder: to be run after an upgrade of llama.cpp.
Flags are those of `planner explain`, --json among them; a worker that does not exist, as in --device RPC0=24GiB, is
taken by a stand-in on this machine. Equal means to the byte; a figure that is only estimated may be above llama.cpp's.
Exit status: 0 they agree, 1 they differ or llama.cpp gave no answer, 2 wrong usage, 3 it would not be launched like
this, 65 not a model that can be read.
"""

_WHAT_IF: Final = """\
  --device NAME=SIZE             what if: a device with this much free memory; repeatable, in order,
                                 like CUDA0=24GiB, or RPC0@10.0.0.2:50052=24GiB for a worker
"""

_COLUMN: Final = 33


def explain_usage() -> str:
    """Return the help of ``planner explain``: our own flags, then llama-server's."""
    ours = "".join(_line(flag) for flag in FLAGS if flag.ours)
    theirs = "".join(_line(flag) for flag in FLAGS if not flag.ours)
    rest = "Every other flag of llama-server is handed on if it moves no memory, else it is named.\n"
    return f"{_EXPLAIN_HEAD}\n{_WHAT_IF}{ours}\n{theirs}\n{rest}"


def _line(flag: Flag) -> str:
    names = ", ".join((*flag.on, *flag.off)) + (f" {flag.metavar}" if flag.metavar else "")
    head = f"  {names}"
    gap = " " * (_COLUMN - len(head)) if len(head) < _COLUMN - 1 else "\n" + " " * _COLUMN
    return f"{head}{gap}{flag.help}\n"
