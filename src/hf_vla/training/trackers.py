"""Where a training is watched: trackio, tensorboard, wandb and whatever else transformers reports to."""

from collections.abc import Sequence
from difflib import get_close_matches

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


def check_trackers(names: Sequence[str]) -> None:
    """Raise before anything is loaded where `training.report_to` names a tracker that will not start.

    Args:
        names (`Sequence[str]`): as in `TrainingArguments.report_to`.

    Raises:
        ValueError: one is unknown, or not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            close = get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {sorted(INTEGRATION_TO_CALLBACK)}."
            raise ValueError(f"training.report_to: no tracker is called {name!r}; {hint}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # looks for its package and imports it
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"training.report_to: {name} is not installed: `pip install {name.replace('_', '-')}`, or leave it "
                f"out. ({error})"
            ) from error
