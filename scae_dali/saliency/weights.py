"""What a saliency pass reads from a network's weights: a digest, and which classes are near each
other."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scae_dali.cache.format import check_neighbors

__all__ = ["nearest_classes", "plain", "stable_bytes", "weights_digest"]

_BLOCK = 1 << 24  # similarities at once, 64 MB: with 20,000 classes all would take 1.6 GB


@torch.no_grad()
def nearest_classes(weight: Tensor, class_counts: np.ndarray, m: int) -> np.ndarray:
    """The classes whose weight vectors have the highest cosine similarity, the highest first.

    weight: float [K, C], of the classifier, finite. class_counts: int64 [K]; a class without
    samples is nobody's neighbour while there are others. Returns uint16 [K, min(m, K - 1)]. Raises
    ValueError for more classes than uint16 can number.
    """
    classes = len(weight)
    check_neighbors(m, classes)
    unit = nn.functional.normalize(weight.float(), dim=1)
    empty = torch.from_numpy(class_counts == 0).to(unit.device)
    nearest = []
    for own in torch.arange(classes, device=unit.device).split(max(1, _BLOCK // classes)):
        similarity = unit[own] @ unit.T
        similarity[:, empty] = -2.0
        similarity.scatter_(1, own[:, None], -3.0)
        nearest.append(similarity.topk(min(m, classes - 1), dim=1).indices)
    return torch.cat(nearest).cpu().numpy().astype(np.uint16)


def weights_digest(model: nn.Module) -> str:
    """BLAKE2b-128 of every parameter, buffer and extra state, hex: tells one state of the model
    from another."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        for part in stable_bytes(value):
            digest.update(part)
    return digest.hexdigest()


_PLAIN = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device)


def plain(value: Tensor) -> Tensor:
    """The same values, without a graph, one after the other in memory, and none of them
    quantized."""
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    return value.resolve_conj().resolve_neg().contiguous()


def stable_bytes(value: Any) -> Iterator[Any]:
    """Bytes for a value of a state_dict, the same in every process.

    Pickle's bytes would not do: they depend on which objects are shared, and on the order of a set.
    Of an object of an unknown class only the name of the class counts.
    """
    if isinstance(value, Tensor):
        yield plain(value).cpu().flatten().view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype.str}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, io.BytesIO):
        yield value.getvalue()
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        yield f"{type(value).__name__}{len(value)}".encode()
        entries: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
        parts = [b"".join(map(bytes, stable_bytes(entry))) for entry in entries]
        if not isinstance(value, list | tuple):
            parts.sort()
        for part in parts:
            yield f"{len(part)}:".encode()
            yield part
    elif isinstance(value, _PLAIN):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()
