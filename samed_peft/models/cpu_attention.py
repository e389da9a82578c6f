"""SAM's attention on a CPU, block by block, so that its intermediate results stay in the processor's cache."""

import itertools
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
"""A thread's share of a block's attention weights. On cores with 2 MB of level-2 cache, smaller blocks are slower (each
costs a few hundred microseconds of calls) and larger ones not faster."""


class _Scratch(threading.local):
    """This thread's memory for a block's intermediate results, kept from call to call as BLAS libraries do.

    The system maps and clears new memory page by page, which would take as long as the computation.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, in the same memory as all earlier ones of that name."""
        size = math.prod(shape)
        memory = self._memory.get((name, dtype))
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):  # training cannot write to inference tensors
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
    """Add a batched matrix product to a sum in scratch memory, in float32 if there are several products."""
    product = _product(name, one, other)
    if total is None and last:
        return product
    if total is None:
        total = _SCRATCH.take(f"total {name}", product.shape, torch.float32).zero_()
    return total.add_(product)


@dataclass(frozen=True)
class _Block:
    """Some heads of some images in a rectangle of tokens that consists of equal tiles.

    Queries of a tile attend to the keys of its window: its own tokens and, if the image ends within the window,
    padding. A head in a tile of an image is a group; a block has G groups.
    """

    images: range
    top: int
    bottom: int  # the row behind the last
    left: int
    right: int
    tile: tuple[int, int]  # rows and columns of a tile
    window: int  # rows and columns of a window
    heads: range
    chunk: int  # rows of each tile whose queries are computed at a time

    @property
    def outer(self) -> tuple[int, int, int, int]:
        """Images, tiles down, tiles across, heads."""
        tall, wide = self.tile
        return len(self.images), (self.bottom - self.top) // tall, (self.right - self.left) // wide, len(self.heads)

    @property
    def padded(self) -> bool:
        """Whether the windows are larger than the tiles."""
        return self.tile != (self.window, self.window)

    def tiles(self, tokens: Tensor, rows: range | None = None) -> Tensor:
        """View (*outer, rows, columns, d) of tokens (B, H, W, heads, d)."""
        tall, wide = self.tile
        rows = rows or range(tall)
        of_image, of_row, of_column, of_head, of_number = tokens.stride()
        start = (self.images[0] * of_image + (self.top + rows[0]) * of_row
                 + self.left * of_column + self.heads[0] * of_head)  # fmt: skip
        # One call; slices and permutations would take four times as long, which counts on small grids.
        return tokens.as_strided(
            (*self.outer, len(rows), wide, tokens.shape[-1]),
            (of_image, tall * of_row, wide * of_column, of_head, of_row, of_column, of_number),
            tokens.storage_offset() + start,
        )

    def of_heads(self, padding: Tensor) -> Tensor:
        """View (heads, 1, 1, d) of (heads, d)."""
        return padding[self.heads.start : self.heads.stop, None, None]

    def gather(self, name: str, tokens: Tensor, padding: Tensor | None, *, positions: bool = False) -> Tensor:
        """Copy tokens, padded to windows, to scratch memory (G, window², d).

        With `positions` they are (G, window², d + 2 window), with row and column as one-hot vectors.
        """
        view, window = self.tiles(tokens), self.window
        dim = view.shape[-1]
        gathered = _SCRATCH.take(name, (math.prod(self.outer), window**2, dim + 2 * window * positions), tokens.dtype)
        copied = gathered.view(*self.outer, window, window, -1)[..., :dim]
        if padding is not None and self.padded:
            copied.copy_(self.of_heads(padding))
        copied[..., : self.tile[0], : self.tile[1], :].copy_(view)
        if positions:
            gathered[..., dim:].copy_(_one_hot(window, tokens.dtype))
        return gathered

    def queries(self, query: Tensor, table: Tensor | None, rows: range) -> Tensor:
        """Scaled queries (G, N, d), or (G, N, d + 2 window) with their products with rows' and columns' positions."""
        view = self.tiles(query, rows)
        dim, window = view.shape[-1], self.window
        width = dim if table is None else dim + 2 * window
        queries = _SCRATCH.take("queries", (*view.shape[:-1], width), query.dtype)
        torch.mul(view, dim**-0.5, out=queries[..., :dim])
        if table is not None:
            products = _SCRATCH.take("products", (*view.shape[:-1], len(table)), query.dtype)
            torch.mm(queries.view(-1, width)[:, :dim], table.T, out=products.view(-1, len(table)))
            by_row, by_column = _by_position(products, window, rows[0])
            queries[..., dim : dim + window] = by_row
            queries[..., dim + window :] = by_column
        return queries.view(math.prod(self.outer), -1, width)

    def scatter_query(self, grad: Tensor, table: Tensor | None, rows: range, into: Tensor) -> Tensor | None:
        """Backward of `queries`: write the query's gradient; return that of its products with the table."""
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
        """Backward of `gather`: write the gradients of tokens and add to that of padding."""
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
    """View each query's products with the table by the row and by the column of a key: (*outer, rows, columns, window).

    `products` (*outer, rows, columns, 2 (2 window - 1)) are contiguous, for distances key - query from -(window - 1) to
    window - 1, of rows and then of columns. From one query to the next, distances move back by one; the first query is
    in row `first_row` of its window.
    """
    shape = (*products.shape[:-1], window)
    *outer, row, column, _ = products.stride()
    start = products.storage_offset() + window - 1
    by_row = products.as_strided(shape, (*outer, row - 1, column, 1), start - first_row)
    by_column = products.as_strided(shape, (*outer, row, column - 1, 1), start + 2 * window - 1)
    return by_row, by_column


