"""What a configuration's steps need, before anything runs: shapes, compile time, memory, FLOPs, roofline.

Where prompts have a limit it is taken for the longest of them, which a run may find to be shorter: the most it needs.
The update is compiled as the trainer compiles it, for the configuration's mesh, from shapes alone: no weights are read,
and the devices may be a TPU slice that is not there (`chips.devices`). Memory is the compiler's own analysis, of one
device. FLOPs are counted here, since the compiler counts the body of a loop over layers or microbatches once.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.models import lora, qwen3
from gdro_jax.models.config import work
from gdro_jax.training import batching, packing, plan_sampler, setup, step
from gdro_jax.training.chips import GIB, Chip
from gdro_jax.training.config import Config
from gdro_jax.training.footprint import Compiled, held, measured
from gdro_jax.training.mesh import ONE_DEVICE, Layout
from gdro_jax.training.optimiser import make_optimiser

FORWARD_PASSES = {"none": 1.0, "products": 1.0, "block": 2.0}  # with what the backward pass makes again of the blocks


class Shapes(NamedTuple):
    """P prompts, R rows, L prompt and T response tokens; a piece has rows and room for prompts; `pieces` in all.

    Of the pieces `shards` are worked on at the same time. With `train.attention_tile` prompts are a minibatch's of one
    shard, rows what a piece has room for, `packed` the other shapes.
    """

    prompts: int
    rows: int
    prompt_tokens: int
    response_tokens: int
    pieces: int
    piece_rows: int
    piece_prompts: int
    packed: packing.Shapes | None = None
    shards: int = 1


def shapes(config: Config, prompt_tokens: int, layout: Layout = ONE_DEVICE) -> Shapes:
    """The step's shapes."""
    prompts, rows = config.train.prompts_per_step, config.rows_per_step
    train, tokens, shards = config.train, config.sampling.max_new_tokens, layout.shards
    pieces, tile = train.minibatches * train.microbatches * shards, train.attention_tile
    cuts = pieces if tile is None else train.minibatches * shards
    room = batching.prompts_per_piece(prompts, rows, cuts, setup.most_rollouts(config.controller))
    packed = None
    if tile is not None:
        packed = packing.sizes(tile, rows // cuts, train.microbatches, tokens)
    held = rows // pieces if packed is None else packed[0].rows
    return Shapes(prompts, rows, prompt_tokens, tokens, pieces, held, room, packed, shards)


def compile_step(
    config: Config, architecture: qwen3.Qwen3Config, shape: Shapes, device: jax.Device, layout: Layout = ONE_DEVICE
) -> Compiled:
    """Compiles the training step for a device or a layout of such, its learner donated as in a run.

    Raises:
      setup.InputError: `model.attention` cannot run there.
    """
    learner, batch, reference = _laid_out(config, architecture, shape, device, layout)
    lowered = step.compiled_update().lower(
        learner, reference, batch, config=config.train, temperature=config.sampling.temperature, layout=layout
    )
    return measured(lowered)[0]


def compile_sampler(
    config: Config, architecture: qwen3.Qwen3Config, shape: Shapes, device: jax.Device, layout: Layout = ONE_DEVICE
) -> plan_sampler.Sampling | None:
    """Compiles what samples for such; None where a server does.

    Raises:
      setup.InputError: `model.attention` cannot run there.
    """
    if config.sampling.server is not None:
        return None
    learner, _, reference = _laid_out(config, architecture, shape, device, layout)
    beside = held((learner, reference))
    if config.model.lora_rank is None and config.model.param_dtype == config.model.dtype:
        beside -= held(learner.model)  # what is sampled from is the learner's own
    return plan_sampler.compile_sampler(config, architecture, shape.prompt_tokens, device, layout, beside)


def _laid_out(
    config: Config, architecture: qwen3.Qwen3Config, shape: Shapes, device: jax.Device, layout: Layout
) -> tuple[step.Learner, step.Batch, qwen3.Qwen3 | None]:
    """Shapes of learner, batch and reference."""
    kernel = setup.attention_kernel(config.model, architecture, device)
    learner, batch, reference = jax.eval_shape(lambda: _arguments(config, architecture, shape, kernel))
    everywhere: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(device)
    if layout.mesh is not None:
        everywhere = jax.sharding.NamedSharding(layout.mesh, jax.P())
        learner, reference = layout.shapes(architecture, (learner, reference))
    learner, batch, reference = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere), (learner, batch, reference)
    )
    return learner, batch, reference


