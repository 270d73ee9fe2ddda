"""A hypothesis: a causal model, where in a network its variables are, and how its inputs and outputs are written.

1. ``mapping`` names for each variable the site, or the sites, that are said to hold it. Variables without sites are not
   claimed to be anywhere.
2. ``encode`` writes an input of the algorithm as a prompt; or ``inputs`` reads the algorithm's input off a prompt that
   is there already.
3. ``answers`` says which token (or class) an output of the algorithm is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from causalpatch.algorithms.causal_model import CausalModel
from causalpatch.base.errors import AlgorithmError, PatchError, SettingError
from causalpatch.base.seeds import generator
from causalpatch.models import Model
from causalpatch.pairs import Pair
from causalpatch.pairs.role import Role
from causalpatch.patches import Patch
from causalpatch.patches.patch import Alignment
from causalpatch.sites import Every, Site, SiteSet, expand, parse

Sites: TypeAlias = str | Site | SiteSet | Sequence[str | Site | SiteSet]
Read = Literal["answers", "vocabulary"]


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """Where the variables of an algorithm are said to be.

    Args:
        algorithm: The causal model.
        mapping: For each variable (or input) that is said to be somewhere, its site or sites, with their positions:
            ``{"subject": "z.2.1@-1", "total": ["mlp_out.3@-1", "mlp_out.4@-1"]}``. All sites of a variable are
            patched together.
        encode: Writes an input of the algorithm as a prompt. It is called with the inputs by name and returns a text,
            a list of token ids, an array for models that are not text, or ``{"prompt": …, "spans": …}`` with spans as
            ``load_pairs`` reads them.
        inputs: Reads the algorithm's input off a pair's prompt, instead of ``encode``: called with the pair and
            ``"clean"`` or ``"corrupt"``, it returns the inputs by name.
        answers: The answers that an output of the algorithm stands for, by output or as a function of it: a token id
            or class, a text as it follows the prompt, or a list of these that all count. By default the output is a
            token id or class itself.
        read: What the network answers: ``"answers"``, the likeliest of the algorithm's possible answers, or
            ``"vocabulary"``, the likeliest token of all.
        position: The real token at which the answer is read.
        align: How spans of unequal lengths meet; see ``Patch``.

    Raises:
        AlgorithmError: The mapping is empty, names a variable that is unknown or that the output does not depend on, or
            says of one place that it holds two variables.
        SiteSyntaxError: A text is not a site.
        SettingError: ``read`` is unknown.

    Examples:
        >>> adding = CausalModel({"ab": lambda a, b: a + b, "total": lambda ab, c: ab + c}, ["a", "b", "c"])
        >>> print(Hypothesis(adding, {"ab": "mlp_out.0@1"}))
        ab at mlp_out.0@1
    """

    algorithm: CausalModel
    mapping: Mapping[str, Sites]
    encode: Callable[..., Any] | None = None
    inputs: Callable[[Pair, Role], Mapping[str, Any]] | None = None
    answers: Mapping[Any, Any] | Callable[[Any], Any] | None = None
    read: Read = "answers"
    position: int = -1
    align: Alignment | None = None
    places: Mapping[str, tuple[Site | SiteSet, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.mapping:
            raise AlgorithmError(
                f"the hypothesis says of no variable of '{self.algorithm.name}' where it is",
                facts=[("variables", ", ".join(self.algorithm.order))],
                fix=f'mapping={{"{self.algorithm.order[0]}": "resid_post.2@-1"}}',
            )
        for name in self.mapping:
            self._require_use(name)
        if self.read not in get_args(Read):
            raise SettingError(
                f"read cannot be {self.read!r}", facts=[("known", ", ".join(get_args(Read)))], fix='read="answers"'
            )
        places = {name: _places(name, sites) for name, sites in self.mapping.items()}
        object.__setattr__(self, "places", MappingProxyType(places))
        _refuse_shared([(name, site) for name, sites in places.items() for site in sites])

    def __str__(self) -> str:
        return "; ".join(f"{name} at {' + '.join(map(str, sites))}" for name, sites in self.places.items())

    @property
    def variables(self) -> tuple[str, ...]:
        """What is mapped, parents before their children."""
        return tuple(name for name in (*self.algorithm.inputs, *self.algorithm.order) if name in self.places)

    def sites(self, model: Model) -> dict[str, tuple[Site, ...]]:
        """Return the sites of each variable in a model, each of them checked.

        Raises:
            SiteNotFound: A site is not in the model.
            SiteUnsupported: The model does not have such sites.
            AlgorithmError: Two variables have a site in common.
        """
        found = {
            name: tuple(each for site in self.places[name] for each in expand(site, model.shape))
            for name in self.variables
        }
        _refuse_shared([(name, site) for name, sites in found.items() for site in sites])
        for sites in found.values():
            for site in sites:
                model.tap(site)
        return found

    def patches(self, sites: Sequence[Site], value: Any = None) -> tuple[Patch, ...]:
        """Return patches of some sites, all with one value, the source run's by default."""
        return tuple(Patch(site, value, self.align) for site in sites)

    def only(self, variables: Sequence[str]) -> "Hypothesis":
        """Return the hypothesis about some of its variables; of the others it says nothing.

        Raises:
            AlgorithmError: A variable is not mapped, or none is left.
        """
        for name in variables:
            self.require(name)
        return self._with({name: self.mapping[name] for name in self.variables if name in variables})

    def shuffled(self, seed: int = 0) -> "Hypothesis":
        """Return the hypothesis with the sites dealt out to other variables: none keeps its own.

        Args:
            seed: Seed of the draw.

        Raises:
            AlgorithmError: Only one variable is mapped.
        """
        names = self.variables
        if len(names) < 2:
            raise AlgorithmError(
                "the sites of one variable cannot be dealt out to others",
                facts=[("mapped", ", ".join(names))],
                fix="map a second variable",
            )
        # A random order, moved on by one: a cycle through all variables.
        order = [names[i] for i in generator(seed, "shuffled mapping", *names).permutation(len(names)).tolist()]
        moved = dict(zip(order, [*order[1:], order[0]], strict=True))
        return self._with({name: self.mapping[moved[name]] for name in names})

    def require(self, name: str) -> None:
        """Make sure that a variable is mapped.

        Raises:
            AlgorithmError: It is not.
        """
        self.algorithm.require(name)
        if name not in self.places:
            raise AlgorithmError(
                f"the hypothesis does not say where {name!r} is",
                facts=[("mapped", ", ".join(self.variables))],
                fix=f'add it to the mapping: {{"{name}": "resid_post.2@-1"}}',
            )

    def _require_use(self, name: str) -> None:
        """Make sure that a variable exists and that the output depends on it."""
        model = self.algorithm
        model.require(name)
        if name != model.output and name not in model.depends_on(model.output, (name,)):
            raise AlgorithmError(
                f"the output of '{model.name}' does not depend on {name!r}, so that nothing can be said of its place",
                facts=[("output", f"{model.output}({', '.join(model.parents[model.output])})")],
                fix="leave it out of the mapping",
            )

    def describe(self) -> dict[str, Any]:
        """Return the hypothesis as plain data, for records; functions by the parents that they name."""
        model = self.algorithm
        return {
            "algorithm": model.name,
            "inputs": list(model.inputs),
            "variables": {name: list(model.parents[name]) for name in model.order},
            "output": model.output,
            "mapping": {name: [str(site) for site in sites] for name, sites in self.places.items()},
            "read": self.read,
            "position": self.position,
            "align": self.align,
        }

    def _with(self, mapping: Mapping[str, Sites]) -> "Hypothesis":
        kept = (self.encode, self.inputs, self.answers, self.read, self.position, self.align)
        return Hypothesis(self.algorithm, mapping, *kept)


