"""A discriminator's two batches are two populations; `domains` keeps their statistics apart.

A small GAN on handwritten digits (scikit-learn). The discriminator sees real and generated images in separate passes.
With one set of running statistics they hold a mixture that is neither, and evaluation differs from training; with
two domains each pass is evaluated by its own.

    python examples/gan_domains.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from batchnorm import BatchNormAct1d, use_domain

REAL, FAKE = 0, 1


def discriminator(domains: int | None) -> nn.Sequential:
    hidden = [nn.Linear(64, 64), BatchNormAct1d(64, "leaky_relu", negative_slope=0.2, domains=domains)]
    deeper = [nn.Linear(64, 64), BatchNormAct1d(64, "leaky_relu", negative_slope=0.2, domains=domains)]
    return nn.Sequential(*hidden, *deeper, nn.Linear(64, 1))


def look(net: nn.Sequential, x: torch.Tensor, domain: int, domains: int | None) -> torch.Tensor:
    if domains is None:
        return net(x)
    with use_domain(net, domain):
        return net(x)


def gap(net: nn.Sequential, x: torch.Tensor, domain: int, domains: int | None) -> float:
    """Mean difference of the logits between training mode and evaluation, on one large batch."""
    training, evaluation = copy.deepcopy(net).train(), copy.deepcopy(net).eval()
    with torch.no_grad():
        difference = look(training, x, domain, domains) - look(evaluation, x, domain, domains)
    return difference.abs().mean().item()


def run(domains: int | None) -> tuple[float, float]:
    torch.manual_seed(0)
    real = torch.tensor(load_digits().data / 8.0 - 1.0, dtype=torch.float32)
    d = discriminator(domains)
    g = nn.Sequential(nn.Linear(16, 64), BatchNormAct1d(64, "relu"), nn.Linear(64, 64), nn.Tanh())
    d_step, g_step = (torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (d, g))
    for _step in range(200):
        x, fake = real[torch.randint(len(real), (64,))], g(torch.randn(64, 16))
        scores = look(d, x, REAL, domains), look(d, fake.detach(), FAKE, domains)
        loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        d_step.zero_grad()
        loss.backward()
        d_step.step()
        loss = F.softplus(-look(d, fake, FAKE, domains)).mean()
        g_step.zero_grad()
        loss.backward()
        g_step.step()
    fake = g(torch.randn(len(real), 16)).detach()
    return gap(d, real, REAL, domains), gap(d, fake, FAKE, domains)


def main() -> None:
    torch.set_num_threads(1)
    for domains in (None, 2):
        real, fake = run(domains)
        print(
            f"{'one set of statistics' if domains is None else 'a set for each domain'}: evaluation differs from "
            f"training by {real:.2f} on real, {fake:.2f} on generated images (mean change of the logit)"
        )


if __name__ == "__main__":
    main()
