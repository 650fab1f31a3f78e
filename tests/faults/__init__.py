"""The faults F1 to F20 put to the engine, and counted: `python -m tests.faults`. README.md is the manual."""
