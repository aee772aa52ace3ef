"""diffusers' face of the process: config keys, set_timesteps, step, add_noise.

The class translates diffusers' words into the process and its parametrisations; it holds no formula.
Everything that the stock scheduler gets right, it gets the same way, from the same draws of the generator.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers' loader looks for it here
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm import parametrization, spacing, variances
from hf_ddpm.checks import as_numbers, described
from hf_ddpm.gaussian import discretized_gaussian_log_likelihood
from hf_ddpm.likelihood.errors import Errors
from hf_ddpm.parametrization import PredictionType, from_x0_eps, to_x0
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.schedules import SCHEDULES, make_betas, rescale_zero_terminal_snr
from hf_ddpm.seeds import check_generators
from hf_ddpm.spacing import sampling_steps, start_warning
from hf_ddpm.spelling import suggest_keywords
from hf_ddpm.tables import add_scaled, narrow, wide
from hf_ddpm.variances import MEASURED, AnyVariance, log_variance_at, outputs, variance
from hf_ddpm.visited import Visited, chosen_steps, is_number, is_whole, place_of, visit, whole_number

logger = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]
# Keys of a scheduler's config that say which process the network was trained for, and how its answer is read.
PROCESS_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
NETWORK_KEYS = (*PROCESS_KEYS, "prediction_type")


class DDPMScheduler(diffusers.DDPMScheduler):
    """Ancestral sampling, Ho et al. 2020, algorithm 2: a drop-in for `diffusers.DDPMScheduler`.

    The 15 config keys, their defaults and the draws from the generator are the stock scheduler's. What
    differs: tables are float64 and exact; half-precision images go through float32; `step` takes a timestep
    per sample, adds no noise at the last executed step, and reads nothing back from the device; a request
    that makes no sense is a `ValueError` where it is used (construction is as lenient as diffusers').

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_start (`float`, defaults to 0.0001): first β.
        beta_end (`float`, defaults to 0.02): last β.
        beta_schedule (`str`, defaults to `"linear"`): "linear", "scaled_linear", "squaredcos_cap_v2",
            "sigmoid", "laplace" or "constant". The last three are no words of most diffusers samplers: their
            betas are put into `trained_betas`, which all of them read.
        trained_betas (`list[float]` or array, *optional*): the T betas themselves, used exactly; the other
            beta arguments then do nothing.
        variance_type (`str`, defaults to `"fixed_small"`): σ_t² = β̃_t ("fixed_small"), β_t ("fixed_large"),
            either with the suffix "_log" (the same), "learned" (the network's second C channels are log σ²),
            "learned_range" (they interpolate, Nichol & Dhariwal 2021), or "optimal" or "by-value", which are
            made of the attribute `errors` for whatever steps are visited.
        clip_sample (`bool`, defaults to `True`): clip the predicted x_0 to ±`clip_sample_range`.
        prediction_type (`str`, defaults to `"epsilon"`): "epsilon", "sample", "v_prediction", or "mean" or
            "score", which diffusers has no words for.
        thresholding (`bool`, defaults to `False`): dynamic thresholding instead of clipping, as in diffusers.
        dynamic_thresholding_ratio (`float`, defaults to 0.995): its quantile.
        clip_sample_range (`float`, defaults to 1.0): where `clip_sample` clips.
        sample_max_value (`float`, defaults to 1.0): the upper limit of dynamic thresholding.
        timestep_spacing (`str`, defaults to `"leading"`): "leading", "trailing" or "linspace", or "quadratic"
            or "align-your-steps" (Sabour et al. 2024), which diffusers doesn't have.
        steps_offset (`int`, defaults to 0): added to every step of "leading".
        rescale_betas_zero_snr (`bool`, defaults to `False`): end at ᾱ = 0 (Lin et al. 2023); "epsilon" and
            "score" can't start there.
    """

    @register_to_config
    @suggest_keywords
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal[
            "linspace", "leading", "trailing", "quadratic", "align-your-steps"
        ] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        switches = {
            "clip_sample": clip_sample,
            "thresholding": thresholding,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        for key, value in switches.items():
            if not isinstance(value, int | np.bool_) or value not in (0, 1):  # "false" would count as true
                raise ValueError(f"{key} is {described(value)}; allowed: True, False")
        if trained_betas is not None:
            betas = as_numbers("trained_betas", trained_betas, "T numbers in (0, 1]", torch.float64).clone()
            if betas.ndim != 1:
                raise ValueError(f"trained_betas has shape {tuple(betas.shape)}; allowed: (T,)")
            self.register_to_config(trained_betas=betas.tolist())  # JSON knows no tensors
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
            if not SCHEDULES[beta_schedule].in_diffusers:
                self.register_to_config(trained_betas=betas.tolist())
        self._exact_betas = rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas

        # What other diffusers code reads: float32, as in the stock class.
        self.betas = self._exact_betas.float()
        self.alphas = (1 - self._exact_betas).float()
        self.alphas_cumprod = torch.cumprod(1 - self._exact_betas, 0).float()
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, device="cpu")
        self._visited: Visited | None = None
        self._errors: Errors | None = None
        self._measured: tuple[DiffusionProcess, str, AnyVariance] | None = None
        self._said: set[str] = set()

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The scheduler that a config describes, of this class or another one of diffusers.

        diffusers' classes replace values that a config notes as left at their default by defaults of their
        own, which differ: Heun's betas are not DDPM's. Here that never happens to what the network was
        trained for (`NETWORK_KEYS`).

        Args:
            config: a scheduler's `config`.
            return_unused_kwargs: return a tuple of the scheduler and the keywords that it has no use for.
            **kwargs: config keys with values that replace those of `config`.

        Raises:
            ValueError: a keyword for betas that the `trained_betas` of `config` would overrule.
        """
        if isinstance(config, Mapping):
            left = [key for key in config.get("_use_default_values") or () if key not in NETWORK_KEYS]
            config = {**config, "_use_default_values": left}
            if _derived_betas_are_outdated(config, kwargs):
                config["trained_betas"] = None
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Set config keys, and say whose class a pipeline may name in its `model_index.json`.

        No key is ever noted as left at its default (`_use_default_values`): `from_config` of diffusers' other
        classes would replace it by a default of theirs, and so sample another process.

        A pipeline, diffusers' own too, writes the module that a component claims to be from. The stock class
        runs what ours saved, so that is its module: the folder then loads where hf_ddpm is not installed. A
        config that the stock class can't run names hf_ddpm, which plain diffusers refuses and
        `DDPMPipeline.from_pretrained` resolves. Only the instance says so: pickle and `type` ask the class.

        Raises:
            ValueError: a key of the process is changed after its tables were made.
        """
        for key in PROCESS_KEYS if "_exact_betas" in vars(self) else ():
            if key in kwargs and not np.array_equal(kwargs[key], self.config[key]):  # type: ignore[arg-type]
                raise ValueError(
                    f"{key} can't change once the scheduler is made; allowed: a new one, "
                    f"DDPMScheduler.from_config(scheduler.config, {key}=...)"
                )
        super().register_to_config(**kwargs | {"_use_default_values": []})
        if type(self) is DDPMScheduler:
            portable = parametrization.in_diffusers(self.config.get("prediction_type"))
            portable = portable and variances.in_diffusers(self.config.get("variance_type"))
            portable = portable and spacing.in_diffusers(self.config.get("timestep_spacing"))
            self.__module__ = diffusers.DDPMScheduler.__module__ if portable else PACKAGE

    @property
    def variance_type(self) -> str:
        """`config.variance_type`, the one truth; assigning changes the config."""
        return self.config["variance_type"]

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self.register_to_config(variance_type=value)

    @property
    def errors(self) -> Errors | None:
        """The network's measured errors, which the variances "optimal" and "by-value" are made of; else None.

        They are no part of the config. `DDPMPipeline` gives them to its scheduler where `hf-ddpm plan` has
        left them in the model's folder; elsewhere they are assigned, `scheduler.errors =
        pipeline.errors.errors`.

        Raises:
            ValueError: something else is assigned, or errors of another process.
        """
        return self._errors

    @errors.setter
    def errors(self, errors: Errors | None) -> None:
        if errors is not None:
            if not isinstance(errors, Errors):
                raise ValueError(
                    f"errors is {described(errors)}; allowed: an Errors, such as pipeline.errors.errors"
                )
            errors.variance(self.process, MEASURED[0])  # of another process it has none
        self._errors, self._measured = errors, None

    @cached_property
    def process(self) -> DiffusionProcess:
        """The full process of T steps that this config describes, shared with training and likelihood.

        Raises:
            ValueError: the config describes no process (a beta outside (0, 1], or not T of them).
        """
        if len(self._exact_betas) != len(self):
            raise ValueError(
                f"trained_betas has {len(self._exact_betas)} values but num_train_timesteps is {len(self)}; "
                "allowed: equal numbers"
            )
        return DiffusionProcess.from_betas(self._exact_betas)

    @property
    def chain(self) -> DiffusionProcess:
        """The process respaced to the steps in `self.timesteps`; the full one before any were chosen.

        Raises:
            ValueError: `timesteps` was assigned something else than steps of the process, each once.
        """
        return self._steps().chain

    def _steps(self) -> Visited:
        """What `self.timesteps` holds now: it may have been assigned from outside, or changed in place."""
        if self._visited is None or not self._visited.holds(self.timesteps):
            self._visited = visit(self.process, self.timesteps)
        return self._visited

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the steps to execute, evenly by `timestep_spacing`, or one by one.

        Args:
            num_inference_steps (`int`, *optional*): K, 1 ≤ K ≤ T. The steps are diffusers', but in one case:
                where its grid begins so far below T that x_t still knows over 0.01 bits/dim of its image, as
                "leading" does with very few steps and with more than T/2, ours begins higher: see
                `spacing.sampling_steps`.
            device (`str` or `torch.device`, *optional*): where `self.timesteps` goes.
            timesteps (`list[int]`, *optional*): the steps themselves, descending; then no
                `num_inference_steps`.

        Raises:
            ValueError: both or neither are given, a step or a number of steps that the process does not
                have, or a variance type that needs `errors` without them.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass exactly one of num_inference_steps and timesteps")
        if self.variance_type in MEASURED:
            self._known_errors()
        if timesteps is not None:
            steps = chosen_steps(timesteps)
        else:
            steps = self._spaced(num_inference_steps)
        with torch.inference_mode(False):  # a tensor made in that mode doesn't count its changes
            values = steps.to(torch.int64, copy=True)
            moved = values.to(device if device is not None else "cpu")
        self._visited = visit(self.process, moved, values)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(steps)
        self.timesteps = moved

    def _spaced(self, num_inference_steps: int | None) -> Tensor:
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        steps = sampling_steps(self.process, spacing, num_inference_steps, offset)
        line = start_warning(self.process, int(steps[0]))
        if line is not None and line not in self._said:
            self._said.add(line)
            logger.warning(line)
        return steps

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step x_t → x_prev, Ho et al. 2020, algorithm 2; nothing is read back from a device.

        Args:
            model_output (`torch.Tensor`): the network's output, (B, C, H, W), or (B, 2C, H, W) for learned
                variances.
            timestep (`int` or `torch.Tensor`): t in the network's numbering: an int, an element of
                `self.timesteps`, or a step per sample, shape (B,). Any other tensor on an accelerator is
                trusted to hold steps of the chain, and draws noise at every step, which the last one
                multiplies by zero. From each step the chain goes to the next lower one of
                `self.timesteps`, in whatever order that lists them.
            sample (`torch.Tensor`): x_t, (B, C, H, W), floating point.
            generator (`torch.Generator` or a list of B of them, *optional*): one `randn_tensor` draw a step,
                and none at the last executed step.
            return_dict (`bool`, defaults to `True`): return a `DDPMSchedulerOutput`, or the tuple of its two
                fields.

        Returns:
            x_prev and the predicted (clipped) x_0, both with the shape and dtype of `sample`. An infinite
            answer of the network is clipped as any other, which `DDPMPipeline` looks for at its end.

        Raises:
            ValueError: a step that is not in the chain, steps for another number of samples, shapes that do
                not fit the variance type, an unknown variance or prediction type, generators of another
                number than the batch or of another device.
        """
        _check_images("sample", sample)
        visited = self._steps()
        samples = sample.shape[0]  # len() of a tensor is slow
        chain, t = visited.chain, self._index(timestep, visited, samples)
        output, predicted_variance = self._split(model_output, sample)
        if generator is not None:
            check_generators(generator, samples, sample.device)
        x_t = wide(sample)
        x_0 = self._clip(to_x0(chain, self.config["prediction_type"], output, x_t, t))
        x_prev = chain.q_posterior_mean(x_0, x_t, t)
        if len(chain) > 1 and not self._is_last(t):
            noise = _draw_like(output, generator)
            x_prev = add_scaled(x_prev, self._sigma(chain, t, x_0, predicted_variance), wide(noise))
        x_prev, x_0 = narrow(x_prev, sample.dtype), narrow(x_0, sample.dtype)
        return (
            DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)
            if return_dict
            else (x_prev, x_0)
        )

    def _index(self, timestep: int | Tensor, visited: Visited, samples: int | None) -> int | Tensor:
        """`timestep` as an index into the chain: an int where the host knows it without asking the device."""
        if not isinstance(timestep, Tensor):
            return visited.index(whole_number(timestep))
        if samples is not None and timestep.shape not in ((), (1,), (samples,)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)} for a batch of {samples}; allowed: one step, or "
                "one per sample"
            )
        if timestep.ndim == 0:
            if timestep.device.type == "cpu":
                return visited.index(whole_number(timestep.item()))
            if (place := place_of(timestep, visited.steps)) is not None:
                return visited.index(visited.given[place])
        if not is_whole(timestep):
            raise ValueError(f"timestep is {described(timestep)}; allowed: whole numbers")
        return visited.chain.index_of(timestep.to(torch.int64))

    @staticmethod
    def _is_last(t: int | Tensor) -> bool:
        """Whether every sample is known to be at its last step, where p_θ is a decoder and adds no noise."""
        if isinstance(t, Tensor):
            return t.device.type == "cpu" and not t.any()
        return t == 0

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, for a learned variance, the second C channels."""
        _check_images("model_output", model_output)
        kind, channels = self.variance_type, sample.shape[1]
        if model_output.device != sample.device:
            raise ValueError(f"model_output is on {model_output.device}, but sample on {sample.device}")
        wanted = (sample.shape[0], channels * outputs(kind), *sample.shape[2:])
        if model_output.shape != wanted:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; variance_type {kind!r} with samples of "
                f"shape {tuple(sample.shape)} wants {wanted}"
            )
        if model_output.shape[1] == channels:
            return model_output, None
        output, predicted_variance = model_output.chunk(2, dim=1)
        return output, predicted_variance

    def _clip(self, x_0: Tensor) -> Tensor:
        if self.config["thresholding"]:
            ratio, largest = self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"]
            if not (is_number(ratio) and 0 <= ratio <= 1):
                raise ValueError(
                    f"dynamic_thresholding_ratio is {described(ratio)}; allowed: numbers in 0..1"
                )
            if not (is_number(largest) and largest > 0):
                raise ValueError(f"sample_max_value is {described(largest)}; allowed: numbers > 0")
            return self._threshold_sample(x_0)
        if not self.config["clip_sample"]:
            return x_0
        limit = self.config["clip_sample_range"]
        if not (is_number(limit) and limit > 0):  # clamp(1, -1) would make all of it -1
            raise ValueError(f"clip_sample_range is {described(limit)}; allowed: numbers > 0")
        return x_0.clamp(-limit, limit)

    def _sigma(
        self, chain: DiffusionProcess, t: int | Tensor, x_0: Tensor, predicted_variance: Tensor | None
    ) -> Tensor | float:
        """σ_t, ready to multiply noise of the shape of the predicted x_0; 0 at the last step."""
        kind = variance(self.variance_type)
        if kind.sigma is not None:
            return chain.computed_at(t, x_0, kind.sigma)[0]
        found = self._log_variance(chain, t, x_0, predicted_variance)
        if not isinstance(found, Tensor):
            return math.exp(0.5 * found)
        sigma = torch.exp(0.5 * found)
        if not isinstance(t, Tensor):
            return sigma
        # Not a product: the network's answer at its last step may be infinite, and is not asked for
        return torch.where((t > 0).view(-1, *[1] * (x_0.ndim - 1)), sigma, 0.0)

    def _log_variance(
        self,
        process: DiffusionProcess,
        t: int | Tensor,
        x_0: Tensor,
        predicted_variance: Tensor | None,
        variance_type: str | None = None,
    ) -> Tensor | float:
        """The log-variance log σ_t² of any variance type; `x_0` is the predicted one.

        Raises:
            ValueError: it is learned and `predicted_variance` is missing, or measured and `errors` are.
        """
        name = variance_type or self.variance_type
        kind = variance(name)
        if kind.from_output is not None and predicted_variance is None:
            raise ValueError(f"variance_type {name!r} needs predicted_variance: its sigma is the network's")
        numbers = self._measured_variance(process, name) if kind.measured else name
        return log_variance_at(process, numbers, predicted_variance, t, x_0, x_0)

    def _known_errors(self) -> Errors:
        if self._errors is None:
            raise ValueError(
                f"variance_type {self.variance_type!r} needs the network's measured errors; allowed: after "
                "hf-ddpm plan MODEL, a DDPMPipeline of that model, or scheduler.errors = "
                "pipeline.errors.errors of one"
            )
        return self._errors

    def _measured_variance(self, process: DiffusionProcess, kind: str) -> AnyVariance:
        """The variance of each step of a chain, of the measured errors; made once for each chain."""
        errors, known = self._known_errors(), self._measured
        if known is None or known[0] is not process or known[1] != kind:
            known = self._measured = process, kind, errors.variance(process, kind)
        return known[2]

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """σ_t² of step t of the chain, always a variance (the stock method has three units), 0 at t = 0."""
        name, index = variance_type or self.variance_type, self._index(t, self._steps(), None)
        kind = variance(name)
        if kind.sigma is not None:
            return torch.as_tensor(self.chain.computed_at(index, self.betas, kind.sigma)[0]).float() ** 2
        if name == "by-value":
            raise ValueError(f"variance_type {name!r} has a variance for each predicted value; allowed: step")
        like = self.betas if predicted_variance is None else predicted_variance
        found = torch.as_tensor(self._log_variance(self.chain, index, like, predicted_variance, name)).exp()
        return torch.where(torch.as_tensor(index) > 0, found, 0.0) if kind.measured else found

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, Ho et al. 2020, eq. 4.

        Args:
            original_samples (`torch.Tensor`): x_0, (B, C, H, W).
            noise (`torch.Tensor`): ε, (B, C, H, W).
            timesteps (`torch.Tensor`): steps of the full process, (B,) or () int64; trusted on an
                accelerator.

        Returns:
            x_t, dtype of x_0 (computed in float32 or wider).

        Raises:
            ValueError: a step outside 0..T−1.
        """
        return self.process.q_sample(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity √ᾱ_t ε − √(1 − ᾱ_t) x_0, Salimans & Ho 2022; arguments, errors as in `add_noise`."""
        return from_x0_eps(self.process, "v_prediction", sample, noise, timesteps)

    def decoder_log_likelihood(
        self, x_0: Tensor, pred_original_sample: Tensor, predicted_variance: Tensor | None = None
    ) -> Tensor:
        """The log-likelihood log p_θ(x_0 | x_1) of 8-bit images, the negative of L_0: Ho et al. 2020, eq. 13.

        Args:
            x_0 (`torch.Tensor`): images on the grid u/127.5 − 1, (B, C, H, W).
            pred_original_sample (`torch.Tensor`): x̂_0 predicted at step 0, (B, C, H, W).
            predicted_variance (`torch.Tensor`, *optional*): the network's second C channels, for learned
                variances.

        Returns:
            nats summed over dimensions, float64, (B,). σ_0² is β̃_2 of the full process for the fixed
            variance types, whatever `set_timesteps` chose, and that of `errors` for the measured ones.

        Raises:
            ValueError: `predicted_variance` is missing for a learned variance type, or `errors` for a
                measured one.
        """
        log_variance = self._log_variance(self.process, 0, pred_original_sample, predicted_variance)
        return discretized_gaussian_log_likelihood(x_0, pred_original_sample, log_variance).flatten(1).sum(1)


def _derived_betas_are_outdated(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    """Whether a config's `trained_betas` are those of its own schedule, which the keywords change.

    Raises:
        ValueError: they are somebody's own, and would overrule the keywords.
    """
    own = config.get("trained_betas")
    asked = [key for key in ("beta_schedule", "beta_start", "beta_end") if key in changes]
    if own is None or "trained_betas" in changes or not (asked or "num_train_timesteps" in changes):
        return False
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
    if config.get("beta_schedule") in SCHEDULES and all(key in config for key in keys):
        made = make_betas(*(config[key] for key in keys))
        if len(made) == len(own) and np.allclose(made.numpy(), own, rtol=1e-12, atol=0):
            return True
    if asked:
        raise ValueError(
            f"the config's trained_betas overrule {asked[0]}; allowed: trained_betas=None as well, or "
            "betas of your own there"
        )
    return False


def _check_images(name: str, images: Any) -> None:
    """Refuse what can't be images: other types and whole numbers, to which the result would be cut."""
    if not (isinstance(images, Tensor) and images.is_floating_point() and images.ndim >= 2):
        raise ValueError(f"{name} is {described(images)}; allowed: a floating-point tensor (B, C, H, W)")


def _draw_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """What `randn_tensor` draws; in the plain case without it, as it costs more than a small noise."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device == x.device):
        return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