def _places(name: str, sites: Sites) -> tuple[Site | SiteSet, ...]:
    listed = [sites] if isinstance(sites, str | Site | SiteSet) else list(sites)
    strange = next((site for site in listed if not isinstance(site, str | Site | SiteSet)), None)
    if not listed or strange is not None:
        raise PatchError(
            f"{name!r} is mapped to {'no site' if not listed else repr(strange)[:60]}",
            fix=f'name a site, or several: {{"{name}": ["z.2.1@-1", "z.3.0@-1"]}}',
        )
    return tuple(parse(site) for site in listed)


def _refuse_shared(places: Sequence[tuple[str, Site | SiteSet]]) -> None:
    """Refuse a place that holds two variables: its value would be both or neither."""
    seen: dict[str, list[tuple[str, Site | SiteSet]]] = {}
    for name, site in places:
        others = seen.setdefault(str(site.at(None)), [])
        for other, held in others:
            is_everywhere = any(each.position is None or isinstance(each.position, Every) for each in (site, held))
            if site.position == held.position or is_everywhere:
                what = f"{name!r} twice" if name == other else f"{other!r} and {name!r}"
                raise AlgorithmError(
                    f"one place is said to hold {what}",
                    facts=[(other, held), *([(name, site)] if name != other else [])],
                    fix="map each variable to places of its own, such as single heads or tokens",
                )
        others.append((name, site))
