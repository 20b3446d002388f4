"""The supervisor's interface: what the gateway, the status pages and the tests may know of it.

Nothing here decides. A request says its ``need``, acquires a ``lease`` on a runner's endpoint and gives it back exactly
once, or gets one of the ``errors``; everything else is read from one immutable ``snapshot`` with its ``models``, whose
``parameters`` have Ollama's names. ``runtime`` and ``store`` are what can be asked for. Import from the module that
holds the thing.
"""
