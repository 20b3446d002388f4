"""The commands that talk to a running service, over its HTTP interface alone."""
