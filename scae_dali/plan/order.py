"""The order of the samples in every epoch, as a pure function of (seed, epoch).

Pipelines that feed DALI themselves use it: for images in memory, and for sampling by class. DALI's
file reader has an order of its own.
"""

import math
from typing import Literal, get_args

import numpy as np

from scae_dali.checks import check, check_choice
from scae_dali.plan.random import Stream, uniforms

ID = 0xFFFFFFFF  # the bits of a key that hold the sample's id
Sampling = Literal["shuffle", "class_balanced", "in_turn"]
EpochLength = Literal["largest", "dataset"]


class Order:
    """The batches of one shard.

    labels: int64 [N]. sampling: `shuffle` gives every sample once an epoch; `in_turn` does so in
    the order of the index; `class_balanced` takes the classes in turn, in a new random order each
    round, and the samples of a class in turn (Kang et al., ICLR 2020). samples_per_turn: how many
    samples a class gives at its turn. epoch_length: see `epoch_size`. Every shard gets `batches`
    full batches; the samples past its `shard_size` pad them.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        sampling: Sampling = "shuffle",
        epoch_length: EpochLength = "largest",
        samples_per_turn: int = 1,
        shard: int = 0,
        num_shards: int = 1,
        start_epoch: int = 0,
    ) -> None:
        check_choice("sampling", sampling, get_args(Sampling))
        check(
            samples_per_turn >= 1,
            f"samples_per_turn must be at least 1, got {samples_per_turn}; 1 and 4 are usual",
        )
        self.batch_size, self.num_shards, self.start_epoch = batch_size, num_shards, start_epoch
        self.epoch_size = epoch_size(labels, sampling, epoch_length)
        if samples_per_turn > 1:
            most = max(1, self.epoch_size // np.count_nonzero(np.bincount(labels)))
            check(
                samples_per_turn <= most,
                f"samples_per_turn must be at most {most}, got {samples_per_turn}: an epoch of "
                f"{self.epoch_size} samples would end before every class had its whole turn; "
                "published are 1 and 4",
            )
        self.batches = batches_per_epoch(self.epoch_size, batch_size, num_shards)
        first, last = (self.epoch_size * s // num_shards for s in (shard, shard + 1))
        self.shard_size = last - first
        check(
            self.shard_size > 0,
            f"num_shards must be at most the {self.epoch_size} samples of an epoch, got "
            f"{num_shards}",
        )
        self._labels, self._seed, self._sampling = labels, seed, sampling
        self._samples_per_turn = samples_per_turn
        self._mine = slice(first, last)
        self._epochs: dict[int, np.ndarray] = {}  # the last one, and the one that is read ahead

    def keys(self, first: int, batches: int = 1) -> np.ndarray:
        """The samples of batches `first` … `first + batches - 1`, counted from the run's start.

        Returns int64 [batches * batch_size]: the id in the low 32 bits, and above them how often
        the sample came before within its epoch. The batches must be of one epoch.
        """
        epoch, step = divmod(first, self.batches)
        if epoch not in self._epochs:
            keys = self._draw(epoch + self.start_epoch)[self._mine]
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = np.resize(keys, self.batches * self.batch_size)
        return self._epochs[epoch][step * self.batch_size : (step + batches) * self.batch_size]

    def _draw(self, epoch: int) -> np.ndarray:
        n = len(self._labels)
        if self._sampling == "in_turn":
            return np.arange(n)
        u = self._uniforms(epoch, np.arange(n))
        if self._sampling == "shuffle":
            return np.argsort(u, kind="stable")
        members = np.lexsort((u, self._labels))  # class by class, shuffled within
        counts = np.bincount(self._labels)
        present = np.flatnonzero(counts)
        turn = np.arange(self._samples_per_turn)
        rounds = math.ceil(self.epoch_size / (len(present) * len(turn)))
        # Every round shuffles the classes, by random numbers that follow those of the samples.
        u = self._uniforms(epoch, n + np.arange(rounds * len(present)))
        classes = present[np.argsort(u.reshape(rounds, -1), axis=1, kind="stable")]
        number = np.arange(rounds)[:, None, None] * len(turn) + turn  # counts a class's samples
        classes = classes[:, :, None]
        before, rank = np.divmod(number, counts[classes])  # [rounds, classes, turn]
        begin = np.cumsum(counts) - counts
        keys = members[begin[classes] + rank] + (before << 32)
        return keys.ravel()[: self.epoch_size]

    def _uniforms(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        return uniforms(self._seed, Stream.ORDER, epoch, numbers, 1)[:, 0]


def epoch_size(
    labels: np.ndarray, sampling: Sampling, epoch_length: EpochLength = "largest"
) -> int:
    """How many samples an epoch has, in all shards together.

    epoch_length: matters only with sampling=class_balanced, since the others give every sample
    once. With `largest`, an epoch has as many samples of every class as the largest class has. With
    `dataset` it has as many samples as the data set, as in the trainers of Kang et al. and MiSLAS.
    """
    check_choice("epoch_length", epoch_length, get_args(EpochLength))
    if sampling != "class_balanced" or epoch_length == "dataset":
        return len(labels)
    counts = np.bincount(labels)
    return int(counts.max() * np.count_nonzero(counts))


def batches_per_epoch(
    epoch_size: int, batch_size: int, num_shards: int = 1, *, drop_last: bool = False
) -> int:
    """Batches that every shard gives in an epoch: those of the largest shard, the last one padded,
    or, with drop_last, those that are full on every shard.

    epoch_size: samples of all shards. batch_size: of a shard.
    """
    if drop_last:
        return epoch_size // num_shards // batch_size
    return math.ceil(math.ceil(epoch_size / num_shards) / batch_size)
