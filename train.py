"""Train a network on image folders, lists or CIFAR, with SCAE or another method.

    python train.py --config pipelines/imagenet_resnet50.yaml --data.root /data/imagenet --out run
    torchrun --nproc-per-node 8 train.py --config … --data.root … --out …
    python train.py --help

An epoch is: the saliency pass if one is due, training, checkpoint, validation, metrics. Killed at
any time, a run goes on with --resume from its last checkpoint, within an epoch or a pass.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import torch
from tqdm import tqdm

from pipelines import resume as resuming
from pipelines.recipe import Config, autocast
from pipelines.state import State
from scae_dali.checks import check
from scae_dali.data.broken import look
from scae_dali.plan import schedule
from scae_dali.stage.loader import Batch, ImageError
from scae_dali.training import checkpoint, lock
from scae_dali.training.divergence import check_finite, sound
from scae_dali.training.evaluation import Evaluation
from scae_dali.training.log import closing, save_picture, summary
from scae_dali.training.ranks import Ranks
from scae_dali.training.second_stage import set_train_mode

LOOK_S = 5.0  # at the files of validation, before an epoch is trained in vain


class Run(State):
    """A run, epoch by epoch."""

    def saliency_pass(self) -> None:
        """Refresh the cache if a pass is due by this epoch and has not been made."""
        due = None if self.guide is None else self.guide.due(self.epoch)
        if self.guide is None or due is None:
            return
        start = time.perf_counter()
        self.loader = None  # it has planned ahead with the old maps
        gc.collect()  # what is fed to a pipeline refers to itself
        run = self.exec_config(sharded=False)
        report = self.guide.refresh(due, run, mixes=self.stage.mixes)
        self.loader = self.build_loader()
        self.meter.sums["saliency_images"] += report.images
        if report.agreement is not None:
            self.meter.sums["agreement"] += report.agreement
            self.meter.sums["compared"] += 1
        self.meter.sums["saliency"] += time.perf_counter() - start

    def train_epoch(self) -> None:
        """What is left of the epoch, with checkpoints in between and at its end."""
        config = self.config
        self.loader = self.loader or self.build_loader()
        if config.second_stage.classifier:
            set_train_mode(self.net, config.second_stage)
        else:
            self.model.train()
        steps = len(self.loader)
        sums = self.meter.sums
        score = torch.zeros(2, device=self.device)  # loss and hits, summed over images
        planned, mark, first = self.stage.seconds, time.perf_counter(), self.step

        def settle():
            """Bring the sums up to date, and see that they are finite; waits for the device."""
            nonlocal planned, mark, first
            loss, hits, kept = torch.cat([score.double(), self.sound()]).tolist()
            lr = self.optimizer.param_groups[0]["lr"]
            steps_of = f"in steps {first} to {self.step} of epoch {self.epoch}, with lr {lr:g}"
            check_finite(self.ranks, loss, bool(kept), steps_of)
            sums["loss"] += loss
            sums["hits"] += hits
            score.zero_()
            sums["plan"] += self.stage.seconds - planned
            sums["train"] += time.perf_counter() - mark
            planned, mark, first = self.stage.seconds, time.perf_counter(), self.step

        bar = tqdm(total=steps, initial=self.step, desc=f"epoch {self.epoch}", unit="step",
                   leave=False, disable=not self.ranks.first)  # fmt: skip
        with bar:
            batches = iter(self.loader)
            while True:
                wait = time.perf_counter()
                batch = next(batches, None)
                sums["data"] += time.perf_counter() - wait
                if batch is None:
                    break
                if self.step == 0 and self.ranks.first:
                    self.held()
                    save_picture(
                        self.out / "erased.png", batch.images, config.image.mean, config.image.std
                    )
                for group in self.optimizer.param_groups:
                    done = self.epoch * steps + self.step
                    lr = config.optim.lr_at(done, steps, config.epochs)
                    group["lr"] = lr * group["lr_factor"]
                self.train_step(batch, score)
                self.meter.add_batch(batch.status)
                self.step += 1
                bar.update()
                every = config.checkpoint_every
                if every and self.step % every == 0 and self.step < steps:
                    settle()
                    self.save()
                    mark = time.perf_counter()
            settle()
        self.epoch, self.step = self.epoch + 1, 0
        self.save()

    def train_step(self, batch: Batch, score: torch.Tensor) -> None:
        images = batch.images.contiguous(memory_format=self.layout)
        with autocast(self.config.amp, self.device):
            logits = self.model(images)
        if self.harvest is not None:
            self.harvest.add(batch)
        loss = self.loss.at(self.epoch)(logits, batch.labels, batch.partners, batch.mu)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        hits = (logits.argmax(1) == batch.labels).sum()
        score += torch.stack([loss.detach() * len(images), hits])

    def sound(self) -> torch.Tensor:
        nets = [self.net] if self.ema is None else [self.net, self.ema]
        return sound(nets, self.optimizer)

    @torch.inference_mode()
    def finish_epoch(self) -> None:
        """Validate, on the images of all ranks, and close the epoch that was trained last: its row
        of metrics.jsonl."""
        start = time.perf_counter()
        model = self.net if self.ema is None else self.ema
        for shared in dict.fromkeys((self.net, model)):  # in the same order on all ranks
            self.ranks.share_buffers(shared)
        model.eval()
        evaluation = Evaluation(self.index.class_counts, self.device)
        for batch in self.val_loader:
            with autocast(self.config.amp, self.device):
                logits = model(batch.images.contiguous(memory_format=self.layout))
            evaluation.update(logits, batch.labels)
        figures = evaluation.compute(self.ranks)
        self.meter.sums["val"] += time.perf_counter() - start
        lam_max = getattr(self.guided, "lam_max", 0.0)
        epoch = self.epoch - 1
        row = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "lam": float(schedule.lam(epoch, self.config.epochs, lam_max)),
            **figures,
            **self.meter.close_epoch(self.ranks, self.guide is not None),
        }
        if self.log is not None:
            self.held()
            self.log.write(row)
            tqdm.write(summary(row))


def begin(config: Config, ranks: Ranks, resume: bool, held: Callable[[], None]) -> Run:
    """A run that is ready to train, where its checkpoint says. Whatever is refused, is refused
    before anything of an older run in `out` is changed. held: see lock.hold."""
    out = Path(config.out)
    ranks.by_first(lambda: resuming.check_files(out) if resume else resuming.check_new(out))
    data = config.data.open(config.threads)
    if data.val_pixels is None:
        ranks.by_first(lambda: look(data.val, LOOK_S))
    found = ranks.gather((out / "checkpoint.pt").exists())
    check(
        len(set(found)) == 1,
        f"checkpoint.pt must be in {config.out!r} on every node or on none: put out on a disk that "
        "they share, or copy the file",
    )
    state = checkpoint.load_run(out / "checkpoint.pt") if found[0] else None
    identity = resuming.identity(config, data)
    notes = resuming.check_same(ranks, out, identity, state, data.val)
    training = Run(config, ranks, data, identity, held)
    if state is None:
        training.loader = training.build_loader()  # before anything is written: it may object
    else:
        training.restore(state)
    for note in notes if ranks.first else ():
        tqdm.write(f"note: {note}", file=sys.stderr)
    if training.open_log(None if state is None else state.get("log", "")):
        training.finish_epoch()
    return training


def run(config: Config, resume: bool) -> None:
    """Train to the last epoch. Nothing is written where `out` holds a run, unless resumed."""
    ranks = Ranks(config.device)
    torch.backends.cudnn.benchmark = True  # images are of one size
    resuming.agree(ranks, resuming.flat(config) | {"resume": resume})
    out = Path(config.out)
    with lock.hold(out, ranks) as held:
        training = begin(config, ranks, resume, held)
        while training.epoch < config.epochs:
            training.saliency_pass()
            training.train_epoch()
            training.finish_epoch()
        if training.log is not None:
            tqdm.write(closing(training.log.close()))
            weights = training.net if training.ema is None else training.ema.module
            held()
            checkpoint.save(out / "weights.pt", weights.state_dict())
        ranks.close()


def make_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="train.py", description="Train a network.")
    parser.add_argument("--config", action="config", help="YAML file of the settings below")
    parser.add_class_arguments(Config)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in `out`, if there is one"
    )
    return parser


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    try:
        settings = parser.instantiate(arguments)
        names = {f.name for f in dataclasses.fields(Config)}
        run(Config(**{name: settings[name] for name in names}), settings.resume)
    except (ValueError, ImageError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