def flops(config: Config, architecture: qwen3.Qwen3Config, shape: Shapes) -> float:
    """Of one step's update: two a multiplication, all tokens real.

    The head's loss and gradients are three products; two where it gets none, four where slopes wait for the whole
    response.
    """
    per_token, per_pair = work(architecture)
    length = shape.response_tokens
    prompt, response = shape.piece_prompts * shape.prompt_tokens, shape.rows / shape.pieces * length

    def blocks(tokens: float, keys: int) -> float:
        return tokens * (per_token + per_pair * keys)

    head = 2.0 * response * architecture.hidden_size * architecture.vocab_size
    passes = FORWARD_PASSES[config.model.remat] + 2
    other = int(config.train.kl_coef > 0)  # forward passes besides: the reference's, the trainer's own before the step
    other += int(config.train.importance_cap is not None and config.train.minibatches > 1)
    products = 3 + int(config.train.ratio_level == "sequence") - int(config.model.lora_rank is not None)
    responses = (passes + other) * blocks(response, shape.prompt_tokens + length) + (products + other) * head
    prompts = (passes + other) * blocks(prompt, shape.prompt_tokens)
    if shape.packed is None:
        return shape.pieces * (responses + prompts)
    again = blocks(prompt, shape.prompt_tokens)  # prompts run once more for their gradient, after all pieces
    return shape.pieces * responses + config.train.minibatches * shape.shards * (prompts + again)


def traffic(config: Config, architecture: qwen3.Qwen3Config, shape: Shapes, layout: Layout = ONE_DEVICE) -> float:
    """Bytes that a device moves in a step at the least: parameters read twice a piece, gradients added, the update."""
    split = {} if layout.mesh is None else dict(layout.mesh.shape)
    computed = qwen3.num_params(architecture) / split.get("tensor", 1)  # what a device computes with, and what it holds
    held, working = computed / split.get("fsdp", 1), np.dtype(config.model.dtype).itemsize
    if config.model.lora_rank is not None:  # nothing else has gradients and an optimiser's state
        names = lora.targets(config.model.lora_targets)
        specs = lora.adapter_specs(architecture, config.model.lora_rank, names).values()
        held = architecture.num_layers * sum(math.prod(spec.shape) for spec in specs) / split.get("fsdp", 1)
    pieces = shape.pieces // shape.shards
    return pieces * (2 * working * computed + 8 * held) + config.train.minibatches * 28 * held


def knobs(config: Config, shape: Shapes) -> list[str]:
    """What makes a step smaller, the cheapest first."""
    train, model = config.train, config.model
    found = []
    if shape.piece_rows > 1 and config.rows_per_step % (2 * shape.pieces) == 0:
        found.append(f"train.microbatches={2 * train.microbatches}: half the rows at a time, the same result")
    if model.remat != "block":
        found.append("model.remat=block: only the blocks' inputs are kept, about a third more time")
    if model.dtype == "float32":
        found.append("model.dtype=bfloat16: half the activations")
    fsdp = config.mesh.fsdp
    if shape.shards % (2 * fsdp) == 0:
        data = "" if config.mesh.data is None else f" mesh.data={shape.shards // (2 * fsdp)}"
        found.append(f"mesh.fsdp={2 * fsdp}{data}: parameters and optimiser states in twice as many parts")
    if train.kl_coef > 0 and model.lora_rank is None:  # under adapters it is what they are trained on
        found.append("train.kl_coef=0: no reference policy")
    if train.moment_dtype == "float32" and train.optimiser != "adafactor":
        found.append("train.moment_dtype=bfloat16: half the first moment")
    if train.optimiser != "adafactor":
        found.append("train.optimiser=adafactor: hardly any optimiser state")
    if model.lora_rank is None:
        found.append("model.lora_rank: adapters alone have gradients and optimiser states")
    found.append("sampling.max_new_tokens: shorter responses; or more devices")
    return found


def text(
    config: Config,
    architecture: qwen3.Qwen3Config,
    shape: Shapes,
    compiled: Compiled,
    chip: Chip,
    layout: Layout = ONE_DEVICE,
    sampler: plan_sampler.Sampling | None = None,
) -> str:
    """The plan for people; `sampler` of `compile_sampler`."""
    sizes = {} if layout.mesh is None else dict(layout.mesh.shape)
    work = flops(config, architecture, shape) / math.prod(sizes.values())
    moved = traffic(config, architecture, shape, layout)
    lines = [
        f"device      {chip.name}, {chip.memory / GIB:.1f} GiB"
        f", {chip.flops / 1e12:.3g} TFLOP/s{' measured just now' if chip.measured else ''}",
        f"model       {qwen3.num_params(architecture) / 1e6:.1f} million parameters, {architecture.num_layers} layers",
        f"step        {shape.prompts} prompts of at most {shape.prompt_tokens} tokens, {shape.rows} rows "
        f"of {shape.response_tokens} tokens",
        *_pieces(config, shape),
        f"compile     {compiled.seconds:.1f} s, the update's one program",
    ]
    if sizes:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items())
        lines.insert(1, f"mesh        {named}: {shape.shards} pieces at a time; what follows is a device's share")
    if compiled.refused is None:
        lines.append(f"memory      {plan_sampler.memory(compiled, chip)}")
    arithmetic = work / chip.flops
    lines.append(f"work        {work:.3g} FLOP: {arithmetic:.3g} s at the peak rate")
    if chip.bandwidth:
        bound = "arithmetic" if arithmetic >= moved / chip.bandwidth else "memory"
        lines.append(
            f"traffic     {moved / GIB:.3g} GiB at the least: {moved / chip.bandwidth:.3g} s; {bound} bounds it"
        )
    if sampler is not None:
        lines += plan_sampler.lines(sampler, chip)
    turn = knobs(config, shape) if not fits(compiled, chip) else []
    asked = {"update": compiled} | ({} if sampler is None else sampler.programs)
    large = [name for name, program in asked.items() if not fits(program, chip)]
    if sampler is not None and large not in ([], ["update"]):
        turn += plan_sampler.knobs(config, architecture, sampler)
    if large:
        reasons = [f" ({asked[name].refused})" for name in large if asked[name].refused is not None]
        lines.append(f"fits        no: {', '.join(large)}{''.join(reasons)}; to make it smaller:")
        lines += [f"            {knob}" for knob in dict.fromkeys(turn)]
    else:
        lines.append(f"fits        yes, {'update and sampler' if sampler is not None else 'the update'}")
    return "\n".join(lines)


