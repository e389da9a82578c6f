"""SAM's attention on a CPU, block by block, so that what is being computed on stays in the processor's cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_BYTES = 2**21
"""What a thread's share of a block's attention weights should fit into: the level-2 cache of a server's core."""


@dataclass(frozen=True)
class _Block:
    """Some heads of one image in a rectangle of its tokens that equal tiles fill.

    The queries of a tile attend to the keys of its window: its own tokens and, where the image ends within the
    window, padding.

    Attributes:
        image: which one.
        top: first row, `bottom` is behind the last; `left` and `right` are the same of columns.
        tile: rows and columns of a tile.
        window: rows and columns of a window.
        heads: which ones.
        chunk: rows of each tile whose queries are computed at a time.
    """

    image: int
    top: int
    bottom: int
    left: int
    right: int
    tile: tuple[int, int]
    window: int
    heads: slice
    chunk: int

    def row_chunks(self) -> list[slice]:
        """The rows of a tile, `chunk` at a time."""
        height = self.tile[0]
        return [slice(row, min(row + self.chunk, height)) for row in range(0, height, self.chunk)]

    def tiles(self, tokens: Tensor, rows: slice = slice(None)) -> Tensor:
        """View (tiles down, tiles across, heads, rows, columns, d) of tokens (B, H, W, heads, d)."""
        mine = tokens[self.image, self.top : self.bottom, self.left : self.right, self.heads]
        tall, wide = self.tile
        return mine.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).permute(0, 2, 4, 1, 3, 5)[:, :, :, rows]

    def windows(self, tokens: Tensor, padding: Tensor | None, *, extra: int = 0) -> Tensor:
        """Copy (down, across, heads, window, window, d + extra) of tiles, padded; the extra columns are not set."""
        view = self.tiles(tokens)
        copied = view.new_empty(*view.shape[:3], self.window, self.window, view.shape[-1] + extra)
        tall, wide = self.tile
        if padding is not None:
            copied[..., : view.shape[-1]] = padding[self.heads, None, None]
        copied[..., :tall, :wide, : view.shape[-1]] = view
        return copied

    def keys(self, key: Tensor, padding: Tensor | None, *, positions: bool) -> Tensor:
        """Keys (G, window², d), or (G, window², d + 2 window) with row and column as one-hot vectors."""
        dim, window = key.shape[-1], self.window
        copied = self.windows(key, padding, extra=2 * window if positions else 0)
        if positions:
            one_hot = torch.eye(window, dtype=key.dtype)
            copied[..., dim : dim + window] = one_hot[:, None]
            copied[..., dim + window :] = one_hot
        return copied.view(-1, window**2, copied.shape[-1])

    def values(self, value: Tensor, padding: Tensor | None) -> Tensor:
        """Values (G, window², d)."""
        return self.windows(value, padding).view(-1, self.window**2, value.shape[-1])

    def queries(self, query: Tensor, table: Tensor | None, rows: slice) -> Tensor:
        """Scaled queries (G, N, d), or (G, N, d + 2 window) with their products with all rows and columns."""
        view = self.tiles(query, rows)
        dim, window = view.shape[-1], self.window
        extra = 0 if table is None else 2 * window
        extended = view.new_empty(*view.shape[:-1], dim + extra)
        torch.mul(view, dim**-0.5, out=extended[..., :dim])
        if table is not None:
            products = (extended.view(-1, dim + extra)[:, :dim] @ table.T).view(*view.shape[:-1], -1)
            by_row, by_column = _by_position(products, window, rows.start)
            extended[..., dim : dim + window] = by_row
            extended[..., dim + window :] = by_column
        return extended.view(-1, view.shape[3] * view.shape[4], dim + extra)

    def scatter_query(self, grad: Tensor, table: Tensor | None, rows: slice, into: Tensor) -> Tensor | None:
        """Backward of `queries`: writes the gradient of the query, returns that of its products with the table."""
        view = self.tiles(into, rows)
        dim, window = view.shape[-1], self.window
        grad = grad.view(*view.shape[:-1], -1)
        if table is None:
            torch.mul(grad, dim**-0.5, out=view)
            return None
        products = grad.new_zeros(*view.shape[:-1], len(table))
        by_row, by_column = _by_position(products, window, rows.start)
        by_row.copy_(grad[..., dim : dim + window])
        by_column.copy_(grad[..., dim + window :])
        flat = products.view(-1, len(table))
        whole = torch.addmm(grad[..., :dim].reshape(-1, dim), flat, table)
        torch.mul(whole.view(view.shape), dim**-0.5, out=view)
        return flat

    def scatter_windows(self, grads: list[Tensor], into: Tensor, padding: Tensor | None) -> None:
        """Backward of `windows`: sums up the gradients of row chunks and writes those of tokens and padding."""
        view = self.tiles(into)
        total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0, dtype=torch.float32)
        total = total.view(*view.shape[:3], self.window, self.window, -1)
        tall, wide = self.tile
        view.copy_(total[..., :tall, :wide, :])
        if padding is not None:
            total[..., :tall, :wide, :] = 0
            padding[self.heads] += total.sum((0, 1, 3, 4), dtype=torch.float32)


