"""The hands: one child process for each runner, from its start to its end.

``tending`` has all of them, and is the way in. ``process`` is one child, ``spare`` one that waits to be the next,
``exec_child`` ties deaths where a tool is missing, ``strays`` what an earlier life left behind. ``logs``
is what a child says, ``weights_read`` how far its load is, ``health`` whether it answers, ``hanging`` when that means
that it never will, ``counting`` how many tokens it has worked through, ``proc_stat`` what the kernel says of it.
"""
