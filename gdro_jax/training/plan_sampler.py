"""What a configuration's sampler needs: its programs, compiled from shapes alone for the configuration's mesh.

Two programs hold most: prompts run and the first rows seated, and a segment of decoding with all slots and the longest
cache. Between segments the cache grows: the old one and the new one lie beside the prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.models.sharding import row_axes
from gdro_jax.sampling import placement, programs
from gdro_jax.sampling.sampler import ranks, reader
from gdro_jax.training import batching, setup
from gdro_jax.training.chips import GIB, Chip
from gdro_jax.training.config import Config
from gdro_jax.training.footprint import Compiled, held, measured
from gdro_jax.training.mesh import Layout


class Sampling(NamedTuple):
    """Of one shard of the mesh: stages (slots, cache), prompts and rows; and the programs, the last two or none.

    `start` runs the prompts; `segment` decodes at the largest stage, `growing` is the move to it.
    """

    stages: tuple[programs.Stage, ...]
    prompts: int
    rows: int
    start: Compiled
    segment: Compiled | None = None
    growing: Compiled | None = None

    @property
    def programs(self) -> dict[str, Compiled]:
        found = {"start": self.start, "segment": self.segment, "growing": self.growing}
        return {name: program for name, program in found.items() if program is not None}


def compile_sampler(
    config: Config,
    architecture: qwen3.Qwen3Config,
    prompt_tokens: int,
    device: jax.Device,
    layout: Layout,
    beside: int = 0,
) -> Sampling:
    """Compiles the sampler's programs for a device or a layout of such.

    Args:
      config: the run's; every prompt gets the same number of rollouts here.
      architecture: of the policy.
      prompt_tokens: what prompts are padded to.
      device, layout: what to compile for.
      beside: bytes of a device that the learner and the reference take meanwhile.

    Raises:
      setup.InputError: `model.attention` cannot run there.
    """
    settings = config.sampling.build((0,))  # which token stops a row changes no shape
    model, asked, seed = _arguments(config, architecture, prompt_tokens, device, layout)
    try:
        kept = reader(model, settings, layout.mesh, device)
    except ValueError as error:
        raise setup.InputError(f"sampling.{error}") from None
    compiled = programs.Programs(settings, layout.mesh, kept)
    shards = layout.shards
    slots = -(-min(settings.slots or config.rows_per_step, config.rows_per_step) // shards)
    growing, shrinking = compiled.stages(slots)
    prompts, rows = len(asked.tokens) // shards, len(asked.prompt) // shards
    impl = str(jax.random.key_impl(jax.random.key(0)))

    def begin(window: int) -> jax.stages.Lowered:
        return compiled.starting.lower(model, asked, seed, slots=slots, window=window, impl=impl)

    start, done = measured(begin(growing[0].window), beside)
    found = Sampling((*growing, *shrinking), prompts, rows, start)
    if done is None:  # where the state lies is known of a compiled program only
        return found
    longest = jax.eval_shape(
        lambda *a: compiled.starting(*a, slots=slots, window=growing[-1].window, impl=impl), model, asked, seed
    )
    context, state = jax.tree.map(_at, longest, done.output_shardings)
    leave_at, tile = _at(jax.ShapeDtypeStruct((), jnp.int32), seed.sharding), programs.tile(prompts, rows)
    segment, _ = measured(compiled.decoding.lower(model, context, state, leave_at, tile=tile), beside)
    return found._replace(segment=segment, growing=_growing(growing, beside, model, context, state))


def _growing(growing: list[programs.Stage], beside: int, *given: object) -> Compiled | None:
    """Prompts, the cache before the last and the last: counted, not compiled."""
    if len(growing) == 1:
        return None
    *arguments, state = (held(x) for x in given)
    return Compiled(0.0, sum(arguments) + state * growing[-2].window // growing[-1].window, state, beside=beside)


def memory(program: Compiled, chip: Chip) -> str:
    """What a program takes of a chip."""
    parts = {"arguments": program.arguments, "temporary": program.temporary, "results": program.results}
    parts |= {"beside": program.beside} if program.beside else {}
    named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"{program.total / GIB:.2f} GiB of {chip.memory / GIB:.2f}: {named}"


def lines(sampling: Sampling, chip: Chip) -> list[str]:
    """For people."""
    slots = sampling.stages[0].slots
    windows = [str(stage.window) for stage in sampling.stages if stage.slots == slots]
    fewer = [str(stage.slots) for stage in sampling.stages if stage.slots != slots]
    shapes = f"{slots} slots of {', '.join(windows)} tokens" + (f", then {', '.join(fewer)} slots" if fewer else "")
    out = [f"sampler     a shard has {sampling.rows} rows, room for {sampling.prompts} prompts, {shapes}"]
    for name, program in sampling.programs.items():
        said = memory(program, chip) if program.refused is None else "refused"
        out.append(f"  {name:<10}{said}" + (f"; compiled in {program.seconds:.1f} s" if program.seconds else ""))
    return out


def knobs(config: Config, architecture: qwen3.Qwen3Config, sampling: Sampling) -> list[str]:
    """What makes sampling smaller, the cheapest first."""
    found, settings = [], config.sampling
    shards = config.rows_per_step // sampling.rows
    if sampling.stages[0].slots > 1:
        half = max(1, sampling.stages[0].slots // 2) * shards
        found.append(f"sampling.slots={half}: half the rows decoded at a time, the same tokens")
    if architecture.num_kv_heads % (2 * config.mesh.tensor) == 0 and shards % 2 == 0:
        wide, data = 2 * config.mesh.tensor, shards // config.mesh.fsdp
        fewer = f" mesh.fsdp={config.mesh.fsdp // 2}" if data % 2 else f" mesh.data={data // 2}"
        found.append(f"mesh.tensor={wide}{fewer}: half of the gathered policy on each chip, half the shards")
    if settings.cache_dtype is None and config.model.dtype == "float32":
        found.append("sampling.cache_dtype=bfloat16: half the cache")
    elif settings.cache_dtype != "int8":
        found.append("sampling.cache_dtype=int8: half the cache, tokens a little off the policy")
    return found


def _arguments(
    config: Config, architecture: qwen3.Qwen3Config, prompt_tokens: int, device: jax.Device, layout: Layout
) -> tuple[qwen3.Qwen3, programs.Asked, jax.ShapeDtypeStruct]:
    """Model, call and seed as the programs take them, without their numbers."""
    kernel, dtype = setup.attention_kernel(config.model, architecture, device), config.model.dtype
    everywhere: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(device)
    split = everywhere
    plain = jax.eval_shape(lambda: qwen3.init(architecture, jax.random.key(0), dtype).arrays())
    model = qwen3.Qwen3(architecture, plain, dtype, config.model.remat, kernel)
    if layout.mesh is not None:
        everywhere = jax.sharding.NamedSharding(layout.mesh, jax.P())
        split = jax.sharding.NamedSharding(layout.mesh, jax.P(row_axes(layout.mesh)))
        model = layout.shapes(architecture, model)
    prompts = config.train.prompts_per_step
    index = batching.flat_index(np.full(prompts, config.controller.mean_rollouts))
    tokens = np.zeros((prompts, prompt_tokens), np.int32)
    even = setup.most_rollouts(config.controller) is not None
    asked, _ = placement.place(tokens, tokens == 0, index, index, ranks(index), index, layout.shards, even)
    seed = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return (
        jax.tree.map(lambda x: _at(x, x.sharding or everywhere), model),
        jax.tree.map(lambda x: _at(x, split), asked),
        _at(seed, everywhere),
    )


def _at(x: jax.ShapeDtypeStruct | np.ndarray, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