def _blocks(query: Tensor, window: int) -> Iterator[_Block]:
    """Yield blocks that cover all heads of all tokens of (B, H, W, heads, d).

    Whole windows, the strips at the right and at the bottom, and the corner are in separate blocks.
    """
    images, height, width, num_heads, _ = query.shape
    threads = torch.get_num_threads()
    memory = threads * CACHE_BYTES
    for (top, bottom, tall), (left, right, wide) in itertools.product(_cut(height, window), _cut(width, window)):
        weights_of_row = (bottom - top) // tall * (right - left) * window**2 * query.element_size()
        heads = min(num_heads, max(threads, memory // (weights_of_row * tall)))
        chunk = max(1, min(tall, memory // (weights_of_row * heads)))
        together = max(1, memory // (weights_of_row * tall * num_heads))  # images whose heads all fit
        for some_images, some_heads in itertools.product(_pieces(images, together), _pieces(num_heads, heads)):
            yield _Block(some_images, top, bottom, left, right, (tall, wide), window, some_heads, chunk)


def _pieces(number: int, size: int) -> list[range]:
    """Split 0..number - 1 into ranges of `size`."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def _cut(size: int, window: int) -> list[tuple[int, int, int]]:
    """Split a side into (first, behind the last, tile) of its whole windows and of the remainder."""
    whole = size - size % window
    return [part for part in ((0, whole, window), (whole, size, size - whole)) if part[2] and part[1] > part[0]]


class TiledAttention(torch.autograd.Function):
    """softmax(q·k / sqrt(d) + q·Rh[y - y'] + q·Rw[x - x']) v within windows, without storing (N, N) weights.

    Tensors, all float32 or all bfloat16: query, key and value (B, H, W, heads, d); pad_key and pad_value (heads, d),
    the projections of SAM's zero padding, or None; table (2 (2 window - 1), d), sqrt(d) times the relative positions by
    the distance key - query, of rows and then of columns, or None. Logits and weights are rounded to that type, as in
    Transformers' attention; the softmax itself is computed in float32.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would cast the softmax's input to float32
    def forward(ctx: Any, window: int, *tensors: Any) -> Tensor:
        """Return (B, H, W, heads, d)."""
        query, key, value, pad_key, pad_value, table = tensors
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for block in _blocks(query, window):
            keys = block.gather("keys", key, pad_key, positions=table is not None)
            values = block.gather("values", value, pad_value)
            for rows in _pieces(block.tile[0], block.chunk):
                weights = _weights(block.queries(query, table, rows), keys)
                view = block.tiles(output, rows)
                view.copy_(_product("output", weights, values).view(view.shape))
        ctx.save_for_backward(*tensors)
        ctx.window = window
        return output

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the weights block by block, and from them the gradients of all tensors."""
        query, key, value, pad_key, pad_value, table = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty(query.shape, dtype=query.dtype) for _ in range(3))
        grad_pads = [None if pad is None else torch.zeros(pad.shape) for pad in (pad_key, pad_value)]
        grad_table = torch.zeros(table.shape) if ctx.needs_input_grad[6] else None
        for block in _blocks(query, ctx.window):
            keys = block.gather("keys", key, pad_key, positions=table is not None)
            values = block.gather("values", value, pad_value)
            of_keys: Any = None
            of_values: Any = None
            chunks = _pieces(block.tile[0], block.chunk)
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
            block.scatter_windows(of_keys, grad_key, grad_pads[0])
            block.scatter_windows(of_values, grad_value, grad_pads[1])
        grads = (grad_pads[0], grad_pads[1], grad_table)
        return None, grad_query, grad_key, grad_value, *(g if g is None else g.to(query.dtype) for g in grads)
