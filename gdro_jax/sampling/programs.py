"""The compiled programs of sampling on one device or a mesh, and the shapes they go through.

A *stage* is a shape of the slots: how many, and how many positions their cache has. Decoding starts with all slots and
a short cache, lengthens the cache when a row outgrows it, and halves the slots as rows end once none waits: half as
many of the longest. So the cache follows the longest row until then rather than the longest allowed, and few slots
idle at the end. In pages a stage has room for so many tokens a slot on average, and grows when all of that is taken;
slots stay, an idle one holds none.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gdro_jax import host_memory
from gdro_jax.models import qwen3
from gdro_jax.models.sharding import TENSOR_AXIS, row_axes, row_shards
from gdro_jax.sampling import segment
from gdro_jax.sampling.config import SamplingConfig

Array = jax.Array | np.ndarray
_FEWEST_SLOTS, _HALVINGS, _LARGEST_TILE = 4, 3, 8
_SHORTEST_HALVED = 140  # tokens; below it a shorter window saves less than one more program costs to compile and keep
_AT_ONCE = 2**30  # more slots than there can be: a segment that ends before its first step


class Stage(NamedTuple):
    """Slots of a shard, and positions of their cache: of each, or in pages on average."""

    slots: int
    window: int


class Asked(NamedTuple):
    """A call, shards one after the other.

    Attributes:
      tokens: int32[D * P, L] prompts padded on the right, mask bool[D * P, L].
      prompt, identity, rank, limit: int32[D * R]; number: int32[D] real rows of each shard.
    """

    tokens: Array
    mask: Array
    prompt: Array
    identity: Array
    rank: Array
    limit: Array
    number: Array


def stages(config: SamplingConfig, slots: int) -> tuple[list[Stage], list[Stage]]:
    """Stages with all slots, their windows doubling, and those that follow them, their slots halving.

    Where nothing stops a row early, rows end together and slots are never halved: those programs are not compiled.
    """
    longest = config.max_new_tokens
    windows, rungs = [longest], [slots]
    if longest > config.segment:
        while len(windows) <= 2 and windows[0] >= _SHORTEST_HALVED:
            windows.insert(0, (windows[0] + 1) // 2)
        while config.stop_tokens and len(rungs) <= _HALVINGS and rungs[-1] >= 2 * _FEWEST_SLOTS:
            rungs.append((rungs[-1] + 1) // 2)
    return [Stage(slots, window) for window in windows], [Stage(n, longest) for n in rungs[1:]]


def stages_in_pages(config: SamplingConfig, slots: int) -> list[Stage]:
    """Stages of a cache in pages: room for a part of the longest row in every slot, for twice that, for the longest.

    Slots are not halved: an idle one holds no pages, and nothing is read for it.
    """
    longest, first = config.max_new_tokens, config.cache_tokens
    if first is None:  # rows of lengths with a heavy tail hold up to 3/8 of the longest, refilled
        first = longest if longest < _SHORTEST_HALVED else -(-3 * longest // 16)
    return [Stage(slots, window) for window in sorted({min(first, longest), min(2 * first, longest), longest})]


def tile(prompts: int, rows: int) -> int:
    """Slots that read a prompt together."""
    return min(_LARGEST_TILE, 1 << max(0, (rows // prompts).bit_length() - 1))


class Programs:
    """The programs of a configuration, compiled once per shape of a call and of a model; see `shared`.

    Args:
      config: of sampling.
      mesh: rows lie along all its axes but `tensor`, heads along that one; None for one device.
      reader: of a cache in pages (`paged.choose`), None for a contiguous one.

    Attributes:
      starting: prompts run and first rows seated: (model, `Asked`, key data, slots, window, impl) to context and state.
      decoding: one segment: (model, context, state, leave_at, tile) to state and look.
    """

    def __init__(self, config: SamplingConfig, mesh: jax.sharding.Mesh | None, reader: str | None = None):
        self._config, self._mesh, self._in_pages = config, mesh, reader is not None
        self.axes, self.shards = row_axes(mesh), row_shards(mesh)
        every, split = PartitionSpec(), PartitionSpec(self.axes)
        self._split = split
        begin = functools.partial(_start, config=config, in_pages=self._in_pages)
        self.starting = self._compiled(begin, (every, split, every), split, static=("slots", "window", "impl"))
        in_step = mesh is not None and mesh.shape.get(TENSOR_AXIS, 1) > 1
        step = functools.partial(segment.segment, config=config, axes=self.axes, in_step=in_step, reader=reader)
        self.decoding = self._compiled(step, (every, split, split, every), (split, every), static=("tile",), donate=2)
        self._move = self._compiled(segment.resize, (split,), split, static=("slots", "window"))
        self._warm: set[Hashable] = set()

    def stages(self, slots: int) -> tuple[list[Stage], list[Stage]]:
        """Stages with all slots, and those that follow them with fewer."""
        return (stages_in_pages(self._config, slots), []) if self._in_pages else stages(self._config, slots)

    def start(self, model: qwen3.Qwen3, asked: Asked, key: jax.Array, slots: int) -> tuple["Decoding", segment.Context]:
        """Prompts run and first rows seated; at a new shape every program is compiled before that."""
        begin, decoding = self.compile(model, asked, key, slots)
        context, decoding.state = begin()
        return decoding, context

    def compile(
        self, model: qwen3.Qwen3, asked: Asked, key: jax.Array, slots: int
    ) -> tuple[Callable[[], tuple[segment.Context, segment.State]], "Decoding"]:
        """Every program of a new shape compiled; what begins such a call, and the call."""
        growing, shrinking = self.stages(slots)
        on_devices = jax.tree.map(lambda x: self._put(x, self._split), asked)
        seed, impl = self._put(np.asarray(jax.random.key_data(key)), PartitionSpec()), str(jax.random.key_impl(key))
        begin = functools.partial(
            self.starting, model, on_devices, seed, slots=slots, window=growing[0].window, impl=impl
        )
        decode = functools.partial(self.decoding, model, tile=tile(len(asked.tokens), len(asked.prompt)))
        decoding = Decoding(growing, shrinking, decode, self._move)
        leaves, form = jax.tree.flatten(model)
        shape = (asked.tokens.shape, len(asked.prompt), slots, form, *((x.shape, x.dtype) for x in leaves))
        if shape not in self._warm:
            decoding.warm_up(*begin())
            self._warm.add(shape)
        return begin, decoding

    def _compiled(
        self, function: Callable, specs: tuple, out: object, static: tuple[str, ...], donate: int | None = None
    ):
        def run(*args, **settings):
            inner = functools.partial(function, **settings)
            if self._mesh is not None:
                inner = jax.shard_map(
                    inner, mesh=self._mesh, in_specs=specs, out_specs=out, axis_names=set(self.axes), check_vma=False
                )
            return inner(*args)

        return jax.jit(run, static_argnames=static, donate_argnums=() if donate is None else donate)

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array | np.ndarray:
        if self._mesh is None:
            return array
        place = jax.sharding.NamedSharding(self._mesh, spec)
        return jax.make_array_from_callback(array.shape, place, lambda part: array[part])


@functools.lru_cache(maxsize=16)
def shared(config: SamplingConfig, mesh: jax.sharding.Mesh | None, reader: str | None) -> Programs:
    """`Programs` of these, the same for all who ask: a run after another compiles nothing that is there already."""
    return Programs(config, mesh, reader)


class Decoding:
    """One call on its way through the stages."""

    state: segment.State

    def __init__(self, growing: list[Stage], shrinking: list[Stage], segment_: Callable, move: Callable):
        self._growing, self._shrinking = growing, shrinking
        self._segment, self._move = segment_, move
        self._window = self._rung = 0  # windows passed, and rungs of slots passed

    def warm_up(self, context: segment.Context, state: segment.State) -> None:
        """Goes through every stage without a step, which compiles it; what compiling took is given back each time."""
        host_memory.trim()
        for at, stage in enumerate(self._growing):
            if at:
                state = self._move(state, **stage._asdict())
            state, _ = self._segment(context, state, np.int32(_AT_ONCE))
            host_memory.trim()
            if self._shrinking:
                small = self._move(state, **self._shrinking[0]._asdict())
        for at, stage in enumerate(self._shrinking):
            small = self._move(small, **stage._asdict()) if at else small
            small, _ = self._segment(context, small, np.int32(_AT_ONCE))
            host_memory.trim()

    def advance(self, context: segment.Context) -> segment.Look:
        """Decodes one segment more; returns before it is done."""
        last = self._rung == len(self._shrinking)
        leave_at = 0 if last else self._shrinking[self._rung].slots
        self.state, look = self._segment(context, self.state, np.int32(leave_at))
        return look

    def move(self, live: int, waiting: int, full: bool) -> None:
        """Moves on to the shape that the rows left need, a larger one where the cache is full."""
        while waiting == 0 and self._rung < len(self._shrinking) and live <= self._shrinking[self._rung].slots:
            self.state = self._move(self.state, **self._shrinking[self._rung]._asdict())
            self._rung += 1
        if self._rung == 0 and full:
            self._window += 1
            self.state = self._move(self.state, **self._growing[self._window]._asdict())


def _start(
    model: qwen3.Qwen3,
    asked: Asked,
    seed: jax.Array,
    slots: int,
    window: int,
    impl: str,
    config: SamplingConfig,
    in_pages: bool,
) -> tuple[segment.Context, segment.State]:
    tokens, mask, prompt, identity, rank, limit, number = map(jnp.asarray, asked)
    keys = segment.row_keys(jax.random.wrap_key_data(seed, impl=impl), identity, rank)
    rows = segment.Rows(prompt, keys, limit, number)
    return segment.start(model, tokens, mask, rows, slots, window, config, in_pages)
