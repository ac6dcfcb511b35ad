"""A GAN: each network has an optimizer, a loss and so a λ_c of its own.

The generator's is unbounded: however far its pixels are driven into tanh's ends, the critic does not notice.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sharpkern

torch.manual_seed(0)
images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())
critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
monitors = {
    "critic": sharpkern.Monitor(critic, of_critic, every=25),
    "generator": sharpkern.Monitor(generator, of_generator, every=25),
}

for _ in range(101):
    real, noise = images[torch.randint(len(images), (128,))], torch.randn(128, 16)
    fake = generator(noise).detach()  # outside of the closure: the critic's update does not change it

    def critic_loss():
        return F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()

    of_critic.zero_grad()
    loss = critic_loss()
    loss.backward()
    if monitors["critic"](critic_loss, loss=loss):
        print("critic   ", monitors["critic"])
    of_critic.step()

    def generator_loss():
        return F.softplus(-critic(generator(noise))).mean()

    of_generator.zero_grad()
    loss = generator_loss()
    loss.backward()
    if monitors["generator"](generator_loss, loss=loss):
        print("generator", monitors["generator"])
    of_generator.step()
