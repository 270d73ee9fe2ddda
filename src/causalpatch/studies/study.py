"""What a study is: a model, pairs, a metric and the steps of an investigation, as plain data that names its own run.

Where and how a study is run (``executor``, ``store``, where the model's weights lie), how many runs it may plan and
what it is called do not change what is measured, so they are left out of the hash of its content: the same study
continues on another machine.
Everything else is in it, and a changed study is another run.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from causalpatch.base.spec import content_hash

SCHEMA: Final = 1
Side: TypeAlias = Literal["discovery", "held_out", "all"]
Direction: TypeAlias = Literal["denoise", "noise"]
Carried: TypeAlias = Literal["source", "zero", "mean", "mean(over=positions)"]
MARGINS: Final = ("kl_mean", "kl_p95", "kl_p99", "perplexity", "accuracy")
Arm: TypeAlias = Literal["random", "same layers", "lowest effect", "spread", "full", "prefix", "steering"]


class Part(BaseModel):
    """A part of a study: no key that is not known, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _takes_no_truth_for_a_number(cls, given: Any) -> Any:
        """Refuse true and false where something else is meant: they would count as 1 and 0."""
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key, value in given.items() if isinstance(given, dict) else ():
            inside = value if isinstance(value, list | tuple) else [value]
            if key in fields and fields[key].annotation is not bool and any(isinstance(each, bool) for each in inside):
                raise ValueError(f"'{key}' is no choice of two, so that true and false say nothing")
        return given


class ModelPart(Part):
    """The model."""

    name: str = Field(description="zoo:NAME, a folder, or a name on the hub")
    dtype: str | None = Field(default=None, description="float32, bfloat16, …; by default the checkpoint's own")
    source_model: str | None = Field(
        default=None, description="another checkpoint of the same shape, for the source runs"
    )
    weights: Literal["host", "disk"] | None = Field(
        default=None, description="where weights lie that are fetched layer by layer; by default all are held"
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="memory of the device for weights and activations together, in GiB"
    )
    dictionaries: dict[str, str] = Field(
        default={}, description="folders of SAEs or transcoders by the name that sites use"
    )


class PairsPart(Part):
    """The pairs."""

    name: str = Field(description="a task's name, or a .jsonl, .csv or .parquet file, seen from the study's folder")
    where: dict[str, str] = Field(default={}, description="keep pairs whose columns have these values")
    first: int | None = Field(default=None, ge=1, description="keep the first N pairs")
    align: Literal["position", "difference", "spans"] | None = Field(
        default=None, description="how prompts of different lengths meet"
    )
    first_token: bool = Field(default=False, description="cut longer answers to their first token")


class SplitPart(Part):
    """How pairs are divided into those that are searched on and those that are held out, by whole components."""

    discovery: float = Field(default=0.5, gt=0, lt=1, description="share of the pairs that searches see")
    seed: int = Field(default=0, description="seed of the draw")
    by: list[str] = Field(default=[], description="columns of which the sides share no value either, such as template")


class BudgetPart(Part):
    """What may be spent."""

    runs: int | None = Field(default=None, ge=1, description="refuse a study whose steps plan more runs of the model")
    gib: float | None = Field(default=None, gt=0, description="memory for activations in GiB")


class ShardsPart(Part):
    """How much is measured and stored in one piece; shapes are part of what names a shard."""

    runs: int | None = Field(
        default=None, ge=1, description="runs of the model in a shard; by default what their plan suggests"
    )
    pairs: int | None = Field(default=None, ge=1, description="pairs in a shard, instead")
    cells: int | None = Field(default=None, ge=1, description="cells in a shard, at most")

    @model_validator(mode="after")
    def _says_one_thing(self) -> "ShardsPart":
        if self.runs is not None and (self.pairs is not None or self.cells is not None):
            raise ValueError("give runs, or pairs and cells: what has so many of these has its own number of runs")
        return self