def _by_position(products: Tensor, window: int, first_row: int) -> tuple[Tensor, Tensor]:
    """Views of products with tables that give, for each query, those of the key's row and of its column.

    Args:
        products: (down, across, heads, rows, columns, 2 (2 window - 1)) with distances key - query from
            -(window - 1) to window - 1, of rows and then of columns; contiguous.
        window: rows and columns of a window.
        first_row: row of the first query in its window.

    Returns:
        Two of (down, across, heads, rows, columns, window): moving on by a query moves back by a distance.
    """
    shape = (*products.shape[:-1], window)
    outer, (row, column) = products.stride()[:3], products.stride()[3:5]
    start = products.storage_offset() + window - 1
    by_row = products.as_strided(shape, (*outer, row - 1, column, 1), start - first_row)
    by_column = products.as_strided(shape, (*outer, row, column - 1, 1), start + 2 * window - 1)
    return by_row, by_column


def _blocks(query: Tensor, window: int) -> Iterator[_Block]:
    """Blocks that cover all heads of all tokens of (B, H, W, heads, d).

    Whole windows, the strip left at the right, the strip left at the bottom and the corner are blocks of their own.
    """
    images, height, width, num_heads, _ = query.shape
    threads = torch.get_num_threads()
    for top, bottom, tall in _cut(height, window):
        for left, right, wide in _cut(width, window):
            weights_of_row = (bottom - top) // tall * (right - left) * window**2 * query.element_size()
            heads = max(min(threads, num_heads), threads * CACHE_BYTES // (weights_of_row * tall))
            chunk = max(1, min(tall, threads * CACHE_BYTES // (weights_of_row * heads)))
            for image in range(images):
                for first in range(0, num_heads, heads):
                    some = slice(first, min(first + heads, num_heads))
                    yield _Block(image, top, bottom, left, right, (tall, wide), window, some, chunk)


def _cut(size: int, window: int) -> list[tuple[int, int, int]]:
    """(first, behind the last, tile) of whole windows and of what is left."""
    whole = size - size % window
    return [part for part in ((0, whole, window), (whole, size, size - whole)) if part[2] and part[1] > part[0]]


class TiledAttention(torch.autograd.Function):
    """softmax(q·k / sqrt(d) + q·Rh[y - y'] + q·Rw[x - x']) v within windows; nothing of size N x N is kept.

    Tensors, all float32 or all bfloat16: query, key and value (B, H, W, heads, d); pad_key and pad_value (heads, d),
    what SAM's zero padding becomes; table (2 (2 window - 1), d), sqrt(d) times the relative positions by the distance
    key - query, of rows and then of columns, or None. Logits and weights are rounded to that type, as in Transformers'
    attention; the softmax itself is computed in float32.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # which would compute the softmax's input in float32 and store it
    def forward(ctx: Any, window: int, *tensors: Tensor | None) -> Tensor:
        """(B, H, W, heads, d)."""
        query, key, value, pad_key, pad_value, table = tensors
        assert query is not None
        assert key is not None
        assert value is not None
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for block in _blocks(query, window):
            keys, values = block.keys(key, pad_key, positions=table is not None), block.values(value, pad_value)
            for rows in block.row_chunks():
                weights = torch.bmm(block.queries(query, table, rows), keys.mT).softmax(-1)
                view = block.tiles(output, rows)
                view.copy_(torch.bmm(weights, values).view(view.shape))
        ctx.save_for_backward(*tensors)
        ctx.window = window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        with torch.autocast("cpu", enabled=False):
            return _gradients(ctx, grad_output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the weights again, block by block, and from them the gradients of all tensors."""
    query, key, value, pad_key, pad_value, table = ctx.saved_tensors
    grad_query, grad_key, grad_value = (torch.empty(query.shape, dtype=query.dtype) for _ in range(3))
    grad_pads = [None if pad is None else torch.zeros(pad.shape) for pad in (pad_key, pad_value)]
    grad_table = torch.zeros(table.shape) if ctx.needs_input_grad[6] else None
    for block in _blocks(query, ctx.window):
        keys, values = block.keys(key, pad_key, positions=table is not None), block.values(value, pad_value)
        grad_keys, grad_values = [], []
        for rows in block.row_chunks():
            queries = block.queries(query, table, rows)
            scaled = queries[..., : query.shape[-1]]
            weights = torch.bmm(queries, keys.mT).softmax(-1)
            grad = block.tiles(grad_output, rows).reshape(scaled.shape)
            grad_values.append(torch.bmm(weights.mT, grad))
            grad_weights = torch.bmm(grad, values.mT)
            grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_keys.append(torch.bmm(grad_logits.mT, scaled))
            of_products = block.scatter_query(torch.bmm(grad_logits, keys), table, rows, grad_query)
            if grad_table is not None and of_products is not None:
                grad_table += of_products.T @ scaled.reshape(-1, query.shape[-1])
        block.scatter_windows(grad_keys, grad_key, grad_pads[0])
        block.scatter_windows(grad_values, grad_value, grad_pads[1])
    grads = (grad_pads[0], grad_pads[1], grad_table)
    return None, grad_query, grad_key, grad_value, *(g if g is None else g.to(query.dtype) for g in grads)
