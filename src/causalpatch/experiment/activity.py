"""What features are at patched tokens, before any patch is made."""

from causalpatch.engine import Activity, read_activity, without_controls
from causalpatch.experiment.experiment import Experiment
from causalpatch.patches import Intervention, Patch


def activity(experiment: Experiment, patch: Patch) -> Activity:
    """Read all features of a dictionary in the untouched runs, at the tokens that a patch of one of them would write.

    Args:
        experiment: Model, pairs and direction.
        patch: A patch of any feature of the dictionary.

    Raises:
        SiteNotFound: The dictionary, or the layer, is not known.
        PairError: A pair does not have the tokens.

    Cost:
        Two runs per pair.
    """
    return read_activity(without_controls(experiment.job([Intervention((patch,))])))