class ExecutorPart(Part):
    """Who measures; it does not change what is measured."""

    kind: Literal["local", "processes", "ray"] = Field(
        default="local", description="in this process, one process per device, or on a Ray cluster"
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="processes, by default one per GPU, or 2 on a CPU; of Ray by default what the cluster holds",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of each; by default the cores shared evenly, of Ray its CPUs"
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1; a GPU where there is one")
    device_map: str | None = Field(
        default=None, description="auto spreads a model that is larger than one GPU over those of its worker"
    )
    address: str = Field(
        default="local",
        description="of Ray: local starts it on this machine; auto, HOST:PORT or ray://… joins a cluster",
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="of Ray: GPUs that each worker has; by default one where the cluster has any"
    )
    cpus_per_worker: float = Field(default=1, gt=0, description="of Ray: CPUs that each worker has")

    @model_validator(mode="after")
    def _spreads_no_model_over_one_device(self) -> "ExecutorPart":
        if self.kind == "processes" and self.device_map is not None:
            raise ValueError(
                "each of the processes has its model on one device, so there is nothing to spread; "
                "take device_map out, or give kind: local or kind: ray"
            )
        return self


class Step(Part):
    """What all steps have."""

    name: str = Field(
        default="", pattern=r"^[\w\-]*$", description="what results and later steps call it; by default its kind"
    )
    on: Side | None = Field(
        default=None, description="which pairs; searches see discovery pairs, claims the held-out ones"
    )


class SweepStep(Step):
    """Patch every cell of a grid."""

    kind: Literal["sweep"]
    site: str = Field(description="what is patched, such as z@-1 or resid_pre")
    over: list[str] | str | None = Field(default=None, description="axes of the grid, such as layer,head")
    value: str = Field(default="source", description="source, zero, mean, resample, noise, a number, …")
    draws: int | None = Field(default=None, ge=1, description="draws of noise or resampled values")
    window: int | None = Field(default=None, ge=1, description="patch windows of N layers together")
    frozen: list[str] = Field(default=[], description="sites that keep the base run's values in all runs")


class LocalizeStep(Step):
    """Search from the whole model down to heads and neurons."""

    kind: Literal["localize"]
    budget: str | int = Field(description="what may be spent: a number of runs, 5 min, 3 TFLOP")
    positions: list[str] | str | None = Field(default=None, description="what is told apart: each, all, or -1, a span")
    units: Literal["heads", "neurons", "all", "none"] = Field(default="all", description="which units are looked at")
    edges: bool = Field(default=False, description="measure edges between what is found, too")
    delta: float | None = Field(default=None, gt=0, description="which |effect| matters, as a share of the gap")


class AttributeStep(Step):
    """Score edges, or nodes, by gradients."""

    kind: Literal["attribute"]
    site: str | None = Field(default=None, description="nodes to score, such as z; without it edges")
    method: str | None = Field(default=None, description="edges: eap-ig, eap, …; nodes: atp, ig, atp*, relp, …")
    steps: int = Field(default=5, ge=1, description="points of integrated gradients")


class DiscoverStep(Step):
    """Find a circuit."""

    kind: Literal["discover"]
    scores: str | None = Field(
        default=None, alias="from", description="the attribute step whose scores of edges are used"
    )
    method: Literal["top", "greedy", "acdc", "hard-concrete", "ugs", "sigmoid-topk"] = Field(
        default="top", description="by scores, by runs, or by masks that are learnt"
    )
    n_edges: int | None = Field(default=None, ge=1, description="how many edges")
    fraction: float | None = Field(default=None, gt=0, le=1, description="their share of all")
    by: Literal["importance", "magnitude"] = Field(
        default="importance", description="whether what works against counts"
    )
    threshold: float | None = Field(default=None, gt=0, description="of acdc, in the metric's unit")
    steps: int = Field(default=300, ge=1, description="steps of learning")
    value: Carried = Field(default="source", description="what ablated edges carry instead")

    @model_validator(mode="after")
    def _asks_for_one_size(self) -> "DiscoverStep":
        sizes = [self.n_edges, self.fraction]
        if (self.method == "acdc") != (self.threshold is not None) or (self.method == "acdc" and any(sizes)):
            raise ValueError("acdc takes threshold, other methods n_edges or fraction")
        if self.method != "acdc" and sum(size is not None for size in sizes) != 1:
            raise ValueError("give n_edges or fraction, one of them")
        if (self.method in ("top", "greedy")) != (self.scores is not None):
            raise ValueError("top and greedy take scores from an attribute step (from:), other methods take none")
        return self


class EvaluateStep(Step):
    """Run the model with nothing but a circuit, on pairs that it was not found on."""

    kind: Literal["evaluate"]
    circuit: str = Field(alias="from", description="a discover step, or an attribute step of edges for all sizes")
    n_random: int = Field(default=20, ge=0, description="random circuits of each size")
    value: Carried = Field(default="source", description="what ablated edges carry instead")


class ConfirmStep(Step):
    """Confirm components on held-out pairs, once."""

    kind: Literal["confirm"]
    found: str | None = Field(default=None, alias="from", description="the sweep or localize step that found them")
    top: int = Field(default=3, ge=1, description="of a sweep, how many of the largest cells")
    components: list[str] = Field(default=[], description="sites or edges instead of a step")
    delta: float | None = Field(default=None, gt=0, description="share of the gap that does not count yet")
    alpha: float = Field(default=0.05, gt=0, lt=1, description="probability of even one wrong claim")
    unrelated: list[str] = Field(default=[], description="tasks or files of behaviours that should not be touched")
    checks: Literal["all", "few"] = Field(default="all", description="few leaves out the controls that cost runs")

    @model_validator(mode="after")
    def _knows_what(self) -> "ConfirmStep":
        if bool(self.found) == bool(self.components):
            raise ValueError("give components, or the step that found them (from:), one of them")
        return self


class TuneStep(Step):
    """Train what was located, and all that it must be compared with."""

    kind: Literal["tune"]
    found: str | None = Field(
        default=None, alias="from", description="the sweep, localize, discover or confirm step that located it"
    )
    top: int = Field(default=1, ge=1, description="of a sweep, how many of the largest cells")
    components: list[str] = Field(default=[], description="sites instead of a step")
    target: str = Field(description="what shall change: a file with prompt, wanted, unwanted, entities; or a task")
    retain: str = Field(description="what must stay: a text file, documents between empty lines; or a task")
    side: Literal["clean", "corrupt"] = Field(default="clean", description="of a task, whose prompts are meant")
    neighbours: str | None = Field(
        default=None, description="prompts near the target that must keep their answers; as target"
    )
    others: dict[str, str] = Field(default={}, description="prompts of other behaviours with their answers, by name")
    paraphrases: str | None = Field(default=None, description="the target in other words; only tested")
    lm_eval: list[str] = Field(default=[], description="tasks of lm-eval that must stay, where it is installed")
    way: Literal["slice", "offset", "lora"] = Field(
        default="slice", description="own rows and columns, a vector behind each, or adapters"
    )
    objective: Literal["cross_entropy", "margin"] = Field(
        default="cross_entropy", description="margin: wanted over unwanted"
    )
    keep: float = Field(default=1.0, ge=0, description="weight of the retain set in the loss")
    steps: int = Field(default=200, ge=1, description="most steps of a training")
    batch: int = Field(default=16, ge=1, description="target pairs in a step")
    ahead: float = Field(
        default=0.0, ge=0, description="nats by which the wanted answer must lead where a validation pair succeeds"
    )
    rates: list[Annotated[float, Field(gt=0)]] = Field(
        default=[0.003, 0.01, 0.03], min_length=1, description="shares of a weight's usual size that a step moves it"
    )
    arms: list[Arm] = Field(
        default=["random", "same layers", "lowest effect", "spread", "full", "prefix", "steering"],
        description="what is made beside the base and the located one",
    )
    rank: int = Field(default=4, ge=1, description="of lora: rank of the adapters")
    shared: Literal["leave", "take"] = Field(
        default="leave", description="whether keys and values are changed that other heads use too"
    )
    margins: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="what may change at most: kl_mean, kl_p95, kl_p99, perplexity, accuracy"
    )
    n_random: int = Field(default=19, ge=19, description="random draws; fewer could show nothing")
    n_seeds: int = Field(default=3, ge=1, description="trainings of each arm at the chosen rate")

    @model_validator(mode="after")
    def _knows_what(self) -> "TuneStep":
        if bool(self.found) == bool(self.components):
            raise ValueError("give components, or the step that located them (from:), one of them")
        strange = sorted(set(self.margins) - set(MARGINS))
        if strange:
            raise ValueError(f"there is no margin of {strange[0]}; there are {', '.join(MARGINS)}")
        return self


