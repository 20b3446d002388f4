"""The commands. Each module has ``main(name, words)``, which returns the exit status and raises PlannerError.

They are the part of this package that knows the others and reads the environment.
"""
