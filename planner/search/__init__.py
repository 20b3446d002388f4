"""The search for the best placement: candidates, budgets met, the objective of docs/decisions/0006.

``placement`` is the door. The words, from what is asked to what is answered:

- A slot is a block of the model, or its output: what llama.cpp counts as a layer (``-ngl``). In ``knobs``, ``slots``
  and ``placement``, which speak of flags, it is llama-server's word for a conversation.
- A question is one model with its parameters over devices in order (``problems``). A problem is that in numbers alone:
  slots with bytes and reads, bins with rooms (``splits``). A subproblem is a problem in one mode of llama.cpp and for
  some numbers of devices (``subproblems``); those of a tier compete, and an earlier tier is better than a later one.
- A split is the solver's answer: a segment of consecutive slots for each bin used, and the seconds of a token. To spill
  is to leave parts of a slot to the host (experts, feed-forward matrices) while the slot is in a bin.
- A proposal is the split that the objective puts first, expected to fit and not yet accounted for (``proposals``).
- A candidate is a placement that was accounted for, whether it fits or not (``candidates``). An evaluation is a
  proposal with its candidate; the incumbent is the evaluation that fits and is the best so far (``optimizer``).
- What is learned are the bytes that a device took beyond its slots, by the part that it plays (``learned``); in small
  problems, by its role, which tells more (``roles``).
- A filling is whole slots in order with some experts sent on to a later device (``filling``). To pack is to place whole
  slots by arithmetic where the solver does not apply (``packer``).

Where the context is open, ``stretch`` looks for the longest with the solver's splits, ``overflow`` with fillings and
``longest`` with any candidates. In a small problem ``exhaust`` looks at every split that could be better.
"""
