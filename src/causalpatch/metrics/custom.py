"""A user's function as a metric."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from causalpatch.base.errors import MetricError
from causalpatch.metrics.metric import Metric
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pairs


def metric(
    function: Callable[[Outputs, Pairs], Tensor],
    *,
    name: str = "",
    position: int | str = "all",
    higher_is_better: bool = True,
    answers: tuple[Literal["answer", "wrong_answer"], ...] = (),
    compares: tuple[Literal["base", "source"], ...] = (),
    bounds: tuple[float, float] | None = None,
) -> Metric:
    """Wrap a function as a metric.

    Args:
        function: Takes ``outputs`` (see ``Outputs``; ``outputs.logits`` is ``[row, position, vocab]`` for text) and
            ``pairs``, the pair of each row, and returns a tensor ``[row]``.
        name: How results call it; the function's own name by default.
        position: The real token it reads, the name of a span of one token, or ``"all"``.
        higher_is_better: Whether the clean run is expected to have the higher value.
        answers: Which answers every pair must have. Those of several tokens are spelt out by runs that go on through
            them, so that ``outputs.answer_log_probs`` gives whole answers; the position must then be ``-1``.
        compares: Which untouched runs it compares with, through ``outputs.reference("base")`` or ``("source")``.
        bounds: Smallest and largest possible value where there are any.

    Raises:
        MetricError: The thing given is not callable. When it runs: it does not return one number per row.

    Examples:
        >>> margin = metric(lambda outputs, pairs: outputs.distribution.amax(-1), name="margin", position=-1)
        >>> margin.name
        'margin'
    """
    if not callable(function):
        raise MetricError(
            f"{function!r} is not a metric",
            facts=[("needed", "a function of (outputs, pairs)")],
            fix="give a function; built-in metrics go by name: Experiment(…, metric='logit_difference')",
        )
    return Metric(
        name or getattr(function, "__name__", "metric"),
        function,
        position=position,
        columns="all",
        needs_normaliser=True,
        higher_is_better=higher_is_better,
        answers=answers,
        compares=compares,
        spells_answers=bool(answers),
        bounds=bounds,
    )
