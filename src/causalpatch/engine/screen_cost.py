"""What a screen would cost: the same arithmetic in few bits first, and again in float32 as far as a decision needs it.

Which interventions are measured again is known only in the run, so that there are two numbers for it: about the least,
a random sample at the mean cost of an intervention that leads to what is read, and the most, everything.

    least = untouched + n_sample / n_leading * asked
    most  = 2 * untouched + asked

The untouched runs are made anew in every pass: the controls, the screen, the sample with the largest, and what the
noise leaves open.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """What one pass over the interventions that were asked for needs, all of them in one precision.

    Args:
        token_layers: Tokens that are computed in a layer, summed over layers.
        flops: Floating-point operations of the patched runs.
        linear_flops: At most so many of them are in the layers' linear maps.
        untouched_flops: Floating-point operations of the untouched runs, which every pass makes.
    """

    token_layers: int
    flops: float
    linear_flops: float
    untouched_flops: float


@dataclass(frozen=True)
class Choice:
    """What is screened, and what of it is measured again.

    Args:
        n_cells: Interventions that are screened.
        n_leading: About how many of them lead to what is read, so that they are not known beforehand.
        n_sample: How many of these are measured again at random.
        top_k: How many of the largest must be those of float32.
    """

    n_cells: int
    n_leading: float
    n_sample: int
    top_k: int


@dataclass(frozen=True)
class ScreenCost:
    """What a screen would cost.

    Args:
        product: How linear maps are multiplied.
        gain: How many times as fast as in float32 a linear map is here, or None where that was not measured.
        choice: What is screened, and what of it is measured again.
        flops: Floating-point operations before anything is measured again, controls and untouched runs included.
        few_bits_flops: At most so many of them are multiplied in few bits.
        again_flops: Those of what is measured again: about the least, and the most.
        again_token_layers: Tokens that are computed in a layer again, summed over layers: likewise.
        record_bytes: Bytes that are kept of the untouched runs for the products.
        cast_bytes: Bytes of the weights in few bits.
    """

    product: str
    gain: float | None
    choice: Choice
    flops: float
    few_bits_flops: float
    again_flops: tuple[float, float]
    again_token_layers: tuple[int, int]
    record_bytes: int
    cast_bytes: int

    @property
    def total_flops(self) -> tuple[float, float]:
        """Floating-point operations in all: about the least, and the most."""
        least, most = self.again_flops
        return self.flops + least, self.flops + most

    @property
    def is_open(self) -> bool:
        """Whether only the run can tell how much is measured again."""
        return self.again_flops[0] < self.again_flops[1]

    @property
    def tokens_again(self) -> str:
        """Tokens that are computed in a layer again, as a text."""
        least, most = (f"{tokens:,}" for tokens in self.again_token_layers)
        return f"about {least} to {most}" if self.is_open else f"about {least}"

    @property
    def arithmetic(self) -> str:
        """The operations of both parts, as a text."""
        least, most = (f"{flops / 1e9:,.1f}" for flops in self.again_flops)
        again = f"about {least} to {most}" if self.is_open else f"about {least}"
        return f"{self.flops / 1e9:,.1f} GFLOP, then {again} again,"

    def seconds(self, rate: float) -> tuple[float, float] | None:
        """Return the seconds of the arithmetic, with the least and with everything again; None without a gain.

        Args:
            rate: Floating-point operations per second that the device reaches in float32.
        """
        if not self.gain:
            return None
        saved = self.few_bits_flops * (1 - 1 / self.gain)
        least, most = self.total_flops
        return (least - saved) / rate, (most - saved) / rate

    def lines(self) -> list[tuple[str, str]]:
        """Return what is screened, and what is measured again."""
        fast = f", where a linear map is {self.gain:g} times as fast as in float32" if self.gain else ""
        again = f"in float32: {self.choice.n_sample} at random"
        if self.choice.top_k:
            again += f", the {self.choice.top_k} largest, and what the noise leaves open, known only in the run"
        return [("screen", f"all {self.choice.n_cells:,} in {self.product} first{fast}"), ("again", again)]


def screen_cost(
    one: Pass,
    plain_flops: float,
    few_bits_share: float,
    *,
    choice: Choice,
    product: tuple[str, float | None],
    n_bytes: tuple[int, int],
) -> ScreenCost:
    """Count what a screen would cost.

    Args:
        one: What one pass needs.
        plain_flops: Floating-point operations of the same in float32: one pass, the controls and the means.
        few_bits_share: Share of the linear maps' weights that are multiplied in few bits.
        choice: What is screened, and what of it is measured again.
        product: How linear maps are multiplied, and the gain.
        n_bytes: Bytes of records, and of weights in few bits.
    """
    share = min(1.0, choice.n_sample / max(1.0, choice.n_leading))
    least = one.untouched_flops + share * one.flops, round(share * one.token_layers)
    # Without a decision only the sample is measured again, and what it costs is known on average.
    most = (2 * one.untouched_flops + one.flops, one.token_layers) if choice.top_k else least
    return ScreenCost(
        product=product[0],
        gain=product[1],
        choice=choice,
        flops=plain_flops + one.untouched_flops,
        few_bits_flops=few_bits_share * one.linear_flops,
        again_flops=(least[0], most[0]),
        again_token_layers=(least[1], most[1]),
        record_bytes=n_bytes[0],
        cast_bytes=n_bytes[1],
    )