AnyStep: TypeAlias = Annotated[
    SweepStep | LocalizeStep | AttributeStep | DiscoverStep | EvaluateStep | ConfirmStep | TuneStep,
    Field(discriminator="kind"),
]
_NEEDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "discover": ("scores", ("attribute",)),
    "evaluate": ("circuit", ("discover", "attribute")),
    "confirm": ("found", ("sweep", "localize")),
    "tune": ("found", ("sweep", "localize", "discover", "confirm")),
}
_HELD_OUT: Final = ("evaluate", "confirm")


class Study(Part):
    """A study."""

    schema_version: Literal[1] = Field(alias="schema", description="version of this format")
    name: str = Field(default="study", pattern=r"^[\w\-. ]+$", description="what logs and listings call it")
    model: ModelPart
    pairs: PairsPart
    metric: list[str] = Field(default=[], description="what is measured; by default what suits the task")
    direction: Direction = Field(
        default="denoise", description="denoise: into the corrupted run; noise: into the clean one"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0], min_length=1, description="each repeats the steps; claims are made for the first"
    )
    split: SplitPart | None = Field(default=SplitPart(), description="null searches and claims on all pairs")
    budget: BudgetPart = BudgetPart()
    shards: ShardsPart = ShardsPart()
    executor: ExecutorPart = ExecutorPart()
    store: str = Field(
        default="studies",
        min_length=1,
        description="a folder seen from the study's, or an address such as s3://bucket/place",
    )
    steps: list[AnyStep] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, given: Any) -> Any:
        """Let one word stand for a part that has a name, and for a list of one."""
        if not isinstance(given, dict):
            return given
        made = dict(given)
        for part in ("model", "pairs"):
            if isinstance(made.get(part), str):
                made[part] = {"name": made[part]}
        if isinstance(made.get("metric"), str):
            made["metric"] = [made["metric"]]
        if isinstance(made.get("seeds"), int):
            made["seeds"] = [made["seeds"]]
        return made

    @property
    def hash(self) -> str:
        """Name of the run: 16 hexadecimal digits of what is measured."""
        return content_hash(self.content())

    def content(self) -> dict[str, Any]:
        """Return what is measured, as plain data with every default filled in."""
        elsewhere: Any = {"executor": True, "store": True, "name": True}
        elsewhere |= {"model": {"weights", "memory_gib"}, "budget": {"runs"}}
        plain = self.model_dump(mode="json", by_alias=True, exclude=elsewhere)
        plain["steps"] = [{**step, "name": name} for step, name in zip(plain["steps"], self.step_names, strict=True)]
        return plain

    @property
    def step_names(self) -> list[str]:
        """Name of each step, those without one called by their kind."""
        return [step.name or step.kind for step in self.steps]

    def problems(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Return what does not fit together, each with where it stands."""
        found: list[tuple[tuple[str | int, ...], str]] = []
        kinds: dict[str, str] = {}
        for number, (step, name) in enumerate(zip(self.steps, self.step_names, strict=True)):
            if name in kinds:
                found.append((("steps", number, "name"), f"two steps are called '{name}'; give one another name"))
            if self.split is None and step.on == "held_out":
                found.append(
                    (
                        ("steps", number, "on"),
                        f"step '{name}' wants held_out pairs, and 'split: null' holds none out; "
                        "give split: {discovery: 0.5}, or leave on: out",
                    )
                )
            attribute, allowed = _NEEDS.get(step.kind, ("", ()))
            wanted = getattr(step, attribute, None) if attribute else None
            if wanted is not None and kinds.get(wanted) not in allowed:
                earlier = ", ".join(each for each, kind in kinds.items() if kind in allowed) or "none"
                found.append(
                    (
                        ("steps", number, "from"),
                        f"'{wanted}' is no earlier step of the kind {' or '.join(allowed)}; there are: {earlier}",
                    )
                )
            kinds[name] = step.kind
        if len(set(self.seeds)) < len(self.seeds):
            found.append((("seeds",), "a seed is named twice"))
        return found

    def side_of(self, step: Step) -> Side:
        """Return which pairs a step is made on."""
        if self.split is None:
            return "held_out" if step.on == "held_out" else "all"  # which there are not: checks say so
        return step.on or ("held_out" if getattr(step, "kind", "") in _HELD_OUT else "discovery")

    def made_once(self, step: Step) -> bool:
        """Say whether a step is made for the first seed alone: held-out pairs can be opened once."""
        return getattr(step, "kind", "") == "confirm"
