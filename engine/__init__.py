"""A fine-tuning engine: the recipe defines the mathematics, the machine only defines the speed.

python -m engine.new TASK           write a recipe for data of one's own
torchrun -m engine.train            fine-tune (engine/train.py is the loop, to read and to copy)
python -m engine.evaluate runs/x    compute the metrics of a trained model on a labelled file
python -m engine.predict runs/x     write the predictions of a trained model for a file
python -m engine.study RECIPE       train a recipe under several settings and seeds, and compare
python -m engine.report runs/x      write a page with the curves and the mistakes of a run

From Python: engine.run_training, evaluate_rows, predict_rows, embed_rows, write_recipe and write_report
(engine/api.py).
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import embed_rows, evaluate_rows, predict_rows, run_training, write_recipe, write_report

__all__ = ["embed_rows", "evaluate_rows", "predict_rows", "run_training", "write_recipe", "write_report"]


def __getattr__(name: str) -> Any:
    """Import engine/api.py when one of its functions is first asked for, so that `import engine` stays light."""
    if name in __all__:
        from engine import api

        return getattr(api, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


def _refuse_shadowing_packages() -> None:
    """Exit with an error message if another package named `data` or `models` would be imported.

    A package or module in the current folder hides the engine's. A folder without `__init__.py` does not.
    """
    for name in ("data", "models"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None or found.resolve().parent.parent != Path(__file__).resolve().parent.parent:
            print(
                f"error: `import {name}` finds {found or 'nothing'}, not the engine's own package {name!r}; rename it, "
                "or set PYTHONSAFEPATH=1, which takes the current folder off the import path",
                file=sys.stderr,
            )
            raise SystemExit(2)


_refuse_shadowing_packages()
