"""Train a network on image folders, lists, archives or CIFAR, with SCAE or another method.

    python train.py --config pipelines/imagenet_resnet50.yaml --data.root /data/imagenet --out run
    torchrun --nproc-per-node 8 train.py --config … --data.root … --out …
    python train.py --help

An epoch is: the saliency pass if one is due, training, checkpoint, validation, a row of the log.
Killed at any time, a run goes on with --resume from its last checkpoint, within an epoch or a pass.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pipelines import resume as resuming
from pipelines.data import open_data
from pipelines.recipe import Config
from pipelines.state import State
from pipelines.validation import evaluate, validate
from scae_dali.checks import check
from scae_dali.commands.program import interrupted, run_program
from scae_dali.data.broken import look
from scae_dali.plan import schedule
from scae_dali.stage.loader import Batch, ImageError
from scae_dali.training import checkpoint, lock, second_stage
from scae_dali.training.divergence import check_finite, sound
from scae_dali.training.log import closing, save_picture, summary
from scae_dali.training.networks import compiler_failed
from scae_dali.training.notice import Ended, Notice
from scae_dali.training.output import outlive_readers
from scae_dali.training.precision import autocast
from scae_dali.training.ranks import Ranks, together

LOOK_S = 5.0  # seconds for a look at the validation files, before training starts


class Run(State):
    """A run, epoch by epoch."""

    def saliency_pass(self) -> None:
        """Refresh the cache if a pass is due by this epoch and has not been made."""
        due = None if self.maps is None else self.maps.due(self.epoch)
        if self.maps is None or due is None:
            return
        start = time.perf_counter()
        self.loader = None  # it has planned ahead with the old maps
        gc.collect()  # a pipeline and what feeds it refer to each other
        report = self.maps.refresh(due, self.execution(sharded=False))
        self.loader = self.build_loader()
        seconds = time.perf_counter() - start
        self.meter.add_pass(images=report.images, agreement=report.agreement, seconds=seconds)
        self.save()  # a run that is killed before the next checkpoint would lose these figures

    def train_epoch(self) -> None:
        """Train what is left of the epoch, with checkpoints in between and at its end."""
        self.loader = self.loader or self.build_loader()
        self.set_train_mode()
        batches_of_step = self.config.accumulate
        steps, every = len(self.loader), self.config.checkpoint_every * batches_of_step
        recent = RecentSteps(self)
        bar = tqdm(total=steps, initial=self.step, desc=f"epoch {self.epoch}", unit="step",
                   leave=False, disable=not self.ranks.first)  # fmt: skip
        with bar, self.notice.saving():
            batches = iter(self.loader)
            while (batch := self.next_batch(batches)) is not None:
                if self.step == 0 and self.ranks.first:
                    self.save_first_images(batch)
                done, of_epoch = self.step // batches_of_step, -(-steps // batches_of_step)
                done += self.epoch * of_epoch
                self.config.optim.set_lr(self.optimizer, done, of_epoch, self.config.epochs)
                self.train_step(batch, recent.score)
                self.meter.add_batch(batch.status)
                self.step += 1
                bar.update()
                if self.step == steps or self.step % batches_of_step:
                    continue
                ends = self.notice.due(self.step // batches_of_step)
                if ends or (every and self.step % every == 0):
                    recent.settle()
                    self.save()
                    recent.restart_clock()
                if ends:
                    self.notice.end()
            recent.settle()
            self.epoch, self.step = self.epoch + 1, 0
            self.save()
            if self.notice.due(0):  # an epoch may be too short for any other point
                self.notice.end()

    def set_train_mode(self) -> None:
        if self.config.second_stage.classifier:
            second_stage.set_train_mode(self.net, self.config.second_stage)
        else:
            self.model.train()

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self.meter.add_wait(time.perf_counter() - start)
        return batch

    def save_first_images(self, batch: Batch) -> None:
        self.check_folder()
        image = self.config.image
        save_picture(self.out / "erased.png", batch.images, image.mean, image.std)

    def train_step(self, batch: Batch, score: torch.Tensor) -> None:
        """A batch, the last of a step of the optimiser or one before it, whose gradient is kept.
        score: float [2], to which the loss and the hits of the batch are added, each a sum over its
        images."""
        assert self.loader is not None
        place = self.step % self.config.accumulate
        batches = min(self.config.accumulate, len(self.loader) - (self.step - place))
        ends = place + 1 == batches
        images = batch.images.contiguous(memory_format=self.layout)
        alone = not isinstance(self.model, DistributedDataParallel)
        with nullcontext() if alone or ends else self.model.no_sync():  # type: ignore[operator]
            with autocast(self.config.amp, self.device):
                logits = self.model(images)
            if self.harvest is not None:
                self.harvest.add(batch)
            loss = self.loss.at(self.epoch)(logits, batch.labels, batch.partners, batch.mu)
            if place == 0:
                self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss / batches).backward()
        if ends:
            self.scaler.unscale_(self.optimizer)
            self.config.optim.clip_gradients(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.net)
        hits = (logits.argmax(1) == batch.labels).sum()
        score += torch.stack([loss.detach() * len(images), hits])

    @torch.inference_mode()
    def finish_epoch(self) -> None:
        """Validate, on the images of all ranks, and write the log's row of the epoch that was
        trained last."""
        start = time.perf_counter()
        model = self.net if self.ema is None else self.ema
        for shared in dict.fromkeys((self.net, model)):  # in the same order on all ranks
            self.ranks.share_buffers(shared)
        counts = self.index.class_counts
        metrics = validate(self.config, model, self.val_loader, counts, self.ranks)
        self.meter.add_validation(time.perf_counter() - start)
        epoch, guided = self.epoch - 1, self.config.guided_config()
        lam_max = 0.0 if guided is None else guided.lam_max
        row = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "lam": float(schedule.lam(epoch, self.config.epochs, lam_max)),
            **metrics,
            **self.meter.close_epoch(self.ranks, self.maps is not None),
        }
        if self.log is not None:
            self.check_folder()
            self.log.write(row)
            tqdm.write(summary(row))


class RecentSteps:
    """The steps of an epoch that the meter has not counted yet.

    score: float32 [2] on the device, loss and hits of these steps, each a sum over images.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.score = torch.zeros(2, device=run.device)
        self.begin()

    def begin(self) -> None:
        self.first, self.planned = self.run.step, self.run.stage.seconds
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time the steps from now on, and so leave out a checkpoint that was just written."""
        self.started = time.perf_counter()

    def settle(self) -> None:
        """Hand the steps to the meter, and check that all is finite; waits for the device."""
        run = self.run
        nets = [run.net] if run.ema is None else [run.net, run.ema]
        loss, hits, kept = torch.cat([self.score.double(), sound(nets, run.optimizer)]).tolist()
        lr = run.optimizer.param_groups[0]["lr"]
        where = f"in steps {self.first} to {run.step} of epoch {run.epoch}, with lr {lr:g}"
        check_finite(run.ranks, loss, bool(kept), where)
        run.meter.add_steps(
            loss=loss,
            hits=hits,
            seconds=time.perf_counter() - self.started,
            plan_seconds=run.stage.seconds - self.planned,
        )
        self.score.zero_()
        self.begin()


def begin(
    config: Config,
    ranks: Ranks,
    resume: bool,
    check_folder: Callable[[], None],
    notice: Notice,
) -> Run:
    """A run that is ready to train, from its checkpoint on. All checks come before anything of an
    older run in `out` is changed. check_folder: see lock.hold."""
    out = Path(config.out)
    ranks.by_first(lambda: resuming.check_files(out) if resume else resuming.check_new(out))
    data = open_data(config.data, config.threads, ranks)
    if data.val_pixels is None:
        ranks.by_first(lambda: look(data.val, LOOK_S))
    found = ranks.gather((out / "checkpoint.pt").exists())
    check(
        len(set(found)) == 1,
        f"checkpoint.pt must be in {config.out!r} on every node or on none: put out on a disk that "
        "they share, or copy the file",
    )
    state = checkpoint.load_run(out / "checkpoint.pt") if found[0] else None
    identity: dict[str, Any] = {}
    together(ranks, lambda: identity.update(resuming.identity(config, data)))
    notes = resuming.check_same(ranks, out, identity, state, data.val)
    run = Run(config, ranks, data, identity, check_folder, notice)
    if state is None:
        run.loader = run.build_loader()  # before anything is written, since it may raise
    else:
        run.restore(state)
    for note in (*run.notes, *notes) if ranks.first else ():
        tqdm.write(f"note: {note}", file=sys.stderr)
    if run.open_log(None if state is None else state.get("log", "")):
        run.finish_epoch()
    return run


def train(config: Config, resume: bool) -> None:
    """Train to the last epoch. Nothing is written where `out` holds a run, unless resumed."""
    ranks = Ranks(config.device)
    torch.backends.cudnn.benchmark = True  # images are of one size
    resuming.agree(ranks, resuming.flat(config) | {"resume": resume})
    out = Path(config.out)
    with Notice(ranks) as notice, lock.hold(out, ranks) as check_folder:
        run = begin(config, ranks, resume, check_folder, notice)
        while run.epoch < config.epochs:
            run.saliency_pass()
            run.train_epoch()
            run.finish_epoch()
        if run.log is not None:
            tqdm.write(closing(run.log.close()))
            weights = run.net if run.ema is None else run.ema.module
            check_folder()
            checkpoint.save(out / "weights.pt", weights.state_dict())
        ranks.close()


def make_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="train.py", description="Train a network.")
    parser.add_argument("--config", action="config", help="YAML file of the settings below")
    parser.add_class_arguments(Config)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in `out`, if there is one"
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="print the validation metrics of `weights` as JSON, and train nothing; no `out` is "
        "needed",
    )
    return parser


TELLS = ("--evaluate", "--help", "-h", "--print_config")  # options that print, and train nothing


def main() -> None:
    parser = make_parser()
    if "--evaluate" in sys.argv:
        parser.set_defaults(out="")
    arguments = parser.parse_args()
    try:
        if arguments.evaluate:  # a second stage's weights are validated as any others are
            arguments.second_stage = parser.get_defaults().second_stage
        settings = parser.instantiate(arguments)
        names = {f.name for f in dataclasses.fields(Config)}
        config = Config(**{name: settings[name] for name in names})
        if settings.evaluate:
            ranks = Ranks(config.device)
            metrics = evaluate(config, ranks)
            if ranks.first:
                print(json.dumps(metrics))
            ranks.close()
        else:
            train(config, settings.resume)
    except (ValueError, ImageError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not compiler_failed(error):
            raise
        sys.exit(
            f"error: torch.compile failed ({str(error).partition(chr(10))[0]}): install what it "
            "needs, such as a C++ compiler, or pass --compile none"
        )
    except KeyboardInterrupt:  # before training, or in --evaluate
        sys.exit(interrupted())
    except Ended as ended:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by {ended}; the same command with --resume goes on", file=sys.stderr)
        sys.exit(128 + ended.number)


if __name__ == "__main__":
    if any(one.startswith(TELLS) for one in sys.argv):
        sys.exit(run_program(main))
    outlive_readers("the run goes on, and its figures are in metrics.jsonl")
    main()
