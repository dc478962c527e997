"""A run's configuration: frozen sections, every field of which does something. The defaults are the demo's."""

import dataclasses

from gdro_jax import controllers
from gdro_jax.data.orders import LOADERS
from gdro_jax.data.prompts import resolve_template
from gdro_jax.models import lora
from gdro_jax.models.attention import KERNELS
from gdro_jax.models.qwen3 import REMAT
from gdro_jax.rewards.verifier import check_name
from gdro_jax.sampling import SamplingConfig


def _check(ok: bool, section: str, field: str, value: object, allowed: str) -> None:
    if not ok:
        shown = "null" if value is None else repr(value)  # as it is written in YAML
        raise ValueError(f"{section}.{field}={shown}: must be {allowed}")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where, how long and with what seed.

    Attributes:
      output: the run's folder.
      seed: of everything random.
      steps: training steps.
      checkpoint_every: steps between checkpoints, None for one at the end only.
      keep_checkpoints: how many of the newest are kept.
      log_every: steps between lines of progress where standard error is not a terminal.
      save_model: write the trained policy as a Hugging Face folder, `model/`, at the end.
    """

    output: str = "runs/demo"
    seed: int = 0
    steps: int = 100
    checkpoint_every: int | None = 50
    keep_checkpoints: int = 2
    log_every: int = 10
    save_model: bool = True

    def __post_init__(self) -> None:
        _check(bool(self.output.strip()), "run", "output", self.output, "a folder")
        _check(self.steps >= 1, "run", "steps", self.steps, "at least 1")
        _check(0 <= self.seed < 2**31, "run", "seed", self.seed, "in 0..2147483647")
        ok = self.checkpoint_every is None or self.checkpoint_every >= 1
        _check(ok, "run", "checkpoint_every", self.checkpoint_every, "at least 1, or null for the end only")
        _check(self.keep_checkpoints >= 1, "run", "keep_checkpoints", self.keep_checkpoints, "at least 1")
        _check(self.log_every >= 1, "run", "log_every", self.log_every, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The initial policy.

    Attributes:
      path: a Hugging Face folder, a name on its hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, or `embedded` for the base
        shipped with the package.
      dtype: of compute, and of the exported policy: `float32` or `bfloat16`.
      param_dtype: of the parameters that the optimiser changes; its state is float32 (`train.moment_dtype`). A step
        smaller than 1/256 of a weight is lost in `bfloat16`, which a learning rate of 1e-6 always is; `float32` keeps
        it.
      remat: what of each layer is kept for the backward pass: `none` what products and attention take and give,
        `products` the results of matrix products, `block` the layer's input alone. Less memory for more time, the same
        result.
      attention: the kernel over padded prompts and responses, not over the streams of `train.attention_tile`: `xla`
        anywhere, `cudnn` on NVIDIA GPUs in bfloat16, `splash` on TPUs where heads are multiples of 128; `auto` takes
        the platform's own in bfloat16, where it can run, else `xla`, which alone multiplies float32 in all of its bits.
      lora_rank: r of low-rank adapters (arXiv 2106.09685), which alone are trained, in `param_dtype`, over the frozen
        model in `dtype`; None to train all parameters.
      lora_alpha: the adapters' product counts alpha / r times.
      lora_targets: the matrices adapted, `all` of attention and MLP or names of some, as `q_proj,v_proj`.
      tokenizer: where the tokenizer is, as `path` says it; None for the model's own.
      random_init: seed of a random initialisation from the folder's config.json alone, None to load its weights.
    """

    path: str = "embedded"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_targets: str = "all"
    tokenizer: str | None = None
    random_init: int | None = None

    def __post_init__(self) -> None:
        ok = self.random_init is None or 0 <= self.random_init < 2**31
        _check(ok, "model", "random_init", self.random_init, "in 0..2147483647, or null")
        for field in ("dtype", "param_dtype"):
            value = getattr(self, field)
            _check(value in ("float32", "bfloat16"), "model", field, value, "float32 or bfloat16")
        _check(self.remat in REMAT, "model", "remat", self.remat, " or ".join(REMAT))
        self._check_lora()
        kinds = ("auto", *KERNELS)
        _check(self.attention in kinds, "model", "attention", self.attention, " or ".join(kinds))
        ok = self.param_dtype == "float32" or self.dtype == "bfloat16"
        _check(ok, "model", "param_dtype", self.param_dtype, "float32 where model.dtype is")

    def _check_lora(self) -> None:
        ok = self.lora_rank is None or self.lora_rank >= 1
        _check(ok, "model", "lora_rank", self.lora_rank, "at least 1, or null for no adapters")
        ok = 0 < self.lora_alpha < float("inf")
        _check(ok, "model", "lora_alpha", self.lora_alpha, "above 0, and finite")
        try:
            lora.targets(self.lora_targets)
        except ValueError as error:
            raise ValueError(f"model.lora_targets={self.lora_targets!r}: {error}") from None
        for field, default in (("lora_alpha", 16.0), ("lora_targets", "all")):
            ok = self.lora_rank is not None or getattr(self, field) == default
            _check(ok, "model", field, getattr(self, field), f"{default} without model.lora_rank, which it belongs to")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Problems, prompts and verification.

    Attributes:
      train: a JSON-lines or parquet file of problems, `hub:OWNER/DATASET/FILE` for one on the Hugging Face hub,
        `tasks:FAMILY@LEVELS*COUNT,...` for procedural ones (`gdro_jax.data.tasks`), or `embedded` for the set of
        them that ships with the package.
      mixture: such names to their shares of every step, instead of `train`; None for one set.
      loader: `builtin`, or `grain`, which a mixture needs; both are pure functions of seed and position.
      gold_check: `refuse` or `drop` rows whose answer the verifier cannot parse or that does not equal itself, None to
        train on them unseen.
      contamination: `report`, `drop` or `refuse` training problems that are there twice or that overlap evaluation
        problems (`eval.data` and the benchmarks in `benchmarks`), None not to look.
      benchmarks: a folder of benchmark files to look for overlaps with.
      prompt_column, answer_column, stratum_column: names in that file, None to recognise the published benchmarks' own.
      on_bad_row: `refuse` or `drop` a row that cannot be used.
      template: `plain` (the problem alone), `boxed` (the instruction of arXiv 2601.19280 after it), or a text with
        `{problem}` in it.
      chat: None for the template's text as it is (base models); `{}` to make it the user's turn in the tokenizer's chat
        template; `system` in it is the system's turn, other entries, such as `enable_thinking`, go to that template.
      max_prompt_tokens: longest prompt, None for the longest there is; longer ones are treated as `overlong` says,
        `drop` or `refuse`. Prompts are padded to the longest that is left. Without a limit `drop` leaves out prompts
        above what the model's positions leave besides the longest response.
      verifier: `exact` (the whole response), `math` (the last box, by math-verify), `numeric` (the last box, a number),
        `choice` (the last box, an option's letter), or a function of yours as `package.module:function`.
      verifier_workers: processes of the `math` verifier or of yours.
      verifier_timeout: seconds one response may take.
      max_unscorable: the run stops when more than this share of the rows of a step, or of an evaluation, is unscorable.
    """

    train: str = "embedded"
    mixture: dict[str, object] | None = None
    loader: str = "builtin"
    gold_check: str | None = "refuse"
    contamination: str | None = "report"
    benchmarks: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    stratum_column: str | None = None
    on_bad_row: str = "refuse"
    template: str = "plain"
    chat: dict[str, object] | None = None
    max_prompt_tokens: int | None = None
    overlong: str = "refuse"
    verifier: str = "exact"
    verifier_workers: int = 2
    verifier_timeout: float = 5.0
    max_unscorable: float = 0.2

    def __post_init__(self) -> None:
        _check(self.on_bad_row in ("refuse", "drop"), "data", "on_bad_row", self.on_bad_row, "refuse or drop")
        _check(self.loader in LOADERS, "data", "loader", self.loader, " or ".join(LOADERS))
        _check(
            self.gold_check in ("refuse", "drop", None), "data", "gold_check", self.gold_check, "refuse, drop or null"
        )
        ok = self.contamination in ("report", "drop", "refuse", None)
        _check(ok, "data", "contamination", self.contamination, "report, drop, refuse or null")
        shares = [] if self.mixture is None else list(self.mixture.values())
        ok = self.mixture is None or (bool(shares) and all(_is_share(s) for s in shares))
        _check(ok, "data", "mixture", self.mixture, "names of sets with positive shares, or null")
        ok = self.mixture is None or self.loader == "grain"
        _check(ok, "data", "loader", self.loader, "grain with data.mixture")
        try:
            resolve_template(self.template)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        ok = self.max_prompt_tokens is None or self.max_prompt_tokens >= 1
        _check(ok, "data", "max_prompt_tokens", self.max_prompt_tokens, "at least 1, or null")
        _check(self.overlong in ("drop", "refuse"), "data", "overlong", self.overlong, "drop or refuse")
        try:
            check_name(self.verifier)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        _check(self.verifier_workers >= 1, "data", "verifier_workers", self.verifier_workers, "at least 1")
        ok = 0 < self.verifier_timeout < float("inf")
        _check(ok, "data", "verifier_timeout", self.verifier_timeout, "above 0 seconds, and finite")
        _check(0 <= self.max_unscorable <= 1, "data", "max_unscorable", self.max_unscorable, "a share in 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is added to right (1) and wrong (0) before advantages are taken; controllers and evaluations never see it.

    Attributes:
      overlong_buffer: tokens before `sampling.max_new_tokens` over which a penalty grows from 0 to `overlong_penalty`
        (arXiv 2503.14476, Eq. 13), None for no penalty.
      format_reward: added to a response with a complete box, right or wrong; None for nothing.
    """

    overlong_buffer: int | None = None
    overlong_penalty: float = 1.0
    format_reward: float | None = None

    def __post_init__(self) -> None:
        ok = self.overlong_buffer is None or self.overlong_buffer >= 1
        _check(ok, "reward", "overlong_buffer", self.overlong_buffer, "at least 1, or null")
        ok = 0 < self.overlong_penalty < float("inf")
        _check(ok, "reward", "overlong_penalty", self.overlong_penalty, "above 0, and finite")
        ok = self.overlong_buffer is not None or self.overlong_penalty == 1.0
        _check(ok, "reward", "overlong_penalty", self.overlong_penalty, "1.0 without reward.overlong_buffer")
        ok = self.format_reward is None or 0 < self.format_reward < float("inf")
        _check(ok, "reward", "format_reward", self.format_reward, "above 0, and finite, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The rule that weighs prompts and allots rollouts.

    Attributes:
      name: one of `gdro_jax.controllers.names()`.
      mean_rollouts: rollouts per prompt, exactly, on average over a step.
      settings: passed to `gdro_jax.controllers.make`, which refuses what it does not know.
    """

    name: str = "uniform"
    mean_rollouts: int = 4
    settings: dict[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            controllers.settings(self.name)
        except ValueError as error:
            raise ValueError(f"controller.name={self.name!r}: {error}") from None
        _check(self.mean_rollouts >= 1, "controller", "mean_rollouts", self.mean_rollouts, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How training responses are sampled; the stop tokens are the model's own.

    Attributes:
      max_new_tokens, temperature, slots, segment, cache_dtype, cache, page_tokens, cache_tokens: see
        `gdro_jax.sampling.SamplingConfig`; the last six hold for evaluation too; where slots is None a
        run's evaluations decode no more rows at a time than a step has.
      top_p, top_k, min_p, min_new_tokens: see there; training refuses whatever cuts the distribution off.
      gap_tolerance: a run whose sampler and trainer differ by more than this in log-probability, on average over
        tokens, refuses to start, and ends at the step where a served model does; None does not compare.
      server: samples training responses by an OpenAI-style completions endpoint instead, such as
        `http://localhost:8000/v1`, see docs/sampling.md; None for this package's sampler. Evaluation is not affected.
      server_folder: the folder that it serves; every new policy is written there before the server reads it again.
      server_model: what the server calls the model, None for `server_folder`.
      server_timeout: seconds that one of its answers may take.
    """

    max_new_tokens: int = 6
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 1
    slots: int | None = None
    segment: int = 32
    cache_dtype: str | None = None
    cache: str = "auto"
    page_tokens: int = 64
    cache_tokens: int | None = None
    gap_tolerance: float | None = 0.05
    server: str | None = None
    server_folder: str | None = None
    server_model: str | None = None
    server_timeout: float = 600.0

    def __post_init__(self) -> None:
        try:
            self.build(())
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from None
        ok = self.gap_tolerance is None or 0 <= self.gap_tolerance < float("inf")
        _check(ok, "sampling", "gap_tolerance", self.gap_tolerance, "0 or above and finite, or null not to compare")
        ok = self.server is None or self.server.startswith(("http://", "https://"))
        _check(ok, "sampling", "server", self.server, "a url that starts with http:// or https://, or null")
        ok = (self.server is None) == (self.server_folder is None)
        _check(ok, "sampling", "server_folder", self.server_folder, "given with sampling.server, and only then")
        ok = self.server is not None or self.server_model is None
        _check(ok, "sampling", "server_model", self.server_model, "null without sampling.server")
        ok = 0 < self.server_timeout < float("inf")
        _check(ok, "sampling", "server_timeout", self.server_timeout, "above 0 seconds, and finite")
        ok = self.server is None or self.cache_dtype is None
        _check(ok, "sampling", "cache_dtype", self.cache_dtype, "null with sampling.server, which chooses its own")
        ok = self.server is None or self.cache == "auto"
        _check(ok, "sampling", "cache", self.cache, "auto with sampling.server, which chooses its own")

    def build(self, stop_tokens: tuple[int, ...]) -> SamplingConfig:
        """The sampler's own configuration."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            min_new_tokens=self.min_new_tokens,
            stop_tokens=stop_tokens,
            slots=self.slots,
            segment=self.segment,
            cache_dtype=self.cache_dtype,
            cache=self.cache,
            page_tokens=self.page_tokens,
            cache_tokens=self.cache_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The GRPO step. Names and defaults follow arXiv 2601.19280 unless the tiny demo policy needs its own.

    Attributes:
      prompts_per_step: P.
      minibatches: optimiser updates per step; the step's rows are split evenly among them.
      microbatches: pieces a minibatch is split into to save memory; the result does not depend on it.
      attention_tile: responses go end to end in streams of a microbatch's tokens instead of each being padded to
        `sampling.max_new_tokens`, attention in tiles of so many queries by as many keys (docs/training.md); None pads.
        The result does not depend on it.
      optimiser: `adamw`, `adafactor` or `muon` (`training.optimiser`); moment_dtype: of the first moment, `float32` or
        `bfloat16`.
      learning_rate, warmup_steps, adam_b1, adam_b2, adam_eps, weight_decay, max_grad_norm: of the optimiser, behind a
        clip of the gradient's global norm; Muon takes the betas for what is no matrix of a block.
      decay, decay_steps, final_rate: how the rate falls after the warm-up, `linear` or `cosine`, over how many updates,
        and to what share of learning_rate; None keeps it constant.
      max_skipped: an update whose loss or gradient is not finite is left out; more in a row than this end the run.
      kl_coef, kl_estimator: pull to the frozen initial policy; at 0 no reference is kept.
      clip_low, clip_high, dual_clip: of the ratio (Eq. 5); ratio_level: `token`, or `sequence` for one per response.
      importance_cap: the ratio is to the trainer's own log-probs before the step, and each token's surrogate weighs
        min(trainer / sampler, cap), for a sampler that is not quite the policy; None takes the sampler's log-probs.
      aggregate: `sequence`, `token` or `constant` length aggregation; with `token` each minibatch divides by its own
        tokens.
      row_weighting: `prompt` (every prompt weighs the same) or `rollout` (every row does).
      advantage_scale: `std` or `none`; advantage_baseline: `mean` or `leave_one_out`; advantage_clip: bound or None.
    """

    prompts_per_step: int = 64
    minibatches: int = 1
    microbatches: int = 1
    attention_tile: int | None = None
    optimiser: str = "adamw"
    moment_dtype: str = "float32"
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    decay: str | None = None
    decay_steps: int | None = None
    final_rate: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped: int = 10
    kl_coef: float = 0.001
    kl_estimator: str = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    ratio_level: str = "token"
    importance_cap: float | None = None
    aggregate: str = "sequence"
    row_weighting: str = "prompt"
    advantage_scale: str = "std"
    advantage_baseline: str = "mean"
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        for field in ("prompts_per_step", "minibatches", "microbatches"):
            _check(getattr(self, field) >= 1, "train", field, getattr(self, field), "at least 1")
        ok = self.attention_tile is None or self.attention_tile >= 1
        _check(ok, "train", "attention_tile", self.attention_tile, "at least 1, or null for padded rows")
        for field in ("learning_rate", "adam_eps"):
            _check(0 < getattr(self, field) < float("inf"), "train", field, getattr(self, field), "above 0, and finite")
        _check(self.max_grad_norm > 0, "train", "max_grad_norm", self.max_grad_norm, "above 0")
        for field in ("warmup_steps", "weight_decay", "kl_coef", "clip_low", "clip_high"):
            _check(
                0 <= getattr(self, field) < float("inf"), "train", field, getattr(self, field), "0 or above, and finite"
            )
        _check(self.clip_low <= 1, "train", "clip_low", self.clip_low, "in 0..1")
        for field in ("adam_b1", "adam_b2"):
            _check(0 <= getattr(self, field) < 1, "train", field, getattr(self, field), "in [0, 1)")
        _check(self.max_skipped >= 0, "train", "max_skipped", self.max_skipped, "at least 0")
        ok = self.importance_cap is None or 0 < self.importance_cap < float("inf")
        _check(ok, "train", "importance_cap", self.importance_cap, "above 0, and finite, or null for off")
        self._check_optimiser()
        choices = {
            "ratio_level": ("token", "sequence"),
            "kl_estimator": ("k1", "k2", "k3"),
            "aggregate": ("sequence", "token", "constant"),
            "row_weighting": ("prompt", "rollout"),
            "advantage_scale": ("std", "none"),
            "advantage_baseline": ("mean", "leave_one_out"),
        }
        for field, allowed in choices.items():
            _check(getattr(self, field) in allowed, "train", field, getattr(self, field), " or ".join(allowed))
        ok = self.kl_coef > 0 or self.kl_estimator == "k3"
        _check(ok, "train", "kl_estimator", self.kl_estimator, "k3 with train.kl_coef=0, which has no use for it")
        ok = self.dual_clip is None or self.dual_clip > 1
        _check(ok, "train", "dual_clip", self.dual_clip, "above 1, or null for off")
        ok = self.advantage_clip is None or self.advantage_clip > 0
        _check(ok, "train", "advantage_clip", self.advantage_clip, "above 0, or null for off")

    def _check_optimiser(self) -> None:
        choices = {"optimiser": ("adamw", "adafactor", "muon"), "moment_dtype": ("float32", "bfloat16")}
        for field, allowed in choices.items():
            _check(getattr(self, field) in allowed, "train", field, getattr(self, field), " or ".join(allowed))
        if self.optimiser == "adafactor":  # it has no first moment, and a decay rate of its own for the second
            for field in ("moment_dtype", "adam_b1", "adam_b2", "adam_eps"):
                default = TrainConfig.__dataclass_fields__[field].default
                allowed_value = f"{default}: optimiser=adafactor does not use it"
                _check(getattr(self, field) == default, "train", field, getattr(self, field), allowed_value)
        _check(self.decay in (None, "linear", "cosine"), "train", "decay", self.decay, "linear or cosine, or null")
        ok = (self.decay is None) == (self.decay_steps is None) and (self.decay_steps is None or self.decay_steps >= 1)
        _check(ok, "train", "decay_steps", self.decay_steps, "at least 1 with train.decay, null without")
        ok = 0 <= self.final_rate <= 1 and (self.decay is not None or self.final_rate == 0)
        _check(ok, "train", "final_rate", self.final_rate, "in 0..1 with train.decay, 0 without")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the run's devices, those of all its processes, are laid out: data x fsdp x tensor of them.

    Rows of sampling and training lie along data and fsdp. No token and no gradient depends on it beyond rounding.

    Attributes:
      data: parts of the rows, each with a whole copy of what fsdp and tensor split; None for as many as devices are
        left. 1 with the others 1 is one device, whatever else is there.
      fsdp: parts in which parameters and optimiser states lie, gathered where they are used; rows lie along it too.
      tensor: parts of heads, MLP columns and vocabulary, which work on the same rows together.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        ok = self.data is None or self.data >= 1
        _check(ok, "mesh", "data", self.data, "at least 1, or null for as many as devices are left")
        for field in ("fsdp", "tensor"):
            _check(getattr(self, field) >= 1, "mesh", field, getattr(self, field), "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation along the way and at the end.

    Attributes:
      data: a JSON-lines file, `embedded` for the shipped held-out set, None for no evaluation.
      every: steps between evaluations, None for the base and the end only.
      samples: responses per problem; k: of pass@k, at most `samples`.
      temperature, top_p, top_k, min_p, min_new_tokens: of evaluation sampling, see `gdro_jax.sampling.SamplingConfig`.
      max_new_tokens: longest response, None for that of training.
      template: as `data.template`; None for that one, and for `boxed` on benchmarks.
      problems_per_call: problems sampled at a time, each `samples` times; changes memory and speed, nothing else.
      problems_per_stratum: use the first so many of each stratum along the way, None for all; the base and the end
        are evaluated on all.
    """

    data: str | None = "embedded"
    every: int | None = None
    samples: int = 8
    k: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 1
    max_new_tokens: int | None = None
    template: str | None = None
    problems_per_call: int = 256
    problems_per_stratum: int | None = None

    def __post_init__(self) -> None:
        _check(self.samples >= 1, "eval", "samples", self.samples, "at least 1")
        _check(1 <= self.k <= self.samples, "eval", "k", self.k, f"in 1..samples={self.samples}")
        _check(self.every is None or self.every >= 1, "eval", "every", self.every, "at least 1, or null")
        ok = self.max_new_tokens is None or self.max_new_tokens >= 1
        _check(ok, "eval", "max_new_tokens", self.max_new_tokens, "at least 1, or null")
        _check(self.problems_per_call >= 1, "eval", "problems_per_call", self.problems_per_call, "at least 1")
        try:
            resolve_template(self.template or "plain")
        except ValueError as error:
            raise ValueError(f"eval.{error}") from None
        ok = self.problems_per_stratum is None or self.problems_per_stratum >= 1
        _check(ok, "eval", "problems_per_stratum", self.problems_per_stratum, "at least 1, or null")
        try:
            self.build((), GenerationConfig(max_new_tokens=max(self.min_new_tokens, 1)))
        except ValueError as error:
            raise ValueError(f"eval.{error}") from None

    def build(self, stop_tokens: tuple[int, ...], training: GenerationConfig) -> SamplingConfig:
        """The sampler's own configuration, where nothing is said that of training."""
        return dataclasses.replace(
            training.build(stop_tokens),
            max_new_tokens=self.max_new_tokens or training.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            min_new_tokens=self.min_new_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Several runs over the same prompts, budget and seeds; read by `gdro compare` alone.

    Attributes:
      output: the folder of all runs and their report.
      seeds: one run of every method for each.
      methods: label to what differs, as nested sections; `controller.name` is the label unless it is given.
    """

    output: str = "runs/compare"
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    methods: dict[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        ok = bool(self.seeds) and all(isinstance(s, int) for s in self.seeds)
        _check(ok, "compare", "seeds", self.seeds, "a list of whole numbers")
        _check(len(set(self.seeds)) == len(self.seeds), "compare", "seeds", self.seeds, "distinct")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on.

    Raises:
      ValueError: fields that do not fit together.
    """

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    controller: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)
    sampling: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        pieces = self.train.minibatches * self.train.microbatches
        rows = self.rows_per_step
        name = "minibatches" if rows % self.train.minibatches else "microbatches"
        allowed = f"such that minibatches * microbatches, here {pieces}, divides the step's {rows} rows"
        _check(rows % pieces == 0, "train", name, getattr(self.train, name), allowed)
        buffer = self.reward.overlong_buffer
        ok = buffer is None or buffer <= self.sampling.max_new_tokens
        allowed = f"at most sampling.max_new_tokens={self.sampling.max_new_tokens}"
        _check(ok, "reward", "overlong_buffer", buffer, allowed)
        greedy = self.sampling.temperature == 0
        _check(not greedy, "sampling", "temperature", self.sampling.temperature, "above 0 in training")
        for field, off in {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_new_tokens": 1}.items():
            value, allowed = getattr(self.sampling, field), f"{off} in training: truncated sampling biases the ratio"
            _check(value == off, "sampling", field, value, allowed)
        try:
            self.eval_sampling(())
        except ValueError as error:
            raise ValueError(f"eval.{error}") from None

    @property
    def rows_per_step(self) -> int:
        """R = P · n_bar."""
        return self.train.prompts_per_step * self.controller.mean_rollouts

    @property
    def eval_template(self) -> str:
        """The prompt template of held-out problems."""
        return self.eval.template or self.data.template

    def eval_sampling(self, stop_tokens: tuple[int, ...]) -> SamplingConfig:
        """How responses are sampled in evaluation."""
        return self.eval.build(stop_tokens, self.sampling)
