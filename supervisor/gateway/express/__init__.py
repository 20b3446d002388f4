"""The short way of a request that needs nothing but to be passed on, at once, to a runner that is there."""
