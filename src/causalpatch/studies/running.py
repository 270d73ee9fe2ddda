"""Running a study, from wherever it was stopped.

1. Open the model and read the pairs; check what can be checked.
2. Begin the run, or find it: the study's hash names it. Hashes of model and pairs must be those that it was begun with.
3. Go through seeds and steps in order. A step that is finished and whole is read; any other one is made, out of the
   store as far as its shards are there.
4. Whatever stops it, leases are given back and the log is closed. What was finished stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causalpatch.studies.checking import Checked, check
from causalpatch.studies.clusters import Cluster
from causalpatch.studies.executors import Bench, Executor, Local, Post
from causalpatch.studies.journal import Journal, Listener, describe_environment
from causalpatch.studies.kept_arms import KeptArms
from causalpatch.studies.leases import TIME_S, Leases
from causalpatch.studies.opened import Opened, device_of, n_workers, threads_of, using_threads
from causalpatch.studies.openings import StoreLedger
from causalpatch.studies.processes import Processes
from causalpatch.studies.results import Result, Results
from causalpatch.studies.scheduling import Crewed
from causalpatch.studies.shards import forget
from causalpatch.studies.steps import Making, make
from causalpatch.studies.store import Run
from causalpatch.studies.stored_runs import StoredRuns
from causalpatch.studies.study import AnyStep, Study


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end.

    Args:
        run: Where everything is.
        results: What each step found, by name; with several seeds ``STEP-seedN``.
    """

    run: Run
    results: Mapping[str, Result]


def run_study(
    study: Study, folder: str | Path = ".", *, listeners: tuple[Listener, ...] = (), lease_s: float = TIME_S
) -> Finished:
    """Run a study, or go on with it where it was stopped.

    Args:
        study: The study.
        folder: What paths in it are seen from, its store among them.
        listeners: Who is told of each event, such as what shows progress.
        lease_s: After how many seconds without a sign of life another machine's work counts as abandoned.

    Returns:
        The run and its results.

    Raises:
        StoreFull: There is no room; everything finished is kept, and running again goes on.
        StoreUnreachable: The store does not answer.
        StoreCorrupt: The run was begun with another model or other pairs of the same names.
        WorkerLost: A shard ended one worker after the other.
        MissingExtra: The study is to run on Ray, which is not installed.
        ClusterUnreachable: The Ray cluster does not answer, or has no room for a worker.
        CausalPatchError: What ``check`` or a step refuses.

    Examples:
        >>> from causalpatch.studies.reading import parse_study
        >>> text = "{schema: 1, model: 'zoo:stories', pairs: {name: ioi, first: 8}, "
        >>> study = parse_study(text + "split: null, steps: [{kind: sweep, site: 'z.3@-1'}]}", "small.yaml")
        >>> run_study(study).results["sweep"].dims
        ('layer', 'head', 'pair')
    """
    opened = Opened(study, Path(folder))
    threads = threads_of(study.executor)
    with using_threads(threads):
        return _run(opened, threads, listeners, lease_s)


def _run(opened: Opened, threads: int, listeners: tuple[Listener, ...], lease_s: float) -> Finished:
    study = opened.study
    checked = check(opened)
    run = opened.store.run_of(study)
    run.begin(study, opened.facts(), describe_environment())
    journal = Journal(run, listeners)
    leases, executor = run.leases(lease_s), _executor(opened, run)
    try:
        workers = {"kind": study.executor.kind, "workers": executor.n_workers, "threads": threads}
        journal.open({"executor": workers, "device": str(opened.model.device), "facts": opened.facts()})
        runs = StoredRuns(run, executor, leases, journal, study.shards)
        opened.runner = runs
        results = _Session(opened, run, runs, journal, checked).go()
        journal.tell("finished", results=list(results))
    except BaseException as error:
        journal.tell("stopped", error=type(error).__name__, what=str(error).partition("\n")[0])
        raise
    finally:
        _let_go(executor, leases, journal)
    return Finished(run, results)


def result_name(study: Study, step: str, seed: int) -> str:
    """Return what the results of a step are called for a seed.

    Args:
        study: The study.
        step: Name of the step.
        seed: The seed.
    """
    return step if len(study.seeds) == 1 else f"{step}-seed{seed}"


def names_of_results(study: Study) -> list[tuple[str, int, AnyStep]]:
    """Return the name of every result in the order in which they are made, with its seed and step."""
    return [
        (result_name(study, name, seed), seed, step)
        for seed in study.seeds
        for step, name in zip(study.steps, study.step_names, strict=True)
        if seed == study.seeds[0] or not study.made_once(step)
    ]


@dataclass
class _Session:
    """One going through of all steps."""

    opened: Opened
    run: Run
    runs: StoredRuns
    journal: Journal
    checked: Checked

    def go(self) -> dict[str, Result]:
        """Make all steps, and return what they found."""
        study, kept = self.opened.study, Results(self.run)
        asked = names_of_results(study)
        planned = {step.name: step.patched for step in self.checked.steps}
        found: dict[str, Result] = {}
        for number, (name, seed, step) in enumerate(asked, start=1):
            about = {"name": name, "number": number, "of": len(asked), "kind": step.kind}
            if kept.is_whole(name):
                found[name] = kept.load(name)
                self.journal.tell("step was there", **about)
                continue
            own = step.name or step.kind
            self.journal.tell("step", **about, runs=planned[own])
            found[name] = self._make(step, name, seed, found)
            facts: dict[str, Any] = {"step": own, "seed": seed, "kind": step.kind, "session": self.journal.session}
            kept.write(name, found[name], self.runs.calls, facts)
            self.journal.tell("step done", **about)
        return found

    def _make(self, step: AnyStep, name: str, seed: int, found: Mapping[str, Result]) -> Result:
        study = self.opened.study
        experiment = self.opened.experiment(study.side_of(step), seed)
        ledger = StoreLedger(self.run, name)
        earlier = {each: found[key] for each in study.step_names if (key := result_name(study, each, seed)) in found}
        self.runs.calls.clear()
        self.runs.before_first = None
        if study.made_once(step):
            # Its shards stay in the store: they are seen from the moment that the first is measured.
            self.runs.before_first = lambda: ledger.write(experiment, f"{self.run.hash}/{name}")
        kept = KeptArms(self.run, self.journal)
        return make(step, Making(self.opened, experiment, seed, earlier, ledger, kept))


def _executor(opened: Opened, run: Run) -> Executor:
    part, threads = opened.study.executor, threads_of(opened.study.executor)
    if part.kind == "local":
        return Local(Bench(run, *opened.models, threads))
    address, folder = run.store.address, str(opened.folder.absolute())  # workers may stand in other folders
    address = address if "://" in address else str(Path(address).absolute())
    post = Post(address, run.hash, opened.study.model, folder, "cpu", threads)
    if part.kind == "ray":
        return Crewed(Cluster(part, post))
    devices = [device_of(part, number) or "cpu" for number in range(n_workers(part))]
    return Crewed(Processes([replace(post, device=device) for device in devices]))


def _let_go(executor: Executor, leases: Leases, journal: Journal) -> None:
    """Let workers and leases go; a store that does not take it any more lets leases run out by themselves."""
    try:
        executor.close()
    finally:
        try:
            leases.close()
        finally:
            journal.close()
            forget()
