"""The command `python -m data.prepare`, which is engine.prepare: it needs the tasks and the recipe of the engine."""

import runpy

if __name__ == "__main__":
    runpy.run_module("engine.prepare", run_name="__main__", alter_sys=True)
