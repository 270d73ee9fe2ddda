"""Any module, any input: which channels of a small network tell a horizontal bar from a vertical one?

The network is made and trained here, in seconds, and knows nothing of this library. Its activations are named by
``module(PATH)`` sites, the inputs are pairs of images, and the metric is a function of our own.

    python examples/your_own_model.py
"""

import torch
from torch import Tensor, nn

import causalpatch as cp

SIZE, N_PAIRS = 12, 40


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    network = train(generator)

    # A pair: the same noise with a horizontal bar (clean) and with a vertical one (corrupted).
    noise, place = background(N_PAIRS, generator)
    upright = torch.ones(N_PAIRS, dtype=torch.bool)
    pairs = cp.Pairs.from_arrays(
        draw(noise, place, ~upright), draw(noise, place, upright), [0] * N_PAIRS, [1] * N_PAIRS
    )
    model = cp.open_model(network)
    experiment = cp.Experiment(model, pairs, metric=cp.metric(margin), direction="denoise")
    print(f"{experiment.baseline}\n")

    layers = cp.sweep(experiment, "module(*).output")
    print("recovered by a whole layer: everything goes through each of them")
    for row in layers.summary().to_dict("records"):
        print(f"  {row['intervention']:22} {row['recovered']:.2f}")

    channels = cp.sweep(experiment, "module(first).output axes=(channel,height,column)", over="channel")
    print("\nrecovered by one channel of the first layer")
    for row in channels.summary().to_dict("records"):
        print(f"  {row['channel']}: {row['recovered']:z5.2f}, interval {row['low']:z5.2f} to {row['high']:z5.2f}")

    best = channels.top(2)["channel"].tolist()
    together = experiment.run([[f"module(first).output axes=(channel,height,column)#{channel}" for channel in best]])
    parts = channels.recovered().sel(channel=best).sum().item()
    print(f"\nchannels {best[0]} and {best[1]} in one run: {together.recovered().item():.2f}; one by one: {parts:.2f}")


def margin(outputs: cp.Outputs, pairs: cp.Pairs) -> Tensor:
    """Logit of horizontal minus logit of vertical, one number per row."""
    return outputs.logits[:, 0] - outputs.logits[:, 1]


class Network(nn.Module):
    """Two convolutions, their mean over the image, and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.classes = nn.Linear(8, 2)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of horizontal and vertical."""
        seen = torch.relu(self.second(torch.relu(self.first(image))))
        return self.classes(seen.mean((2, 3)))


def train(generator: torch.Generator) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(300):
        noise, place = background(64, generator)
        upright = torch.rand(64, generator=generator) < 0.5
        loss = nn.functional.cross_entropy(network(draw(noise, place, upright)), upright.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def background(n_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noise and the place of a bar in each image."""
    noise = 0.3 * torch.randn(n_images, 1, SIZE, SIZE, generator=generator)
    return noise, torch.randint(SIZE, (n_images,), generator=generator)


def draw(noise: Tensor, place: Tensor, upright: Tensor) -> Tensor:
    """Draw a bar into each image: along a column where ``upright``, else along a row."""
    along = torch.arange(SIZE)[None] == place[:, None]
    bar = torch.where(upright[:, None, None], along[:, None, :], along[:, :, None])
    return noise + bar[:, None]


if __name__ == "__main__":
    main()
