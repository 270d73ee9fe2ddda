"""Tasks of EleutherAI's evaluation harness as a user's evaluation of a tuned model, where ``lm_eval`` is installed.

A task gives a number for each of its documents, so that its drop has an interval over documents.

References:
    Gao et al. 2024, "The Language Model Evaluation Harness", 10.5281/zenodo.12608602.
"""

from typing import TYPE_CHECKING, Any

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.base.extras import lazy
from causalpatch.models import Model
from causalpatch.tuning.data import Evaluate

if TYPE_CHECKING:
    lm_eval: Any = None
    huggingface: Any = None
else:
    lm_eval = lazy("lm_eval")
    huggingface = lazy("lm_eval.models.huggingface")


def lm_eval_task(task: str, *, metric: str = "acc", limit: int | None = None, batch_size: int = 8) -> Evaluate:
    """Return an evaluation for ``TuningData``: what a model gets in a task of lm-eval, document by document.

    Args:
        task: Its name, or that of a group of tasks.
        metric: Which of the task's numbers is taken; larger must be better.
        limit: Documents of each task, at most.
        batch_size: Requests in a forward.

    Returns:
        A function of a model. It raises ``MissingExtra`` where lm-eval is not installed, ``SettingError`` where the
        task has no such number, and ``ModelUnsupported`` for models without a tokenizer of transformers.

    Examples:
        >>> import causalpatch as cp
        >>> evaluate = {"lambada": cp.lm_eval_task("lambada_openai", limit=200)}

    Cost:
        The harness runs the task once for each changed model, which is each seed of each arm.
    """

    def evaluate(model: Model) -> list[float]:
        tokenizer = getattr(model.tokenizer, "tokenizer", None)
        if tokenizer is None:
            raise ModelUnsupported(
                f"lm-eval needs a tokenizer of transformers, and '{model.name}' has none",
                fix="open the model with one: open_model(module, tokenizer=tokenizer)",
            )
        runs = huggingface.HFLM(pretrained=model.module, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=runs, tasks=[task], limit=limit, log_samples=True)
        return [score for _, samples in sorted(found["samples"].items()) for score in _scores(samples, task, metric)]

    evaluate.__name__ = f"lm_eval {task}, {metric}"
    return evaluate


def _scores(samples: list[dict[str, Any]], task: str, metric: str) -> list[float]:
    """Return a metric of each document, of the first filter of what a model wrote; in the documents' order."""
    found: dict[int, float] = {}
    for sample in samples:
        if metric not in sample:
            known = [name for name, value in sample.items() if isinstance(value, int | float) and name != "doc_id"]
            raise SettingError(
                f"task '{task}' of lm-eval gives no {metric!r}",
                facts=[("known", ", ".join(known))],
                fix=f"lm_eval_task({task!r}, metric={(known or ['exact_match'])[0]!r})",
            )
        found.setdefault(int(sample["doc_id"]), float(sample[metric]))
    return [found[number] for number in sorted(found)]
