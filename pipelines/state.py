"""The state of a run: built from a config, saved to a checkpoint, and restored from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines import resume
from pipelines.config import ExecConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from pipelines.maps import Maps
from pipelines.recipe import Config
from scae_dali.checks import check
from scae_dali.plan.random import derive
from scae_dali.stage.loader import ImageError, Loader
from scae_dali.training import checkpoint
from scae_dali.training.log import Log, known_rows
from scae_dali.training.losses import Loss
from scae_dali.training.meter import Meter
from scae_dali.training.networks import check_fits, make_network
from scae_dali.training.notice import Notice
from scae_dali.training.optim import EMA
from scae_dali.training.ranks import Ranks
from scae_dali.training.second_stage import prepare, set_train_mode
from scae_dali.training.weights import check_extra_state, load_weights


class State:
    """All that a run holds: network, optimiser, pipelines, saliency maps, counters.

    identity: the settings, images and weights that the run is of, see resume.identity.
    check_folder: raises where the folder is no longer this run's, see lock.hold; the first rank
    calls it before it writes. notice: tells when the run is asked to end.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        data: Data,
        identity: dict[str, Any],
        check_folder: Callable[[], None],
        notice: Notice,
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.check_folder, self.notice = check_folder, notice
        self.out, self.identity = Path(config.out), identity
        self.val_files = resume.file_keys(data.val)
        self.index = data.train
        self.loaders = Loaders(
            data,
            config.image,
            sampling=config.sampling,
            seed=config.seed,
            epoch_length=config.epoch_length,
            samples_per_turn=config.samples_per_turn,
        )
        torch.manual_seed(derive(config.seed, "model"))
        classes = self.index.num_classes
        self.net = make_network(config.model, classes, config.image.size)
        self.notes: list[str] = []  # for the user
        if config.weights is not None and (note := load_weights(self.net, config.weights)):
            self.notes.append(note)
        if config.optim.early(config.epochs):
            self.notes.append(
                f"optim.milestones {[*config.optim.milestones]} all lie in the first half of the "
                f"{config.epochs} epochs: if they were made for fewer epochs, scale them alike"
            )
        trained: list[dict[str, Any]] = [{"params": list(self.net.parameters()), "lr_factor": 1.0}]
        if config.second_stage.classifier:
            trained = prepare(self.net, config.second_stage, classes, seed=config.seed)
        check(
            any(parameter.requires_grad for group in trained for parameter in group["params"]),
            f"model {config.model!r} has no parameter to train: leave requires_grad=True on those "
            "that are to be trained",
        )
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.net.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        sizes = {config.image.size}
        if config.guided_config() is not None:
            sizes.add(config.saliency_image().size)
        check_extra_state(self.net, config.model)
        train: Callable[[], object] = self.net.train
        if config.second_stage.classifier:
            train = partial(set_train_mode, self.net, config.second_stage)
        for size in sizes:
            check_fits(
                self.net,
                config.model,
                size,
                classes,
                self.device,
                amp=config.amp,
                train=train if size == config.image.size else None,
                batch_size=config.batch_size,
            )
        self.ema = None
        if config.optim.ema:
            self.ema = EMA(self.net, config.optim.ema)
        self.maps = self.make_maps()
        self.harvest = None if self.maps is None else self.maps.harvest
        self.stage = config.stage(
            data,
            None if self.maps is None else self.maps.cache,
            num_shards=ranks.world,
        )
        source = config.saliency.source
        check(
            self.maps is None or source == "pass" or not self.stage.moves_pixels,
            f"saliency.source must be pass with {config.method}, which moves pixels, got {source}",
        )
        self.model = self.net
        if config.compile != "none":
            self.model = torch.compile(self.model, mode=config.compile)  # type: ignore[assignment]
        if ranks.world > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = config.optim.optimizer(trained)
        self.loss = Loss(
            config.loss, self.index.class_counts, self.device, mean_over_ranks=ranks.mean
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.epoch = self.step = 0  # the next ones; step counts within the epoch
        self.meter = Meter()
        self.log: Log | None = None  # in the first rank alone
        self.pipeline_state: bytes | None = None
        self.loader: Loader | None = None
        self.val_loader = self.loaders.val(self.execution().for_inference(config.image.size))

    def make_maps(self) -> Maps | None:
        """The saliency maps, where the method looks at them or at neighbouring classes."""
        guided = self.config.guided_config()
        neighbors = self.config.neighbors(self.index.class_counts)
        if guided is None or not (guided.guided or neighbors):
            return None
        return Maps(
            self.config,
            guided,
            self.net,
            self.index,
            self.loaders,
            self.ranks,
            neighbors=neighbors,
        )

    def execution(self, *, sharded: bool = True) -> ExecConfig:
        """How the pipelines of this rank run. sharded: whether ranks share an epoch."""
        return ExecConfig(
            batch_size=self.config.batch_size,
            device_id=self.device.index,
            threads=self.config.threads,
            hw_decoder_load=self.config.hw_decoder_load,
            shard=self.ranks.rank if sharded else 0,
            num_shards=self.ranks.world if sharded else 1,
        )

    def build_loader(self) -> Loader:
        """Start the training pipeline where its state says."""
        loader = self.loaders.train(
            self.stage, self.execution(), checkpoint=self.pipeline_state, position=self.step
        )
        loader.start()
        return loader

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
        self.harvest_in_one_rank()
        if self.ranks.first:
            self.check_folder()
            state = {name: getattr(self, name).state_dict() for name in self.parts()}
            state |= {
                "of": self.identity,
                "val_files": self.val_files,
                "log": "" if self.log is None else self.log.text(),
                "epoch": self.epoch,
                "step": self.step,
                "totals": self.meter.totals,
                "saliency_pass": None if self.maps is None else self.maps.made,
                "ranks": ranks,
            }
            checkpoint.save(self.out / "checkpoint.pt", state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of these settings."""
        check(
            len(state["ranks"]) == self.ranks.world,
            f"the run in {str(self.out)!r} was made by {len(state['ranks'])} processes, now there "
            f"are {self.ranks.world}: resume it with as many",
        )
        lacking = [name for name in self.parts() if name not in state]
        check(
            not lacking,
            f"the checkpoint in {str(self.out)!r} lacks {', '.join(lacking)}, which these settings "
            "need; restore it from a copy, or start in a new folder",
        )
        for name in self.parts():
            getattr(self, name).load_state_dict(state[name])
        if self.maps is not None:
            self.maps.made = state.get("saliency_pass")
        self.harvest_in_one_rank()
        mine = state["ranks"][self.ranks.rank]
        self.epoch, self.step = state["epoch"], state["step"]
        self.meter.restore(mine["sums"], state["totals"])
        self.pipeline_state = mine["pipeline"]
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

    def open_log(self, saved: str | None) -> bool:
        """Begin the log and config.json, or go on with them. Returns whether the last epoch that
        was trained has no row in the log yet, and must be validated.

        saved: the log as the checkpoint has it; None without a checkpoint.
        """
        trained = bool(self.epoch and not self.step and not self.meter.empty)

        def begin():
            path = self.out / "metrics.jsonl"
            known = len(known_rows(path, saved or ""))
            check(
                saved is not None or not known,
                f"{str(path)!r} has {known} epochs, and there is no checkpoint.pt beside it: "
                "restore it from a copy, or start in a new folder",
            )
            check(
                saved is not None or not (self.out / "weights.pt").exists(),
                f"{str(self.out)!r} has the weights.pt of a run that has ended, and no "
                "checkpoint.pt to go on from: restore that from a copy, or start in a new folder",
            )
            self.check_folder()
            lacks = trained and known < self.epoch
            self.log = Log(self.out, self.epoch - lacks, saved or "")
            resume.write_config(self.out, self.config, self.epoch)
            if self.epoch < self.config.epochs:  # until the new end there are no final weights
                resume.set_aside(self.out / "weights.pt", self.epoch)

        self.ranks.by_first(begin)
        done = self.ranks.gather(0 if self.log is None else len(self.log.rows))[0]
        if trained and done == self.epoch:
            self.meter.close_epoch(self.ranks, self.maps is not None)  # its row is in the log
        return done < self.epoch

    def harvest_in_one_rank(self) -> None:
        """Leave what all ranks have harvested to the first, so that no merge counts it twice."""
        if self.harvest is not None and not self.ranks.first:
            self.harvest.clear()

    def parts(self) -> list[str]:
        """The attributes whose state_dict a checkpoint has under the same name."""
        optional = [name for name in ("ema", "harvest") if getattr(self, name) is not None]
        return ["net", "optimizer", "scaler", *optional]
