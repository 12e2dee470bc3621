"""Weighted k-nearest-neighbour classification of frozen features, exact and in bounded memory.

Wu et al. 2018 (arXiv:1805.01978), as DINO evaluates (Caron et al. 2021, arXiv:2104.14294): cosine similarity,
each of the k neighbours votes for its label with weight exp(similarity / T). Similarities exist one tile at a
time, so a bank of a million rows needs no more working memory than one of sixty thousand.

Unlike these papers, features are compared after the bank's mean is taken off. Without that, a part that all images
share (a white background in pixels, a common direction in an encoder) makes all cosines nearly 1, and a temperature of
0.07 then weighs all neighbours alike.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07  # of both papers, for every run: a sweep may move the training temperature, never this one
_GROUP = 16  # columns per group of the prefilter


def knn_predict(
    queries: Tensor,  # (Q, D)
    bank: Tensor,  # (N, D)
    bank_labels: Tensor,  # (N,) int64 in [0, num_classes)
    *,
    k: int,
    num_classes: int,
    temperature: float = TEMPERATURE,
    centred: bool = True,
    query_block: int = 128,
    bank_block: int = 65536,
) -> Tensor:
    """The class with the largest vote for each query, (Q,) int64.

    All tensors share a device; rows may be of any real type. The mean of the bank's rows is taken off all rows, unless
    ``centred`` is False; then they are L2-normalised. The block sizes bound memory (a tile of 128 x 65536 similarities
    is 32 MiB, beside bank_block x D floats) and don't change the result; wide and flat tiles merge the least.
    Raises ValueError if k exceeds the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} neighbours of a bank of {len(bank)} rows; 1 to {len(bank)} work")
    centre = bank.mean(dim=0, dtype=torch.float32) if centred else torch.zeros((), device=bank.device)
    similarity, index = _nearest(queries, bank, centre, k, query_block, bank_block)
    predictions = queries.new_empty(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), query_block):
        block = slice(start, start + query_block)
        votes = similarity.new_zeros(len(similarity[block]), num_classes)
        weights = ((similarity[block] - similarity[block, :1]) / temperature).exp()  # the nearest weighs 1: no overflow
        votes.scatter_add_(1, bank_labels[index[block]], weights)
        predictions[block] = votes.argmax(dim=1)
    return predictions


def _nearest(
    queries: Tensor, bank: Tensor, centre: Tensor, k: int, query_block: int, bank_block: int
) -> tuple[Tensor, Tensor]:
    """(Q, k) largest cosine similarities around ``centre`` and their rows in the bank: a running merge over tiles."""
    similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
    index = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    grouped = len(bank) - len(bank) % _GROUP  # the rows after the last whole group are a tile of their own
    starts = [*range(0, grouped, max(_GROUP, bank_block - bank_block % _GROUP)), grouped]
    for first, last in zip(starts, [*starts[1:], len(bank)], strict=True):
        tile = F.normalize(bank[first:last].float() - centre, dim=1)
        for start in range(0, len(queries), query_block):
            block = slice(start, start + query_block)
            new, column = _top_columns(F.normalize(queries[block].float() - centre, dim=1) @ tile.T, k)
            merged, best = torch.cat([similarity[block], new], dim=1).topk(k, dim=1)
            similarity[block] = merged
            index[block] = torch.cat([index[block], column + first], dim=1).gather(1, best)
    return similarity, index


def _top_columns(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, N) -> the min(k, N) largest of each row and their columns.

    ``topk`` over whole rows takes 2-3 times as long at N = 50,000, k = 20. Group j holds the columns j,
    j + N/16, j + 2N/16 ...; each of the k largest lies in one of the k groups with the largest maxima, because
    any other group is beaten by k values. Only those are searched.
    """
    groups, rest = divmod(values.shape[1], _GROUP)
    if rest or groups < 2 * k:
        return values.topk(min(k, values.shape[1]), dim=1)
    members = values.view(len(values), _GROUP, groups)
    group = members.amax(dim=1).topk(k, dim=1, sorted=False).indices  # (B, k)
    candidates = members.gather(2, group[:, None, :].expand(-1, _GROUP, -1)).flatten(1)  # (B, 16k)
    top, position = candidates.topk(k, dim=1)
    return top, position // k * groups + group.gather(1, position % k)
