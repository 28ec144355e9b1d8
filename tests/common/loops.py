"""A loop over somebody's own pipeline, for tests of the Loader and of those who take it."""

from nvidia.dali import fn, pipeline_def

from scae_dali import Loader, Stage

EPOCHS = 4


def loader(
    index,
    outputs=("images", "id"),
    *,
    drop_last=True,
    checkpointing=True,
    batch_size=8,
    num_shards=1,
):
    """A loader over somebody's own pipeline: shuffled, nothing is erased."""
    stage = Stage(
        index, "none", epochs=EPOCHS, batch_size=batch_size, num_shards=num_shards, seed=1
    )

    @pipeline_def(
        batch_size=batch_size, num_threads=1, device_id=None, enable_checkpointing=checkpointing
    )
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader",
            shuffle_after_epoch=True, pad_last_batch=True, num_shards=num_shards,
        )  # fmt: skip
        images = fn.resize(fn.decoders.image(encoded), size=(16, 16))
        images, targets = stage(images, ids, size=(16, 16))
        images = fn.crop_mirror_normalize(images, mean=[127.5], std=[64.0])
        given = {"images": images, "id": ids, **targets._asdict()}
        return tuple(given[name] for name in outputs)

    return Loader(define(), outputs, index, drop_last=drop_last)
