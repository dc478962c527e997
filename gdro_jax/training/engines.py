"""What a run samples with: the package's own sampler, or a served model that is brought every new policy."""

import jax

from gdro_jax.models import qwen3
from gdro_jax.sampling import Engine, Sampler, SamplingConfig, ServedModel, served
from gdro_jax.training import processes, setup
from gdro_jax.training.config import Config
from gdro_jax.training.export import save_policy


def make(config: Config, policy: setup.Policy, mesh: jax.sharding.Mesh | None = None) -> Engine:
    """The engine that `sampling` asks for; nothing is sent to a server yet."""
    settings, built = config.sampling, config.sampling.build(policy.stop_tokens)
    url, folder = settings.server, settings.server_folder
    if url is not None and processes.count() > 1:
        raise setup.InputError(f"sampling.server={url!r}: must be null in a job of {processes.count()} processes")
    if url is None or folder is None:
        return sampler(policy.model, built, mesh, even=setup.most_rollouts(config.controller) is not None)

    def push(model: qwen3.Qwen3) -> None:
        save_policy(model, folder, config.model, policy.stop_tokens)
        served.reload(url, settings.server_timeout)

    name = settings.server_model or folder
    return ServedModel(url, name, built, timeout=settings.server_timeout, push=push)


def sampler(
    model: qwen3.Qwen3, config: SamplingConfig, mesh: jax.sharding.Mesh | None = None, even: bool = False
) -> Sampler:
    """The package's own sampler, its errors as a run's.

    Raises:
      InputError: a setting that the model, or the devices it is on, cannot do.
    """
    try:
        return Sampler(model, config, mesh, even)
    except ValueError as error:
        raise setup.InputError(f"sampling.{error}") from None
