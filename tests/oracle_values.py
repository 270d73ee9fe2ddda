"""New values as the oracle puts them in: from untouched runs of single prompts, by formulas written out again here."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import causalpatch as cp
from causalpatch.base.seeds import generator
from causalpatch.engine.drawn import draw_donors
from causalpatch.pairs import Pairs
from causalpatch.sites import Site
from oracle import Plain


def key(site: Site) -> tuple[str, int | None, int | None]:
    """Return a site as the oracle names it."""
    return site.name, site.layer, site.unit


def other(side: str) -> str:
    """Return the other side of a pair."""
    return "clean" if side == "corrupt" else "corrupt"


def donor_of(pairs: Pairs, number: int, value: cp.Resample, base: str) -> int:
    """Return which pair a pair is resampled from; which it may be is checked elsewhere."""
    return draw_donors(pairs, base, value).donor(pairs[number])


def noise_of(value: cp.Noise, site: Site, prompt: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """Return standard normal numbers for the tokens of a prompt: their stream goes by seed, draw, site and prompt.

    The site is named without its tokens: a token's noise is the same alone and among others.
    """
    whole = Site(site.name, site.layer, site.unit)
    name = f"resid_pre.{site.layer + 1}" if site.name == "resid_post" else str(whole)
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).hexdigest()
    stream = generator(value.seed, "noise", value.draw, name, digest)
    return torch.as_tensor(stream.standard_normal((len(prompt), *shape)))


def new_value(
    plain: Plain,
    pairs: Pairs,
    value: Any,
    site: Site,
    number: int,
    base: str,
    here: Sequence[int],
    there: Sequence[Sequence[int]],
) -> Any:
    """Return what is put in at tokens of one base prompt: a tensor, or a function of the current values.

    Args:
        plain: The model.
        pairs: All pairs.
        value: The value.
        site: The site.
        number: The pair.
        base: Which side is changed.
        here: Tokens of the base prompt.
        there: For each of them the tokens, of the source's prompt or the donor's, whose mean it receives.
    """
    untouched, source = pairs[number].input(base), pairs[number].input(other(base))
    match value:
        case cp.Zero():
            return torch.zeros_like
        case cp.Constant(array=array):
            return lambda current: torch.as_tensor(array).expand(current.shape)
        case cp.Mean(over=over, side=side, per_group=per_group):
            chosen = [pair for pair in pairs if not per_group or pair.group == pairs[number].group]
            runs = [plain.value(pair.input(side), key(site)) for pair in chosen]
            if site.info.has_keys:  # rows over the keys of the longest prompt, the further ones hidden
                n, hidden = max(map(len, runs)), -torch.inf if site.name == "scores" else 0.0
                runs = [functional.pad(run, (0, n - run.shape[-1]), value=hidden) for run in runs]
                means = [torch.stack([run[t] for run in runs if len(run) > t]).mean(0) for t in here]
                return torch.stack(means)[:, : len(untouched)]
            if over == "positions":
                return torch.cat(runs).mean(0).expand(len(here), *runs[0].shape[1:])
            return torch.stack([torch.stack([run[t] for run in runs if len(run) > t]).mean(0) for t in here])
        case cp.Identity():
            return plain.value(untouched, key(site))[list(here)]
        case cp.Function(function=function, needs_source=False):
            return lambda current: function(current, current)
        case cp.Steer(array=array, strength=strength):
            return lambda current: current + strength * torch.as_tensor(array)
        case cp.ProjectOut(array=array):
            direction = torch.as_tensor(array / np.sqrt((array**2).sum()))
            return lambda current: current - torch.einsum("ew,w,v->ev", current, direction, direction)
        case cp.Noise(sigma=sigma):
            return lambda current: (
                current + sigma * noise_of(value, site, untouched, current.shape[1:])[list(here)].to(current)
            )
        case cp.Fitted(array=array, by_position=by_position):
            return torch.as_tensor(array)[list(here)] if by_position else lambda x: torch.as_tensor(array).expand_as(x)
        case cp.Resample(side=side):
            source = pairs[donor_of(pairs, number, value, base)].input(side)
    whole = plain.value(source, key(site))
    taken = torch.stack([whole[list(tokens)].mean(0) for tokens in there])
    if isinstance(value, cp.Interpolate):
        if site.info.has_keys:  # where both hide a key it stays hidden, whatever the arithmetic makes of it
            return torch.lerp(plain.value(untouched, key(site))[list(here)], taken, value.alpha).nan_to_num(0.0)
        return (1 - value.alpha) * plain.value(untouched, key(site))[list(here)] + value.alpha * taken
    return (lambda current: value.function(current, taken)) if isinstance(value, cp.Function) else taken
