"""Other people's trainers take a Loader as it is."""

import accelerate
import lightning
import pytest
import torch
from loops import EPOCHS, loader
from torch import nn

from scae_dali import mixed_cross_entropy


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))


class Module(lightning.LightningModule):
    """Counts the steps, and keeps the loader's state in the checkpoint as Lightning does it."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = network(), []

    def training_step(self, batch, step):
        self.seen.append((self.current_epoch, batch.ids.tolist()))
        logits = self.net(batch.images)
        return mixed_cross_entropy(logits, batch.labels, batch.partners, batch.mu)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(index, folder, *, resume=None, epochs=EPOCHS, steps=-1, every=0):
    """A run of Lightning's Trainer: what it saw, and its weights."""
    module = Module()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, filename="{step}",
        every_n_train_steps=every or None, every_n_epochs=None if every else 1,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, max_steps=steps, callbacks=[saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(index), ckpt_path=resume)
    return module.seen, module.net[2].weight.detach().clone()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stop", [4, 6, 8, 12], ids="step {}".format)
def test_lightning_takes_every_step_once_after_a_resume(index, tmp_path, stop):
    """Six steps an epoch: a stop within an epoch, and at the end of one."""
    wanted, weights = fit(index, tmp_path / "whole")
    assert len(wanted) == 6 * EPOCHS
    seen, _ = fit(index, tmp_path / "first", steps=stop, every=2)
    assert seen == wanted[:stop]
    rest, again = fit(index, tmp_path / "second", resume=tmp_path / "first" / f"step={stop}.ckpt")
    assert rest == wanted[stop:]
    assert torch.equal(again, weights)


def accelerated(index, folder, *, load=None, stop=None):
    """A loop by accelerate, whose state is saved after `stop` steps: what it saw, and weights."""
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    batches = loader(index)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimiser, batches = accelerator.prepare(net, optimiser, batches)
    accelerator.register_for_checkpointing(batches)
    if load is not None:
        accelerator.load_state(load)
    seen = []
    for epoch in range(batches.epoch, EPOCHS):
        for batch in batches:
            seen.append((epoch, batch.ids.tolist()))
            batch = batch.to(accelerator.device)
            loss = mixed_cross_entropy(net(batch.images), batch.labels, batch.partners, batch.mu)
            optimiser.zero_grad()
            accelerator.backward(loss)
            optimiser.step()
            if len(seen) == stop:
                accelerator.save_state(folder)
                return seen, None
    return seen, net[2].weight.detach().clone()


@pytest.mark.parametrize("stop", [4, 6, 23], ids="step {}".format)
def test_accelerate_saves_and_loads_the_loader(index, tmp_path, stop):
    wanted, weights = accelerated(index, tmp_path)
    assert len(wanted) == 6 * EPOCHS
    seen, _ = accelerated(index, tmp_path / "state", stop=stop)
    rest, again = accelerated(index, tmp_path, load=tmp_path / "state")
    assert seen + rest == wanted
    assert torch.equal(again, weights)
