"""SAM's attention on a CPU, block by block, so that what is being computed on stays in the processor's cache."""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_BYTES = 2**22
"""A thread's share of a block's attention weights. On cores with 2 MB of level-2 cache smaller blocks are slower, since
each costs a few hundred microseconds of calls, and larger ones no faster."""


class _Scratch(threading.local):
    """Memory of this thread for what lives within a block, kept, as BLAS libraries do, from call to call.

    Fresh memory has to be mapped and cleared by the system page by page, which would take as long as computing on it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; it shares memory with all that were taken under that name."""
        size = math.prod(shape)
        memory = self._memory.get((name, dtype))
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):  # what is made in inference mode could not be written to in training
                memory = self._memory[name, dtype] = torch.empty(size, dtype=dtype)
        return memory[:size].view(shape)


_SCRATCH = _Scratch()


def _product(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Batched matrix product in the scratch memory of that name."""
    shape = (*one.shape[:2], other.shape[2])
    return torch.bmm(one, other, out=_SCRATCH.take(name, shape, one.dtype))


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    logits = _product("weights", queries, keys.mT)
    return torch.softmax(logits, -1, out=logits)


def _add_product(total: Tensor | None, name: str, one: Tensor, other: Tensor, *, last: bool) -> Tensor:
    """Adds a batched matrix product to a sum, in scratch memory: float32 where there are several products."""
    product = _product(name, one, other)
    if total is None and last:
        return product
    if total is None:
        total = _SCRATCH.take(f"total {name}", product.shape, torch.float32).zero_()
    return total.add_(product)


@dataclass(frozen=True)
class _Block:
    """Some heads of some images in a rectangle of their tokens that equal tiles fill.

    The queries of a tile attend to the keys of its window: its own tokens and, where the image ends within the
    window, padding. A head in a tile of an image is a group, G of them in all.

    Attributes:
        images: which ones.
        top: first row, `bottom` is behind the last; `left` and `right` are the same of columns.
        tile: rows and columns of a tile.
        window: rows and columns of a window.
        heads: which ones.
        chunk: rows of each tile whose queries are computed at a time.
    """

    images: range
    top: int
    bottom: int
    left: int
    right: int
    tile: tuple[int, int]
    window: int
    heads: range
    chunk: int

    @property
    def outer(self) -> tuple[int, int, int, int]:
        """Images, tiles down, tiles across, heads."""
        tall, wide = self.tile
        return len(self.images), (self.bottom - self.top) // tall, (self.right - self.left) // wide, len(self.heads)

    @property
    def padded(self) -> bool:
        """Whether the windows are larger than the tiles."""
        return self.tile != (self.window, self.window)

    def row_chunks(self) -> list[range]:
        """The rows of a tile, `chunk` at a time."""
        return _pieces(self.tile[0], self.chunk)

    def tiles(self, tokens: Tensor, rows: range | None = None) -> Tensor:
        """View (*outer, rows, columns, d) of tokens (B, H, W, heads, d)."""
        tall, wide = self.tile
        rows = rows or range(tall)
        of_image, of_row, of_column, of_head, of_number = tokens.stride()
        start = (self.images[0] * of_image + (self.top + rows[0]) * of_row
                 + self.left * of_column + self.heads[0] * of_head)  # fmt: skip
        return tokens.as_strided(
            (*self.outer, len(rows), wide, tokens.shape[-1]),
            (of_image, tall * of_row, wide * of_column, of_head, of_row, of_column, of_number),
            tokens.storage_offset() + start,
        )

    def of_heads(self, padding: Tensor) -> Tensor:
        """View (heads, 1, 1, d) of (heads, d)."""
        return padding[self.heads.start : self.heads.stop, None, None]

    def windows(self, tokens: Tensor, padding: Tensor | None, into: Tensor) -> None:
        """Writes tiles, padded, to (G, window², d) or its first d columns."""
        view = self.tiles(tokens)
        copied = into.view(*self.outer, self.window, self.window, -1)[..., : view.shape[-1]]
        if padding is not None and self.padded:
            copied.copy_(self.of_heads(padding))
        copied[..., : self.tile[0], : self.tile[1], :].copy_(view)

    def keys(self, key: Tensor, padding: Tensor | None, *, positions: bool) -> Tensor:
        """Keys (G, window², d), or (G, window², d + 2 window) with row and column as one-hot vectors."""
        dim, window = key.shape[-1], self.window
        width = dim + 2 * window * positions
        keys = _SCRATCH.take("keys", (math.prod(self.outer), window**2, width), key.dtype)
        self.windows(key, padding, keys)
        if positions:
            keys[..., dim:].copy_(_one_hot(window, key.dtype))
        return keys

    def values(self, value: Tensor, padding: Tensor | None) -> Tensor:
        """Values (G, window², d)."""
        values = _SCRATCH.take("values", (math.prod(self.outer), self.window**2, value.shape[-1]), value.dtype)
        self.windows(value, padding, values)
        return values

    def queries(self, query: Tensor, table: Tensor | None, rows: range) -> Tensor:
        """Scaled queries (G, N, d), or (G, N, d + 2 window) with their products with all rows and columns."""
        view = self.tiles(query, rows)
        dim, window = view.shape[-1], self.window
        if table is None:
            queries = _SCRATCH.take("queries", view.shape, query.dtype)
            torch.mul(view, dim**-0.5, out=queries)
            return queries.view(math.prod(self.outer), -1, dim)
        extended = _SCRATCH.take("queries", (*view.shape[:-1], dim + 2 * window), query.dtype)
        torch.mul(view, dim**-0.5, out=extended[..., :dim])
        products = _SCRATCH.take("products", (*view.shape[:-1], len(table)), query.dtype)
        torch.mm(extended.view(-1, dim + 2 * window)[:, :dim], table.T, out=products.view(-1, len(table)))
        by_row, by_column = _by_position(products, window, rows[0])
        extended[..., dim : dim + window] = by_row
        extended[..., dim + window :] = by_column
        return extended.view(math.prod(self.outer), -1, dim + 2 * window)

    def scatter_query(self, grad: Tensor, table: Tensor | None, rows: range, into: Tensor) -> Tensor | None:
        """Backward of `queries`: writes the gradient of the query, returns that of its products with the table."""
        view = self.tiles(into, rows)
        dim, window = view.shape[-1], self.window
        grad = grad.view(*view.shape[:-1], -1)
        if table is None:
            torch.mul(grad, dim**-0.5, out=view)
            return None
        products = _SCRATCH.take("products", (*view.shape[:-1], len(table)), grad.dtype).zero_()
        by_row, by_column = _by_position(products, window, rows[0])
        by_row.copy_(grad[..., dim : dim + window])
        by_column.copy_(grad[..., dim + window :])
        flat = products.view(-1, len(table))
        whole = _SCRATCH.take("whole", (len(flat), dim), grad.dtype)
        torch.addmm(grad.view(len(flat), -1)[:, :dim], flat, table, out=whole)
        torch.mul(whole.view(view.shape), dim**-0.5, out=view)
        return flat

    def scatter_windows(self, grad: Tensor, into: Tensor, padding: Tensor | None) -> None:
        """Backward of `windows`: writes the gradients of tokens and adds to that of padding."""
        view = self.tiles(into)
        grad = grad.view(*self.outer, self.window, self.window, -1)
        inside = grad[..., : self.tile[0], : self.tile[1], :]
        view.copy_(inside)
        if padding is not None and self.padded:
            inside.zero_()
            self.of_heads(padding).add_(grad.sum((0, 1, 2, 4, 5), dtype=torch.float32)[:, None, None])


@lru_cache(maxsize=8)
def _one_hot(window: int, dtype: torch.dtype) -> Tensor:
    """(window², 2 window): row and column of each key of a window as one-hot vectors."""
    one_hot = torch.eye(window, dtype=dtype)
    return torch.cat([one_hot.repeat_interleave(window, 0), one_hot.repeat(window, 1)], dim=1)


def _by_position(products: Tensor, window: int, first_row: int) -> tuple[Tensor, Tensor]:
    """Views of products with tables that give, for each query, those of the key's row and of its column.

    Args:
        products: (*outer, rows, columns, 2 (2 window - 1)) with distances key - query from
            -(window - 1) to window - 1, of rows and then of columns; contiguous.
        window: rows and columns of a window.
        first_row: row of the first query in its window.

    Returns:
        Two of (*outer, rows, columns, window): moving on by a query moves back by a distance.
    """
    shape = (*products.shape[:-1], window)
    *outer, row, column, _ = products.stride()
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
    memory = threads * CACHE_BYTES
    for top, bottom, tall in _cut(height, window):
        for left, right, wide in _cut(width, window):
            weights_of_row = (bottom - top) // tall * (right - left) * window**2 * query.element_size()
            heads = min(num_heads, max(threads, memory // (weights_of_row * tall)))
            chunk = max(1, min(tall, memory // (weights_of_row * heads)))
            together = max(1, memory // (weights_of_row * tall * num_heads))  # images, of which all heads fit
            for some_images in _pieces(images, together):
                for some_heads in _pieces(num_heads, heads):
                    yield _Block(some_images, top, bottom, left, right, (tall, wide), window, some_heads, chunk)


def _pieces(number: int, size: int) -> list[range]:
    """0..number - 1, `size` at a time."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


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
                weights = _weights(block.queries(query, table, rows), keys)
                view = block.tiles(output, rows)
                view.copy_(_product("output", weights, values).view(view.shape))
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
        of_keys = of_values = None
        chunks = block.row_chunks()
        for rows in chunks:
            last = rows is chunks[-1]
            queries = block.queries(query, table, rows)
            scaled = queries[..., : query.shape[-1]]
            weights = _weights(queries, keys)
            grad = _SCRATCH.take("grad", scaled.shape, query.dtype)
            view = block.tiles(grad_output, rows)
            grad.view(view.shape).copy_(view)
            of_values = _add_product(of_values, "of_values", weights.mT, grad, last=last)
            grad_logits = _product("grad_logits", grad, values.mT)
            torch.ops.aten._softmax_backward_data(grad_logits, weights, -1, weights.dtype, grad_input=grad_logits)
            of_keys = _add_product(of_keys, "of_keys", grad_logits.mT, scaled, last=last)
            of_products = block.scatter_query(_product("of_queries", grad_logits, keys), table, rows, grad_query)
            if grad_table is not None and of_products is not None:
                grad_table += of_products.T @ scaled.reshape(-1, query.shape[-1])
        assert of_keys is not None
        assert of_values is not None
        block.scatter_windows(of_keys, grad_key, grad_pads[0])
        block.scatter_windows(of_values, grad_value, grad_pads[1])
    grads = (grad_pads[0], grad_pads[1], grad_table)
    return None, grad_query, grad_key, grad_value, *(g if g is None else g.to(query.dtype) for g in grads)
