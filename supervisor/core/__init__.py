"""The deciding half of the supervisor: events in, commands out. No clock, no loop, no process."""