def _pieces(config: Config, shape: Shapes) -> list[str]:
    updates, pieces = config.train.minibatches, config.train.microbatches
    if shape.packed is None:
        return [
            f"piece       {shape.piece_rows} rows, {shape.piece_prompts} prompts; {updates} updates of {pieces} pieces"
        ]
    of_rows = " or ".join(f"{found.tokens} tokens of at most {found.rows} rows" for found in shape.packed)
    of_prompts = " or ".join(str(found.tokens) for found in _prompt_sizes(config, shape))
    return [
        f"piece       {of_rows}; {updates} updates, each in {pieces} full pieces or more "
        "where every response is as long as may be, and in fewer the shorter they are",
        f"attention   tiles of {shape.packed[0].tiling.tokens} queries by as many keys",
        f"prompts     {shape.piece_prompts} an update, before its pieces, in pieces of {of_prompts} tokens",
    ]


def fits(compiled: Compiled, chip: Chip) -> bool:
    """Whether the compiler took it and it is within the chip's memory."""
    return compiled.refused is None and compiled.total <= chip.memory


def _arguments(
    config: Config, architecture: qwen3.Qwen3Config, shape: Shapes, kernel: str
) -> tuple[step.Learner, step.Batch, qwen3.Qwen3 | None]:
    """A learner, a batch and a reference of these shapes, to be traced only."""
    low_rank = config.model.lora_rank is not None
    held = config.model.dtype if low_rank else config.model.param_dtype
    model = qwen3.init(architecture, jax.random.key(0), held)
    model = qwen3.Qwen3(architecture, model.arrays(), config.model.dtype, config.model.remat, kernel)
    rollouts = np.full(shape.prompts, shape.rows // shape.prompts)
    rows, tokens = shape.rows, shape.response_tokens
    batch = step.Batch(
        prompts=np.zeros((shape.prompts, shape.prompt_tokens), np.int32),
        prompt_mask=np.ones((shape.prompts, shape.prompt_tokens), bool),
        weights=np.ones(shape.prompts, np.float32),
        prompt_index=batching.flat_index(rollouts),
        tokens=np.zeros((rows, tokens), np.int32),
        mask=np.ones((rows, tokens), bool),
        logprobs=np.zeros((rows, tokens), np.float32),
        rewards=np.zeros(rows, np.float32),
        scorable=np.ones(rows, bool),
        pieces=_cut(config, shape),
    )
    reference = qwen3.working(model) if low_rank or config.train.kl_coef > 0 else None
    trained = setup.adapters(config.model, architecture, jax.random.key(0)) if low_rank else model
    batch = jax.tree.map(jax.numpy.asarray, batch)
    return step.Learner(trained, make_optimiser(config.train).init(trained)), batch, reference


def _cut(config: Config, shape: Shapes) -> batching.Pieces | packing.Packed:
    cuts = shape.pieces if shape.packed is None else config.train.minibatches * shape.shards
    rows = np.zeros((cuts, shape.rows // cuts), np.int32)
    pieces = batching.Pieces(rows, np.zeros((cuts, shape.piece_prompts), np.int32), rows)
    if shape.packed is None:
        return pieces
    full, before = np.full(shape.rows, shape.response_tokens), np.full(shape.prompts, shape.prompt_tokens)
    idle = np.zeros(shape.rows, bool)
    prompts = _prompt_sizes(config, shape)
    return packing.pack(
        pieces, full, before, idle, shape.packed, prompts, config.train.minibatches, shape.response_tokens
    )


def _prompt_sizes(config: Config, shape: Shapes) -> packing.Shapes:
    assert config.train.attention_tile is not None
    return packing.prompt_sizes(config.train.attention_tile, shape.piece_prompts, shape.prompt_tokens)
