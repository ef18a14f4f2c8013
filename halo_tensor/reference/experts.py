"""The ops of experts in plain PyTorch: products of tokens that are grouped by expert, and their quantisers.

Rows of a matrix are sorted by expert, and ``offs`` [experts] says where each group ends, as for ``torch._grouped_mm``. Rows
after the last group belong to no expert: products give zeros for them. Each definition is a loop over experts around a
definition of :mod:`halo_tensor.reference.ops`, so an expert is quantised and multiplied as a dense layer is.

Groups are cut into *tiles* of TILE rows. Codes that are transposed for a product along tokens begin each group at a new tile,
with zeros up to the next one, since the product adds whole tiles.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch

from halo_tensor.recipe import Format, Rotation
from halo_tensor.recipe.gates import Gate
from halo_tensor.reference import ops as reference
from halo_tensor.reference.codes import code_dtype, round_to

#: Rows of a tile.
TILE = 128


def tile_count(rows: int, experts: int) -> int:
    """Return for how many tiles there is room: as many as the least even distribution of ``rows`` needs."""
    return rows // TILE + experts + 1


def groups(offs: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, end) of each group."""
    start = 0
    for expert, end in enumerate(offs.tolist()):
        yield expert, start, max(end, start)
        start = max(end, start)


def group_tiles(offs: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how groups are cut into tiles.

    Args:
        offs: int32 [experts], the ends of the groups, which must not decrease or exceed ``rows``.
        rows: of the matrix.

    Returns:
        int32 [tile_count, 4], of each tile the expert, its first row, the end of its rows and 0. The expert is −1 for rows
        that belong to none, and for tiles that are not needed, which have no rows. And int32 [experts + 2]: the first tile of
        each expert, of the rows of no expert, and the number of tiles.
    """
    experts = offs.shape[0]
    tiles = torch.zeros(tile_count(rows, experts), 4, dtype=torch.int32)
    tiles[:, 0] = -1
    starts, count = [], 0
    for expert, start, end in [*groups(offs), (-1, max([0, *offs.tolist()]), rows)]:
        starts.append(count)
        for first in range(start, end, TILE):
            tiles[count, 0], tiles[count, 1], tiles[count, 2] = expert, first, min(end, first + TILE)
            count += 1
    return tiles.to(offs.device), torch.tensor([*starts, count], dtype=torch.int32, device=offs.device)


def _spans(tiles: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first row, end) of neighbouring tiles of one expert, which must be neighbouring rows too."""
    there = [tile for tile in tiles.tolist() if tile[0] >= 0 and tile[2] > tile[1]]
    for expert, of_one in groupby(there, lambda tile: tile[0]):
        mine = list(of_one)
        yield expert, mine[0][1], mine[-1][2]


def combine(y: torch.Tensor, position: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of the rows of y that ``position`` [tokens, top_k] names for each token, added in their order."""
    total = y.new_zeros((position.shape[0], y.shape[1]), dtype=torch.float32)
    for column in position.unbind(1):
        total += y[column.long()]
    return total.to(dtype)


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    tiles: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rows of a times the transpose of their expert's matrix.

    Args:
        a: codes [rows, k].
        b: codes [experts, n, k].
        tiles: of :func:`group_tiles`.
        a_scale: float32 [rows].
        b_scale: float32 [experts, n]; None for 1.
        bias: [experts, n], or None.
        weight: float32 [rows], multiplies rows last, the bias too; or None.
        column_rotation: the rotation to undo on the columns.
        gain: float32 [n], multiplies columns before the bias is added; or None.

    Returns:
        [rows, n] in ``dtype``; zeros in rows of no expert.
    """
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=dtype)
    for expert, first, end in _spans(tiles):
        part = slice(first, end)
        y = reference.scaled_mm(
            a[part], b[expert], a_scale[part], None if b_scale is None else b_scale[expert],
            None if bias is None else bias[expert], None, column_rotation, (end - first, b.shape[1]), torch.float32, gain,
        )  # fmt: skip
        out[part] = (y if weight is None else y * weight[part].unsqueeze(1)).to(dtype)
    return out


def grouped_grad(
    a_t: torch.Tensor,
    b_t: torch.Tensor,
    starts: torch.Tensor,
    a_scale: torch.Tensor,
    column_rotation: Rotation | None,
    dtype: torch.dtype,
    gain: torch.Tensor | None,
) -> torch.Tensor:
    """Return the products along each expert's tokens, of transposed codes; exact zeros for an expert without tokens.

    Args:
        a_t: codes [n, TILE · tile_count], see :func:`turn_codes`.
        b_t: codes [k, TILE · tile_count].
        starts: of :func:`group_tiles`.
        a_scale: float32 [experts, n].
        column_rotation: the rotation to undo on the columns.
        gain: float32 [k], multiplies the columns; or None.

    Returns:
        [experts, n, k] in ``dtype``.
    """
    first = (starts * TILE).tolist()
    out = a_t.new_zeros((len(first) - 2, a_t.shape[0], b_t.shape[0]), dtype=dtype)
    for expert, (start, end) in enumerate(pairwise(first[:-1])):
        if end > start:
            out[expert] = reference.scaled_mm(
                a_t[:, start:end], b_t[:, start:end], a_scale[expert], None, None, None, column_rotation,
                (a_t.shape[0], b_t.shape[0]), dtype, gain,
            )  # fmt: skip
    return out


def turn_codes(codes: torch.Tensor, index: torch.Tensor | None, tiles: torch.Tensor) -> torch.Tensor:
    """Return the transpose of codes [·, c], with the rows of each tile in TILE columns of their own: [c, TILE · tiles].

    Args:
        index: [rows], which row of ``codes`` each row is; None if they are its rows.
    """
    out = codes.new_zeros((codes.shape[1], TILE * tiles.shape[0]))
    for tile, (expert, first, end, _) in enumerate(tiles.tolist()):
        if expert >= 0 and end > first:
            rows = codes[first:end] if index is None else codes[index[first:end].long()]
            out[:, tile * TILE : tile * TILE + end - first] = rows.t()
    return out


def quantize_groups(
    x: torch.Tensor, index: torch.Tensor | None, fold: torch.Tensor, tiles: torch.Tensor, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows with a scale each, their expert's scales folded in.

    Args:
        x: [·, c].
        index: [rows], which row of x each row is; None if they are its rows.
        fold: float32 [experts, c].

    Returns:
        Codes [rows, c] and float32 scales [rows]; both are 0 in rows of no expert.
    """
    x = x if index is None else x[index.long()]
    codes, scales = x.new_zeros(x.shape, dtype=code_dtype(format)), x.new_zeros(x.shape[0], dtype=torch.float32)
    for expert, first, end in _spans(tiles):
        part = slice(first, end)
        codes[part], scales[part] = reference.rotate_quantize(x[part], None, None, format, "row", None, fold[expert])
    return codes, scales


def quantize_groups_t(
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    fold: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    format: Format,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise columns with a scale for each expert, the scales of rows folded in.

    An expert of more rows than an int32 can sum products of int8 (LONGEST_SUM) gets scales that are as many times larger, so
    that its codes are smaller and no sum overflows.

    Args:
        x: [·, c].
        index: [rows], which row of x each row is; None if they are its rows.
        weight: float32 [rows], multiplies rows of x first; or None.
        fold: float32 [rows].

    Returns:
        Transposed codes as :func:`turn_codes` gives them, float32 scales [experts, c], and the float32 sums [experts, c] of
        each expert's rows, without folds.
    """
    x = x if index is None else x[index.long()]
    x = x if weight is None else x.to(torch.float32) * weight.unsqueeze(1)
    experts, c = starts.shape[0] - 2, x.shape[1]
    codes_t = x.new_zeros((c, TILE * tiles.shape[0]), dtype=code_dtype(format))
    scales, sums = (x.new_zeros((experts, c), dtype=torch.float32) for _ in range(2))
    table, first_tiles = tiles.tolist(), starts.tolist()
    for expert, (first, end) in enumerate(pairwise(first_tiles[:-1])):
        start, stop = (table[first][1], table[end - 1][2]) if end > first else (0, 0)
        rows = x[start:stop]
        headroom = max(-(-(stop - start) // reference.LONGEST_SUM), 1) if format.uniform else 1
        codes, scales[expert] = reference.rotate_quantize(rows, None, None, format, "column", fold[start:stop], None)
        if headroom > 1:
            scales[expert] *= headroom
            y = rows.to(torch.float32) * (fold[start:stop] * reference.FOLD_LIFT).unsqueeze(1)
            codes = round_to(y / (scales[expert] * reference.FOLD_LIFT), format)
        sums[expert] = rows.to(torch.float32).sum(0)
        codes_t[:, first * TILE : first * TILE + stop - start] = codes.t()
    return codes_t, scales, sums


def halves(h: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up of h [rows, 2f] in float32."""
    f = h.shape[1] // 2
    first, second = (h[:, ::2], h[:, 1::2]) if gate.interleaved else (h[:, :f], h[:, f:])
    return first.to(torch.float32), second.to(torch.float32)


def activate(h: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Return (up + shift) · gate · sigmoid(alpha · gate) of h [rows, 2f], computed in float32, in the dtype of h."""
    g, u = halves(h, gate)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return ((u + gate.shift) * (g * torch.sigmoid(gate.alpha * g))).to(h.dtype)


def activate_backward(
    h: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor | None, gate: Gate
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of h and of ``weight``, where a = weight · activate(h), in float32.

    Args:
        h: [rows, 2f].
        grad: of a, [rows, f].
        weight: float32 [rows]; None for 1.

    Returns:
        [rows, 2f] and [rows].
    """
    g, u = halves(h, gate)
    passes_g, passes_u = torch.ones_like(g), torch.ones_like(u)
    if gate.limit is not None:
        passes_g, passes_u = (g <= gate.limit).float(), (u.abs() <= gate.limit).float()
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    s = torch.sigmoid(gate.alpha * g)
    grad = grad.to(torch.float32)
    dots = (grad * ((u + gate.shift) * (g * s))).sum(1)
    grad = grad if weight is None else grad * weight.unsqueeze(1)
    d_g = grad * (u + gate.shift) * (s * (1.0 + gate.alpha * g * (1.0 - s))) * passes_g
    d_u = grad * (g * s) * passes_u
    return (torch.stack([d_g, d_u], 2).flatten(1) if gate.interleaved else torch.cat([d_g, d_u], 1)), dots
