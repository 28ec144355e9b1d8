"""Train a network on image folders, lists or CIFAR, with SCAE or another method.

    python train.py --config pipelines/imagenet_resnet50.yaml --data.root /data/imagenet --out run
    torchrun --nproc-per-node 8 train.py --config … --data.root … --out …
    python train.py --help

An epoch is: the saliency pass if one is due, training, validation, metrics, checkpoint. Killed at
any time, a run goes on with --resume from its last checkpoint, within an epoch or a pass.
"""

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pipelines.config import ExecConfig
from pipelines.guide import Guide
from pipelines.loaders import Loaders
from pipelines.recipe import Config, autocast, make_network
from scae_dali import checkpoint, schedule
from scae_dali.config import check
from scae_dali.ema import EMA
from scae_dali.evaluation import Evaluation
from scae_dali.iterator import Batch, ImageError, Loader
from scae_dali.losses import Loss
from scae_dali.metrics import Log, Meter, closing, save_picture, summary
from scae_dali.ops import Stage
from scae_dali.ranks import Ranks
from scae_dali.rng import derive
from scae_dali.second_stage import prepare, set_train_mode


class Run:
    """All that a training run holds: network, optimiser, pipelines, cache, counters."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.out = Path(config.out)
        self.data = config.data.open(config.threads)
        self.index = self.data.train
        self.loaders = Loaders(self.data, config.image, sampling=config.sampling, seed=config.seed)
        self.identity = config.fixed() | {"data": self.index.fingerprint}
        torch.manual_seed(derive(config.seed, "model"))
        self.net = make_network(config.model, self.index.num_classes)
        trained = [{"params": list(self.net.parameters()), "lr_factor": 1.0}]
        if config.second_stage.classifier:
            classes = self.index.num_classes
            trained = prepare(self.net, config.second_stage, classes, seed=config.seed)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.net.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.guided = config.guide()
        self.ema = None
        if config.optim.ema:
            self.ema = EMA(self.net, config.optim.ema)
        self.guide, self.harvest = None, None
        if self.guided is not None:
            stage, source = self.make_stage(), config.saliency.source
            if self.guided.guided or stage.mixes:
                check(
                    source == "pass" or not stage.moves_pixels,
                    f"saliency.source must be pass with {config.method}, which moves pixels, got "
                    f"{source}",
                )
                self.guide = Guide(config, self.guided, self.net, self.index, self.loaders, ranks)
                self.harvest = self.guide.harvest
        self.model = self.net
        if config.compile != "none":
            self.model = torch.compile(self.model, mode=config.compile)  # type: ignore[assignment]
        if ranks.world > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = config.optim.optimizer(trained)
        self.loss = Loss(config.loss, self.index.class_counts, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.epoch = self.step = 0  # the next ones; step counts within the epoch
        self.meter = Meter()
        self.pipeline_state: bytes | None = None
        self.loader: Loader | None = None
        self.val_loader = self.loaders.val(self.exec_config().for_inference(config.image.size))

    def exec_config(self, *, sharded: bool = True) -> ExecConfig:
        return ExecConfig(
            batch_size=self.config.batch_size,
            device_id=self.device.index,
            threads=self.config.threads,
            hw_decoder_load=self.config.hw_decoder_load,
            shard=self.ranks.rank if sharded else 0,
            num_shards=self.ranks.world if sharded else 1,
        )

    def make_stage(self) -> Stage:
        return self.config.stage(
            self.data,
            None if self.guide is None else self.guide.cache,
            device=str(self.device),
            num_shards=self.ranks.world,
        )

    def build_loader(self) -> Loader:
        """Start the training pipeline where its state says."""
        self.stage = self.make_stage()
        return self.loaders.train(
            self.stage, self.exec_config(), checkpoint=self.pipeline_state, position=self.step
        )

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
        """What is left of the epoch, with checkpoints in between."""
        config = self.config
        self.loader = self.loader or self.build_loader()
        if config.second_stage.classifier:
            set_train_mode(self.net, config.second_stage)
        else:
            self.model.train()
        steps = len(self.loader)
        bar = tqdm(total=steps, initial=self.step, desc=f"epoch {self.epoch}", unit="step",
                   leave=False, disable=not self.ranks.first)  # fmt: skip
        sums = self.meter.sums
        score = torch.zeros(2, device=self.device)  # loss and hits, summed over images
        planned, mark = self.stage.seconds, time.perf_counter()

        def settle():
            """Bring the sums up to date; waits for the device."""
            nonlocal planned, mark
            for key, value in zip(("loss", "hits"), score.tolist(), strict=True):
                sums[key] += value
            score.zero_()
            sums["plan"] += self.stage.seconds - planned
            sums["train"] += time.perf_counter() - mark
            planned, mark = self.stage.seconds, time.perf_counter()

        batches = iter(self.loader)
        while True:
            wait = time.perf_counter()
            batch = next(batches, None)
            sums["data"] += time.perf_counter() - wait
            if batch is None:
                break
            if self.step == 0 and self.ranks.first:
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
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                settle()
                self.save()
                mark = time.perf_counter()
        settle()
        bar.close()

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

    @torch.inference_mode()
    def finish_epoch(self) -> dict[str, Any]:
        """Validate, on the images of all ranks, and close the epoch: its row of metrics.jsonl."""
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
        return {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "lam": float(schedule.lam(self.epoch, self.config.epochs, lam_max)),
            **figures,
            **self.meter.close_epoch(self.ranks, self.guide is not None),
        }

    def save(self) -> None:
        """Write the checkpoint: wholly, or not at all."""
        assert self.loader is not None
        self.pipeline_state = self.loader.state()
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        mine = {
            "pipeline": self.pipeline_state,
            "sums": self.meter.sums,
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
        }
        ranks = self.ranks.gather(mine)
        if self.harvest is not None:
            self.harvest.merge()
            self.harvest.keep_on(self.ranks.first)
        if self.ranks.first:
            state = {name: getattr(self, name).state_dict() for name in self.parts()}
            state |= {
                "of": self.identity,
                "epoch": self.epoch,
                "step": self.step,
                "totals": self.meter.totals,
                "saliency_pass": None if self.guide is None else self.guide.made,
                "ranks": ranks,
            }
            checkpoint.save(self.out / "checkpoint.pt", state)

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state = checkpoint.load_run(self.out / "checkpoint.pt", self.identity)
        check(
            len(state["ranks"]) == self.ranks.world,
            f"the run in {str(self.out)!r} was made by {len(state['ranks'])} processes, now there "
            f"are {self.ranks.world}: resume it with as many",
        )
        for name in self.parts():
            getattr(self, name).load_state_dict(state[name])
        if self.guide is not None:
            self.guide.made = state["saliency_pass"]
        if self.harvest is not None:
            self.harvest.keep_on(self.ranks.first)
        self.epoch, self.step, self.meter.totals = state["epoch"], state["step"], state["totals"]
        mine = state["ranks"][self.ranks.rank]
        self.pipeline_state, self.meter.sums = mine["pipeline"], mine["sums"]
        torch.set_rng_state(mine["rng"])
        if mine["cuda_rng"] is not None:
            torch.cuda.set_rng_state(mine["cuda_rng"])
        try:
            self.loader = self.build_loader()
        except ImageError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the checkpoint in {str(self.out)!r} is of another pipeline than these settings "
                f"make ({reason}); resume with those in its config.json"
            ) from error

    def parts(self) -> list[str]:
        optional = [name for name in ("ema", "harvest") if getattr(self, name) is not None]
        return ["net", "optimizer", "scaler", *optional]


def run(config: Config, resume: bool) -> None:
    """Train to the last epoch. Nothing is written where `out` holds a run, unless resumed."""
    ranks = Ranks(config.device)
    torch.backends.cudnn.benchmark = True  # images are of one size
    out = Path(config.out)
    check(not out.is_file(), f"out must be a folder, got the file {config.out!r}")
    if not resume and (out / "config.json").exists():
        raise ValueError(f"out must be a new folder, got {config.out!r}: give another, or --resume")
    ranks.gather(None)  # nobody writes before all have looked
    out.mkdir(parents=True, exist_ok=True)
    training = Run(config, ranks)
    found = ranks.gather((out / "checkpoint.pt").exists())
    check(
        len(set(found)) == 1,
        f"checkpoint.pt must be in {config.out!r} on every node or on none: put out on a disk that "
        "they share, or copy the file",
    )
    if found[0]:
        training.restore()
    else:
        training.loader = training.build_loader()  # before anything is written: it may object
    log = None
    if ranks.first:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
        log = Log(out, training.epoch)
    while training.epoch < config.epochs:
        training.saliency_pass()
        training.train_epoch()
        row = training.finish_epoch()
        if log is not None:
            log.write(row)
            tqdm.write(summary(row))
        training.epoch, training.step = training.epoch + 1, 0
        training.save()
    if log is not None:
        tqdm.write(closing(log.close()))
        weights = training.net if training.ema is None else training.ema.module
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
